"""How a multiplier becomes int8 GEMMs: by a closed form, or by the factors of its table."""

from typing import NamedTuple

import numpy as np

from posmat.multipliers.factors import DIGIT_BASE, Factorization, digits

CODES = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)  # the int8 of each byte
SIGNS = np.where(CODES < 0, -1, 1)  # that of 0 is plus, as a sign bit has it


class BitTerm(NamedTuple):
    """A function of an input's magnitude: a & (a << s) for every s of `shifts`, & `mask`.

    Its value is made of bits of a, so it is never more than a. With a shift it never has the lowest
    set bit of a: the row below has a zero there.
    """

    shifts: tuple[int, ...] = ()
    mask: int = 0xFF

    def values(self, magnitude: np.ndarray) -> np.ndarray:
        result = magnitude & self.mask
        for shift in self.shifts:
            result = result & (magnitude << shift)
        return result


class ClosedForm(NamedTuple):
    """m(w, x) = linear(w) · x + sum of coefficient(w) · term(x), for magnitudes 0..128."""

    linear: np.ndarray  # (129,) integers
    terms: tuple[tuple[np.ndarray, BitTerm], ...] = ()  # coefficients (129,), and of what

    def error_factors(self) -> Factorization:
        """The factors of m(w, x) - w · x, of which none is 0."""
        magnitude = np.arange(129)
        pairs = [(self.linear - magnitude, magnitude)]
        pairs += [(coefficient, term.values(magnitude)) for coefficient, term in self.terms]
        pairs = np.array([pair for pair in pairs if pair[0].any()], np.int64).reshape(-1, 2, 129)
        return Factorization(pairs[:, 0].T, pairs[:, 1])


class Gemm(NamedTuple):
    """int8 functions of weight and input by whose products a multiplier is a sum of GEMMs.

    Each table is indexed by the byte of an int8 operand, signs included.

    linear: (256,) the weight's factor of the input itself, or None.
    bit_terms: (weight's factors (256,), the term, whether the input's factor is x - s·term(|x|),
        which is x ^ term(|x|), rather than s·term(|x|)).
    columns: scale -> (weight's factors (256, c), input's factors (256, c)).
    """

    linear: np.ndarray | None
    bit_terms: tuple[tuple[np.ndarray, BitTerm, bool], ...]
    columns: dict[int, tuple[np.ndarray, np.ndarray]]

    @property
    def count(self) -> int:
        """How many int8 GEMMs of the layer's size the product takes."""
        wide = sum(weights.shape[1] for weights, _ in self.columns.values())
        return (self.linear is not None) + len(self.bit_terms) + wide


def gemm_of_closed_form(form: ClosedForm) -> Gemm:
    """The closed form with the cheaper input factor for each term, where the weights leave room.

    c · s·term(|x|) is also c · x - c · (x ^ term(|x|)), for a term without the lowest set bit: the
    XOR clears bits of a non-negative x, and of a negative x = ~(|x| - 1), whose bits above the
    lowest set one of |x| are its complement, sets the same ones. That saves applying the sign.
    """
    linear, bit_terms = form.linear, []
    for coefficient, term in form.terms:
        moved = linear + coefficient
        xor = bool(term.shifts) and np.abs(moved[:128]).max() <= 127 and abs(moved[128]) <= 128
        linear = moved if xor else linear
        bit_terms.append((_signed_int8(-coefficient if xor else coefficient), term, xor))
    return Gemm(_signed_int8(linear) if linear.any() else None, tuple(bit_terms), {})


def gemm_of_factors(found: Factorization, convention: str, linear: bool) -> Gemm:
    """Each factor split into int8 digits; digits' products of one scale stand together.

    linear: whether the factors are those of the error, beside which the true product stands.
    """

    def by_byte(factor: np.ndarray) -> list[np.ndarray]:
        if convention == "signed":
            return digits(np.pad(factor, 128 - len(factor) // 2)[CODES + 128])
        return digits(SIGNS * np.pad(factor, (0, 129 - len(factor)))[np.abs(CODES)])

    columns: dict[int, tuple[list, list]] = {}
    for a, b in zip(found.weight_factor.T, found.input_factor, strict=True):
        for i, weights in enumerate(by_byte(a)):
            for j, inputs in enumerate(by_byte(b)):
                left, right = columns.setdefault(DIGIT_BASE ** (i + j), ([], []))
                left.append(weights)
                right.append(inputs)
    stacked = {scale: tuple(np.stack(f, axis=1) for f in pair) for scale, pair in columns.items()}
    return Gemm(CODES.astype(np.int8) if linear else None, (), stacked)


def _signed_int8(by_magnitude: np.ndarray) -> np.ndarray:
    """A function of 129 magnitudes as one of 256 int8 bytes, with the operand's sign."""
    signed = SIGNS * by_magnitude[np.abs(CODES)]
    if signed.min() < -128 or signed.max() > 127:
        raise AssertionError("a factor beyond int8 was not split")
    return signed.astype(np.int8)
