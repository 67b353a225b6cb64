"""Fibonacci codes: integers in whose binary form no two ones are adjacent, and their quantization.

There are F(n + 2) of them among the 2**n numbers of n bits: 34 of 128, 55 of 256. They are not the
Fibonacci *numbers*; the name is that of the coding, in which no two ones are adjacent either.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CANDIDATES = (2048, 256)  # for a scale: over the whole range, and around the best


def fibonacci_codes(bits: int = 7) -> Tensor:
    """All Fibonacci codes of `bits` bits in ascending order, as int64.

    Raises:
        ValueError: `bits` is not a whole number in 1..16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"bits={bits!r}: give a whole number in 1..16.")
    every = torch.arange(2**bits)
    return every[is_fibonacci(every)]


def is_fibonacci(x: Tensor) -> Tensor:
    """Which elements have no two adjacent ones in their binary form: bool, in the shape of x.

    Raises:
        TypeError, ValueError: x does not hold integers, or it holds a negative one.
    """
    wide = _non_negative_integers(x)
    return (wide & (wide >> 1)) == 0


def nearest_fibonacci(x: Tensor, bits: int = 7) -> Tensor:
    """The Fibonacci code of `bits` bits nearest to each element; a tie goes to the larger code.

    The codes of 7 bits end at 85, so all of 86..127 come down to it: the width decides.

    x holds whole numbers in 0..2**bits - 1 of any integer dtype, and so does the result.

    Raises:
        TypeError: x does not hold integers.
        ValueError: x holds a number outside 0..2**bits - 1, or one whose code its dtype does not
            hold (int8 ends at 127, and of 8 bits 107 goes to 128); `bits` is outside 1..16.
    """
    codes = fibonacci_codes(bits).to(x.device)
    wide = _non_negative_integers(x)
    if wide.numel() and int(wide.max()) >= 2**bits:
        raise ValueError(f"x holds {int(wide.max())}, and {bits} bits end at {2**bits - 1}.")
    # Whole x is at or above the midpoint exactly when it is at or above the midpoint rounded up.
    midpoints = (codes[:-1] + codes[1:] + 1) // 2
    nearest = codes[torch.bucketize(wide, midpoints, right=True)]
    limit = torch.iinfo(x.dtype).max
    if codes[-1] > limit and nearest.numel() and int(nearest.max()) > limit:
        first = int(wide[nearest > limit][0])
        raise ValueError(
            f"x holds {first} as {x.dtype}, which ends at {limit}, and the nearest code of {bits} "
            f"bits is {int(nearest[wide == first][0])}: give fewer bits, or x in a wider dtype."
        )
    return nearest.to(x.dtype)


class Quantized(NamedTuple):
    """A float weight as int8 times a scale, and what was lost: real = scale · weight."""

    weight: Tensor  # int8, in the shape of the float weight
    scale: float  # the one scale of the whole tensor
    mean_squared_error: float  # the mean of (real - float weight)²
    relative_error: float  # √(the sum of these squares / the sum of the weights' own)


def quantize_fibonacci(weight: Tensor, bits: int = 7) -> Quantized:
    """Quantize a float weight to int8 sign-magnitude with Fibonacci magnitudes.

    The scale is the one of least squared error (see `quantize_magnitudes`). The scale that suits
    plain int8, largest weight / 127, would leave 86..127 empty: all of it is rounded to 85.

    Raises:
        TypeError, ValueError: as `quantize_magnitudes`; `bits` is outside 1..7.
    """
    return quantize_magnitudes(weight, fibonacci_codes(bits))


