"""The problem: how large a fully connected layer is, and operands to multiply.

In the GEMM's letters Y = X Wᵀ, with X (M, K), W (N, K) and Y (M, N); in PyTorch's words M is
`batch_size`, N is `out_features` and K is `in_features`, the inner dimension.
"""

import operator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from posmat.machine import require_device


class NotAvailable(RuntimeError):
    """What a method needs is not on this machine: the message says what, and what to do."""


@dataclass(frozen=True)
class ProblemSize:
    """The three sizes of a fully connected layer's product: any integers, kept as int.

    Raises:
        ValueError: a size is not a whole number above 0.
    """

    batch_size: int  # M, the rows of X
    out_features: int  # N, the rows of W
    in_features: int  # K, the inner dimension

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                whole = 0 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                whole = 0
            if whole < 1:
                raise ValueError(f"{field.name}={value!r} is no size: give a whole number above 0.")
            object.__setattr__(self, field.name, whole)

    @property
    def partial_products(self) -> int:
        """M·N·K: one w[n, k] · x[m, k] for every output and every inner index."""
        return self.batch_size * self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """2·M·N·K: one multiplication and one addition for each partial product."""
        return 2 * self.partial_products


def random_operands(
    size: ProblemSize,
    dtype: torch.dtype = torch.int8,
    device: torch.device | str = "cpu",
    seed: int = 0,
    low: int = -127,
    high: int = 127,
) -> tuple[Tensor, Tensor]:
    """Draw X (M, K) and W (N, K), for one seed the same numbers on every device.

    They are drawn on the CPU and then moved, because each kind of device has its own generator: of
    an integer dtype uniformly from `low`..`high`, *both* ends included, of a floating one from the
    standard normal distribution.

    Raises:
        ValueError: the range is empty or does not fit the dtype, or the device is not there.
    """
    device = require_device(device)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, size.in_features) for rows in (size.batch_size, size.out_features)]
    if dtype.is_floating_point:
        drawn = [torch.randn(s, dtype=dtype, generator=generator) for s in shapes]
    else:
        limits = torch.iinfo(dtype)
        if not limits.min <= low <= high <= limits.max:
            raise ValueError(
                f"the range {low}..{high} is not one that {dtype} can hold: give low <= high "
                f"within {limits.min}..{limits.max}."
            )
        drawn = [torch.randint(low, high + 1, s, dtype=dtype, generator=generator) for s in shapes]
    X, W = (operand.to(device) for operand in drawn)
    return X, W


def check_operands(x: Tensor, w: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.int8,)) -> None:
    """Refuse operands that are not X (M, K) and W (N, K) of one of `dtypes`, on one device.

    Raises:
        TypeError: a dtype is not among `dtypes`, or the two differ.
        ValueError: an operand is not a matrix, the inner dimensions differ, or the devices do.
    """
    if x.dtype not in dtypes or w.dtype != x.dtype:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(
            f"x is {x.dtype} and w is {w.dtype}: both operands must be {wanted}. "
            "Convert them, knowing what the conversion loses."
        )
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and w has shape {tuple(w.shape)}: both must be matrices "
            "with the same inner dimension, x (batch_size, in_features) and w (out_features, "
            "in_features)."
        )
    if x.device != w.device:
        raise ValueError(f"x is on {x.device} and w on {w.device}: move one of them to the other.")
