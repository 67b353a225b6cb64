"""Training by a seed, and intervals that know what accuracies share."""

import pytest
import torch
from torch import nn

import posmat as pm


def small_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.1), nn.Linear(16, 10))


def test_training_learns_and_is_by_seed():
    images = pm.load_images("digits")
    untrained, model = small_network(0)(images.test), small_network(0)
    before = torch.get_rng_state()
    first = pm.train(model, images.train, images.train_labels, 3, 1)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is left alone
    again, other = (
        pm.train(small_network(0), images.train, images.train_labels, 3, seed) for seed in (1, 2)
    )
    assert not first.training
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert pm.accuracy(untrained, images.test_labels) < 0.4
    assert pm.accuracy(first(images.test), images.test_labels) > 0.75


def test_few_splits_have_no_interval_and_many_a_wide_one():
    for count in range(1, 5):
        assert pm.mean_difference([0.5] * count) == (0.5, None, None)
    with pytest.raises(ValueError, match="no differences"):
        pm.mean_difference([])
    found = pm.mean_difference([1, 2, 3, 4, 5])
    # Variance 2.5, times 1/5 + 1/3 for splits that share their images; 2.776 is t's quantile.
    assert found.mean == 3
    assert found.high - 3 == 3 - found.low == pytest.approx(2.776445 * (2.5 * 8 / 15) ** 0.5)


def test_a_bootstrap_is_as_wide_as_images_and_trainings_make_it():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(3, 4000, generator=generator) < 0.8
    assert pm.bootstrap_difference(base, base) == (0, 0, 0)
    # Half of the wrong ones become right, in all trainings alike: 0.1, and of 4,000 images the
    # deviation of the mean of a share of 0.1 is 0.0047.
    one = base[:1].expand(3, -1)
    better = one | (torch.rand(4000, generator=generator) < 0.5)
    found = pm.bootstrap_difference(better, one)
    assert found.mean == pytest.approx(0.1, abs=0.015)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.0047, rel=0.2)
    # One training that differs from the others widens it, however many images there are.
    other = torch.cat([one[:2], better[:1]])
    shared = pm.bootstrap_difference(other, one)
    assert shared.low == 0 and shared.high > 0.09
    assert pm.bootstrap_difference(better, one) == found  # drawn by a seed
