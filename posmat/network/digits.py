"""A small network on scikit-learn's digits: trained, quantized, and run by any multiplier.

1,797 images of 8 x 8 pixels, written by hand, which come with scikit-learn and are not fetched. The
network has two fully connected layers. Quantized, a layer sums products of int8 inputs and int8
weights by the multiplier that is asked for; scales and biases are float64 and the same for every
multiplier, so that two multipliers whose sums agree give the same logits, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posmat.multipliers.fibonacci import Quantized, quantize_magnitudes
from posmat.multipliers.product import inexact_product
from posmat.multipliers.table import Multiplier

TEST_SHARE = 0.25  # of the images that are for testing
FEWEST_SPLITS = 5  # for an interval: below, nobody could tell how much splits differ
LARGEST = 127  # an input's largest magnitude: inputs are non-negative, pixels and ReLU outputs


class DigitImages(NamedTuple):
    """Images (M, 64) of pixels in 0..1, float32, with their labels 0..9, in two parts."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digit_images(seed: int = 0) -> DigitImages:
    """Split the digits by a seed, each with its share in both parts; on the CPU."""
    from sklearn.datasets import load_digits  # takes a second to load
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_SHARE, random_state=seed, stratify=labels
    )
    return DigitImages(pixels[train], labels[train], pixels[test], labels[test])


def train_network(
    images: DigitImages, hidden_features: int = 32, epochs: int = 200, seed: int = 0
) -> nn.Sequential:
    """Train 64 -> hidden_features -> 10 with a ReLU between, on the whole training part at a time.

    On the CPU, where a seed gives the same network. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Linear(images.train.shape[1], hidden_features)
        network = nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden_features, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images.train), images.train_labels).backward()
        optimizer.step()
    return network.requires_grad_(False)


class QuantizedLayer(NamedTuple):
    """One fully connected layer in integers: logits = scale · sums + bias."""

    weight: Tensor  # int8 (N, K)
    bias: Tensor  # float64 (N,)
    input_scale: float  # what one step of the int8 input is worth
    scale: float  # the same of the sum: the input's scale times the weight's


class NetworkOutput(NamedTuple):
    """What a quantized network gives: each layer's integer sums (M, N), and float64 logits."""

    sums: tuple[Tensor, ...]
    logits: Tensor


class QuantizedNetwork(NamedTuple):
    """Fully connected layers in integers, with a ReLU after each but the last."""

    layers: tuple[QuantizedLayer, ...]

    def run(self, images: Tensor, multiplier: str | Multiplier = "exact") -> NetworkOutput:
        """Every product of an input and a weight by `multiplier`; images (M, K) in 0..1.

        An input beyond the largest that was seen in calibration is clamped.
        """
        values, sums = images.double(), []
        for layer in self.layers:
            codes = (values / layer.input_scale).round().clamp(0, LARGEST).to(torch.int8)
            sums.append(inexact_product(codes, layer.weight, multiplier))
            logits = layer.scale * sums[-1].double() + layer.bias
            values = logits.relu()
        return NetworkOutput(tuple(sums), logits)

    def to(self, device: torch.device | str) -> "QuantizedNetwork":
        """The same network on another device."""
        layers = (
            layer._replace(weight=layer.weight.to(device), bias=layer.bias.to(device))
            for layer in self.layers
        )
        return QuantizedNetwork(tuple(layers))


def quantize_network(
    network: nn.Sequential,
    images: Tensor,
    quantize: Callable[[Tensor], Quantized] = quantize_magnitudes,
) -> QuantizedNetwork:
    """Quantize a trained network's weights, by `quantize`, and its inputs, which become 0..127.

    The largest input of each layer is found on the images, (M, K) in 0..1.
    """
    layers, values = [], images
    for module in network:
        if isinstance(module, nn.Linear):
            found, input_scale = quantize(module.weight), float(values.max()) / LARGEST
            scale = input_scale * found.scale
            layers.append(QuantizedLayer(found.weight, module.bias.double(), input_scale, scale))
        values = module(values)
    return QuantizedNetwork(tuple(layers))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())


class MeanDifference(NamedTuple):
    """The mean of differences over splits of the same images, and its 95 % interval."""

    mean: float
    low: float | None  # None where there are too few splits to tell
    high: float | None


def mean_difference(differences: Sequence[float]) -> MeanDifference:
    """The mean over random splits of the same images, with an interval that knows that they share.

    A plain t interval over them is too narrow: by Nadeau and Bengio's correction (Inference for the
    Generalization Error, 2003) the variance of the mean is that of one split times
    1/n + test images / training images, rather than 1/n. No differences are a ValueError.
    """
    from scipy import stats  # which scikit-learn needs too

    values = torch.tensor(list(differences), dtype=torch.float64)
    if not len(values):
        raise ValueError("there are no differences: give one for each split.")
    mean, n = float(values.mean()), len(values)
    if n < FEWEST_SPLITS:
        return MeanDifference(mean, None, None)
    variance = float(values.var()) * (1 / n + TEST_SHARE / (1 - TEST_SHARE))
    reach = float(stats.t.ppf(0.975, n - 1)) * variance**0.5
    return MeanDifference(mean, mean - reach, mean + reach)
