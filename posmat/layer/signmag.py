"""Sign and magnitude: int8 numbers as a sign in -1, 0, +1 and a magnitude in 0..128."""

from typing import NamedTuple

import torch
from torch import Tensor


class SignMagnitude(NamedTuple):
    """An int8 tensor split in two, each part with the shape of the whole."""

    sign: Tensor  # int8, -1, 0 or +1 as `torch.sign` gives it
    magnitude: Tensor  # uint8, 0..128


def to_sign_magnitude(x: Tensor) -> SignMagnitude:
    """Split an int8 tensor into its signs and its magnitudes.

    The magnitude of -128 is 128, which int8 cannot hold: `torch.abs` wraps it back to -128. The
    bits it leaves, 1000_0000, are right all the same, and read as uint8 they say 128.

    Raises:
        TypeError: x is not int8.
    """
    if x.dtype != torch.int8:
        raise TypeError(f"x is {x.dtype}: a sign and a magnitude are taken of torch.int8.")
    return SignMagnitude(torch.sign(x), x.abs().view(torch.uint8))


def as_sign_magnitude(w: Tensor | SignMagnitude) -> SignMagnitude:
    """The signs and magnitudes of weights: split here, or split before and looked at.

    Raises:
        TypeError: w is not int8, or its parts are not int8 and uint8.
        ValueError: the parts differ in shape or device.
    """
    if not isinstance(w, SignMagnitude):
        return to_sign_magnitude(w)
    sign, magnitude = w
    if sign.dtype != torch.int8 or magnitude.dtype != torch.uint8:
        # int8 holds the magnitude of -128 as -128: read as a number it changes the sign.
        raise TypeError(
            f"sign is {sign.dtype} and magnitude is {magnitude.dtype}: "
            "they must be torch.int8 and torch.uint8, as to_sign_magnitude gives them."
        )
    if sign.shape != magnitude.shape or sign.device != magnitude.device:
        raise ValueError(
            f"sign has shape {tuple(sign.shape)} on {sign.device} and magnitude has shape "
            f"{tuple(magnitude.shape)} on {magnitude.device}: they must be of one tensor."
        )
    return w
