"""Training a small network, and how far two accuracies can be told apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from posmat.machine import job_order
from posmat.network.data import TEST_SHARE

FEWEST_SPLITS = 5  # for an interval: below, nobody could tell how much splits differ
RESAMPLED = 2000  # times that a bootstrap draws its images


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
        # In a report nobody watches, and the bar would stay in the executed notebook.
        unseen = bool(job_order())
        for _ in tqdm(range(epochs), desc="epochs", delay=2, leave=False, disable=unseen):
            for chosen in torch.randperm(len(images)).to(images.device).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())


class MeanDifference(NamedTuple):
    """A mean of paired differences and its 95 % interval, None where it cannot be told."""

    mean: float
    low: float | None
    high: float | None


def mean_difference(differences: Sequence[float]) -> MeanDifference:
    """The mean over splits of the digits, with an interval that knows that they share images.

    A plain t interval over them is too narrow: by Nadeau and Bengio's correction (Inference for the
    Generalization Error, 2003) the variance of the mean is that of one split times
    1/n + test images / training images, rather than 1/n. No differences are a ValueError.
    """
    from scipy import stats  # which scikit-learn needs too

    values, n = np.asarray(differences, dtype=float), len(differences)
    if not n:
        raise ValueError("there are no differences: give one for each split.")
    mean = float(values.mean())
    if n < FEWEST_SPLITS:
        return MeanDifference(mean, None, None)
    variance = values.var(ddof=1) * (1 / n + TEST_SHARE / (1 - TEST_SHARE))
    reach = float(stats.t.ppf(0.975, n - 1) * variance**0.5)
    return MeanDifference(mean, mean - reach, mean + reach)


def bootstrap_difference(right: Tensor, other: Tensor, seed: int = 0) -> MeanDifference:
    """How much more often `right` is right, over trainings that share their test images.

    Both are bool (trainings, images). The interval is a paired bootstrap's: images are drawn again,
    the same for all trainings and both sides, and so are the trainings.
    """
    differences = right.double().sub(other.double()).cpu().numpy()
    trainings, images = differences.shape
    rng = np.random.default_rng(seed)
    means = [
        differences[rng.integers(0, trainings, trainings)].mean(0)[rng.integers(0, images, images)]
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(np.mean(means, axis=1), [0.025, 0.975])
    return MeanDifference(float(differences.mean()), float(low), float(high))
