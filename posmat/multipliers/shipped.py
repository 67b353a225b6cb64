"""The multipliers that are known by name.

Their first operand, the weight, chooses with its bits b_i the rows
pp_i = b_i · (input << i) that are summed:

    exact        the plain sum
    or_pairs     neighbouring rows OR-ed: (pp0 | pp1) + (pp2 | pp3) + (pp4 | pp5) + (pp6 | pp7)
    xor_pairs    neighbouring rows XOR-ed
    or_fours     four rows OR-ed: (pp0 | .. | pp3) + (pp4 | .. | pp7)
    kulkarni     built of 2 x 2 bit blocks that say 3 · 3 = 7
    truncated    both operands without their two lowest bits
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np

from posmat.multipliers.gemms import BitTerm, ClosedForm
from posmat.multipliers.table import Multiplier, require_known


def multiplier_names() -> tuple[str, ...]:
    """The names of the shipped multipliers, which serve wherever a multiplier is asked for."""
    return tuple(_SHIPPED)


def find_multiplier(multiplier: str | Multiplier) -> Multiplier:
    """The shipped multiplier of a name, or a ValueError; a Multiplier as is; else a TypeError."""
    if isinstance(multiplier, Multiplier):
        return multiplier
    if not isinstance(multiplier, str):
        raise TypeError(f"{type(multiplier).__name__} is not a multiplier, nor the name of one.")
    require_known("multiplier", multiplier, _SHIPPED)
    return _shipped(multiplier)


def _merged_rows(group: int, merge: np.ufunc) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The multiplier that merges its eight rows in groups, and sums the groups."""

    def multiply(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
        rows = np.array([(weight >> i & 1) * (data << i) for i in range(8)])
        return sum(merge.reduce(rows[i : i + group]) for i in range(0, 8, group))

    return multiply


def _kulkarni(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Two-bit blocks multiplied each with each; 3 · 3 = 7, so that a block's product has 3 bits."""
    total = np.zeros_like(weight)
    for i, j in product(range(0, 8, 2), repeat=2):
        a, b = weight >> i & 3, data >> j & 3
        total += np.where((a == 3) & (b == 3), 7, a * b) << (i + j)
    return total


def _or_terms(group: int) -> list[tuple[np.ndarray, BitTerm]]:
    """The error of OR-ing rows in groups, by inclusion and exclusion.

    An OR of rows is their sum, less what any two have in common, plus what any three have, less
    what four have. Rows i and i + d have in common b_i b_(i+d) · (a & a << d) << i: sets of rows
    with the same distances share one function of the input.
    """
    coefficients: dict[tuple[int, ...], np.ndarray] = {}
    for start in range(0, 8, group):
        for count in range(2, group + 1):
            for rows in combinations(range(start, start + group), count):
                chosen = np.prod([_WEIGHT >> i & 1 for i in rows], axis=0) << rows[0]
                distances = tuple(i - rows[0] for i in rows[1:])
                sign = 1 if count % 2 else -1
                coefficients[distances] = coefficients.get(distances, 0) + sign * chosen
    return [(c, BitTerm(distances)) for distances, c in coefficients.items()]


_WEIGHT = np.arange(129)
_PAIRS = _WEIGHT & _WEIGHT >> 1 & 0x55  # the pairs of rows that a weight chooses both of
_CUT = _WEIGHT & ~3

# name -> (definition, and of its closed form the linear coefficient and the terms)
_SHIPPED: dict[str, tuple[Callable, np.ndarray, list[tuple[np.ndarray, BitTerm]]]] = {
    "exact": (np.multiply, _WEIGHT, []),
    "or_pairs": (_merged_rows(2, np.bitwise_or), _WEIGHT, _or_terms(2)),
    "xor_pairs": (_merged_rows(2, np.bitwise_xor), _WEIGHT, [(-2 * _PAIRS, BitTerm((1,)))]),
    "or_fours": (_merged_rows(4, np.bitwise_or), _WEIGHT, _or_terms(4)),
    # The inputs' pairs, twice: x & (x << 1) & 0b10101010
    "kulkarni": (_kulkarni, _WEIGHT, [(-_PAIRS, BitTerm((1,), 0xAA))]),
    "truncated": (lambda w, x: (w & ~3) * (x & ~3), 0 * _WEIGHT, [(_CUT, BitTerm((), 0xFC))]),
}


@cache
def _shipped(name: str) -> Multiplier:
    definition, linear, terms = _SHIPPED[name]
    found = Multiplier.from_function(definition, name, "unsigned")
    return replace(found, closed_form=ClosedForm(linear, tuple(terms)))
