"""How far two accuracies can be told apart that were measured in pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

FEWEST_SPLITS = 5  # for an interval: below, nobody could tell how much splits differ
RESAMPLED = 2000  # times that a bootstrap draws its images


class MeanDifference(NamedTuple):
    """A mean of paired differences and its 95 % interval, None where it cannot be told."""

    mean: float
    low: float | None
    high: float | None


def mean_difference(differences: Sequence[float], test_share: float = 0.25) -> MeanDifference:
    """The mean over splits of the same images, with an interval that knows that they share them.

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
    variance = values.var(ddof=1) * (1 / n + test_share / (1 - test_share))
    reach = float(stats.t.ppf(0.975, n - 1) * variance**0.5)
    return MeanDifference(mean, mean - reach, mean + reach)


def bootstrap_difference(right: ArrayLike, other: ArrayLike, seed: int = 0) -> MeanDifference:
    """How much more often `right` is right, over trainings that share their test images.

    Both are bool (trainings, images). The interval is a paired bootstrap's: images are drawn again,
    the same for all trainings and both sides, and so are the trainings, of which it takes two.
    """
    differences = np.asarray(right, dtype=float) - np.asarray(other, dtype=float)
    trainings, images = differences.shape
    if trainings < 2:
        return MeanDifference(float(differences.mean()), None, None)
    rng = np.random.default_rng(seed)
    means = [
        differences[rng.integers(0, trainings, trainings)].mean(0)[rng.integers(0, images, images)]
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(np.mean(means, axis=1), [0.025, 0.975])
    return MeanDifference(float(differences.mean()), float(low), float(high))