def quantize_magnitudes(weight: Tensor, codes: Tensor | None = None) -> Quantized:
    """Quantize a float weight to int8 whose magnitudes are among `codes`, at the best scale.

    The scale is that of `best_scales`. Each weight takes the nearest code, a tie the larger one.

    Args:
        weight: any floating dtype and shape, finite; the largest magnitude 0 or in 1e-250..1e150.
        codes: ascending integers from 0 to at most 127; by default all, plain symmetric int8.

    Raises:
        TypeError: the weight is not floating, or the codes are not a tensor of integers.
        ValueError: the weight is empty, or a value of weight or codes is not as above.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"the weight is {_kind(weight)}: only a floating tensor is quantized.")
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight is empty or holds a number that is not finite.")
    codes = torch.arange(128) if codes is None else codes
    if not _holds_integers(codes):
        raise TypeError(f"the codes are {_kind(codes)}: they must be a tensor of integers.")
    ascending = codes.ndim == 1 and len(codes) > 1 and bool((codes[1:] > codes[:-1]).all())
    if not ascending or int(codes[0]) != 0 or int(codes[-1]) > 127:
        raise ValueError("the codes must ascend from 0 to at most 127, 7 bits, and be two or more.")

    magnitude = weight.detach().double().abs().flatten()
    largest = float(magnitude.max())
    if largest == 0:
        return Quantized(torch.zeros_like(weight, dtype=torch.int8), 1.0, 0.0, 0.0)
    if not 1e-250 <= largest <= 1e150:
        raise ValueError(
            f"the weight's largest magnitude is {largest:g}, and float64 does not hold the squares "
            "of such numbers: multiply the weight by a constant that brings it to about 1."
        )
    magnitude /= largest  # so that no square underflows or overflows
    scale, codes = best_scales(magnitude[None], codes), codes.to(magnitude)
    nearest = codes[torch.bucketize(magnitude, scale * (codes[:-1] + codes[1:]) / 2, right=True)]
    quantized = (nearest.reshape(weight.shape) * torch.sign(weight.detach())).to(torch.int8)
    squared = float((nearest * scale - magnitude).square().sum())
    relative_error = (squared / float(magnitude.square().sum())) ** 0.5
    mean = squared * largest**2 / len(magnitude)
    return Quantized(quantized, float(scale) * largest, mean, relative_error)


def best_scales(
    magnitudes: Tensor, codes: Tensor, candidates: tuple[int, int] = CANDIDATES
) -> Tensor:
    """The scale of least squared error for each row, when each magnitude takes its nearest code.

    It is searched between the two beyond which it cannot lie, then around the best. Lastly it is
    refined: with the codes held fixed the best scale has a closed form.

    `magnitudes` are float64 (rows, K) in 0..1; a row of zeros has the scale 1. `codes` ascend from
    0. `candidates` are how many scales are tried over the whole range, and then around the best.
    """
    # Sorted once, so that a candidate's error is look-ups of prefix sums at the few midpoints.
    ordered, codes = magnitudes.sort(1).values, codes.to(magnitudes)
    midpoints, K = (codes[:-1] + codes[1:]) / 2, ordered.shape[1]
    first_power = nn.functional.pad(ordered.cumsum(1), (1, 0))
    total = (ordered * ordered).sum(1, keepdim=True)

    def moments(scales: Tensor) -> tuple[Tensor, Tensor]:
        """<magnitude, code> and <code, code> for each row's scales (rows, scales)."""
        # A magnitude at the midpoint goes up.
        cuts = torch.searchsorted(ordered, (scales[..., None] * midpoints).flatten(1))
        sums, counts = first_power[:, -1:] - first_power.gather(1, cuts), (K - cuts).double()
        # Passing a midpoint raises the code, and its square, by a step.
        shape = (*scales.shape, len(midpoints))
        return sums.view(shape) @ codes.diff(), counts.view(shape) @ (codes * codes).diff()

    def errors(scales: Tensor) -> Tensor:
        with_code, of_code = moments(scales)
        return total - 2 * scales * with_code + scales * scales * of_code

    # Too large a scale: every magnitude is nearest to 0. Too small: with the last code below half
    # the median of those that are not zero, half of them or more are clipped, each by more than
    # any other can be rounded by, and all together gain by a larger scale.
    zeros = (ordered == 0).sum(1, keepdim=True)
    median = ordered.gather(1, ((zeros + K) // 2).clamp(max=K - 1))
    low, high = (median / 2 / codes[-1]).clamp_min(1e-30), (2 / codes[1]).expand_as(median)
    for count in candidates:
        steps = torch.linspace(0, 1, count, dtype=ordered.dtype, device=ordered.device)
        scales = low * (high / low) ** steps
        best = errors(scales).argmin(1, keepdim=True)
        scale = scales.gather(1, best)
        low = scales.gather(1, (best - 1).clamp(min=0))
        high = scales.gather(1, (best + 1).clamp(max=count - 1))
    for _ in range(50):
        with_code, of_code = moments(scale)
        better = with_code / of_code.clamp_min(1)
        gains = errors(better) < errors(scale)
        if not bool(gains.any()):
            break
        scale = torch.where(gains, better, scale)
    return torch.where(zeros < K, scale, 1.0).flatten()


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _holds_integers(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype != torch.bool and torch.can_cast(x.dtype, torch.long)


def _non_negative_integers(x: Tensor) -> Tensor:
    """x as int64, whose shifts and look-ups every device has for every integer dtype."""
    if not _holds_integers(x):
        raise TypeError(f"x is {_kind(x)}: a Fibonacci code is asked of a tensor of integers.")
    wide = x.long()
    if wide.numel() and int(wide.min()) < 0:
        raise ValueError(f"x holds {int(wide.min())}: give magnitudes, see to_sign_magnitude.")
    return wide
