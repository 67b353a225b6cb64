import numpy as np
import pytest
import torch

from posmat.layer.problem import ProblemSize, random_operands


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", None, True, np.int64(0), np.float64(4)])
def test_a_size_is_a_whole_number_above_0(bad):
    for sizes in ((bad, 4, 4), (4, bad, 4), (4, 4, bad)):
        with pytest.raises(ValueError, match="whole number above 0"):
            ProblemSize(*sizes)


def test_a_size_may_be_any_integer_and_is_kept_as_an_int():
    size = ProblemSize(np.int64(4), np.uint8(5), torch.tensor(6))
    assert size == ProblemSize(4, 5, 6) and {type(n) for n in vars(size).values()} == {int}
    assert (size.partial_products, size.flops) == (120, 240)


def test_operands_have_the_shapes_and_reach_both_ends(device):
    X, W = random_operands(ProblemSize(64, 32, 500), device=device)
    assert X.shape == (64, 500) and W.shape == (32, 500)
    assert X.dtype == W.dtype == torch.int8 and X.device.type == device
    assert X.min() == -127 and X.max() == 127  # 32,000 draws of 255 values
    X, _ = random_operands(ProblemSize(64, 32, 500), device=device, low=-128, high=126)
    assert X.min() == -128 and X.max() == 126


def test_operands_depend_on_the_seed_only(device):
    size = ProblemSize(3, 4, 5)
    X, W = random_operands(size, seed=7, device=device)
    X_again, W_again = random_operands(size, seed=7)
    assert torch.equal(X.cpu(), X_again) and torch.equal(W.cpu(), W_again)
    assert not torch.equal(X_again, random_operands(size, seed=8)[0])


def test_floating_operands_are_normal():
    X, _ = random_operands(ProblemSize(100, 1, 1000), dtype=torch.float32)
    assert X.dtype == torch.float32
    assert abs(X.mean()) < 0.02 and abs(X.std() - 1) < 0.02


@pytest.mark.parametrize(("low", "high"), [(1, 0), (-129, 0), (0, 128)])
def test_a_range_that_the_dtype_cannot_hold_is_refused(low, high):
    with pytest.raises(ValueError, match=r"-128\.\.127"):
        random_operands(ProblemSize(1, 1, 1), low=low, high=high)
