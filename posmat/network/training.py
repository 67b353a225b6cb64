"""Training a small network."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from posmat.machine import job_order


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int = 0,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
) -> nn.Module:
    """Train a classifier in place, by Adam on the cross entropy; it is given back in `eval` mode.

    The seed orders the images, and dropout; the caller's random state is left as it was.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    cuda = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model.train()
        unseen = bool(job_order())  # in a report, where the bar would stay in the notebook
        for _ in tqdm(range(epochs), desc="epochs", delay=2, leave=False, disable=unseen):
            for chosen in torch.randperm(len(images)).to(images.device).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())
