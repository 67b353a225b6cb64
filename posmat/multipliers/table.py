"""Inexact multipliers as objects: definition, table, error, and when they are exact.

A hardware multiplier of two 8-bit numbers is a table of 65,536 products. Small ones are cheap
because some products are wrong; whatever their circuit, all that a matrix product feels of them is
the table, always `table[weight, input]`, and its error, table minus the true product.

Six are known by name. Their first operand, the weight, chooses with its bits b_i the rows
pp_i = b_i · (input << i) that are summed:

    exact        the plain sum
    or_pairs     neighbouring rows OR-ed: (pp0 | pp1) + (pp2 | pp3) + (pp4 | pp5) + (pp6 | pp7)
    xor_pairs    neighbouring rows XOR-ed
    or_fours     four rows OR-ed: (pp0 | .. | pp3) + (pp4 | .. | pp7)
    kulkarni     built of 2 x 2 bit blocks that say 3 · 3 = 7
    truncated    both operands without their two lowest bits
"""

import difflib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posmat.multipliers.factors import Factorization, factorize, modular_rank
from posmat.multipliers.gemms import (
    CODES,
    BitTerm,
    ClosedForm,
    Gemm,
    gemm_of_closed_form,
    gemm_of_factors,
)

CONVENTIONS = ("sign-magnitude", "unsigned", "signed")
MANY_TERMS = 4  # more functions of bits than that are looked up together in less time


class ErrorStatistics(NamedTuple):
    """What a multiplier's error is over a set of operand pairs, each pair counted once."""

    pairs: int
    probability: float  # the share of pairs with a wrong product
    mean: float  # of the error's absolute value
    max: int  # of the same
    bias: float  # the mean of the error itself
    mean_relative: float  # the mean of |error / true product| where the true product is not 0


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A multiplier of a weight and an input, known by its table.

    Use `Multiplier.from_function`, `Multiplier.from_table`, or a name (`find_multiplier`). Its
    convention says how operands index the table:

    'sign-magnitude': magnitudes from 0 on; the product has the sign of the operands' product. 128
        rows hold weights -127..127, 129 and more hold -128 too; so do columns the inputs.
    'unsigned': 256 x 256, a circuit for 0..255, used on magnitudes with the sign restored.
    'signed': 256 x 256 over -128..127 in this order, taken as it is.
    """

    name: str
    convention: str
    table: np.ndarray  # int32, table[weight, input], read-only
    closed_form: ClosedForm | None = field(default=None, repr=False)

    @classmethod
    def from_function(
        cls,
        f: Callable[[np.ndarray, np.ndarray], Any],
        name: str | None = None,
        convention: str = "sign-magnitude",
    ) -> "Multiplier":
        """The multiplier that a function defines, called once: f(weight, input).

        Both arguments are int64 arrays of one shape, with every pair of operands in them:
        magnitudes 0..128 by default, 0..255 if 'unsigned', -128..127 if 'signed'. f returns whole
        numbers in the same shape. What is not callable is a TypeError; see also `from_table`.
        """
        if not callable(f):
            raise TypeError(f"{f!r} is not callable: give a function f(weight, input).")
        _require_known("convention", convention, CONVENTIONS)
        size = 129 if convention == "sign-magnitude" else 256
        operands = np.arange(size, dtype=np.int64) - (128 if convention == "signed" else 0)
        weight, data = np.meshgrid(operands, operands, indexing="ij")
        table = f(weight, data)
        if np.shape(table) != weight.shape:
            raise ValueError(
                f"f gave shape {np.shape(table)} for operands of shape {weight.shape}: it is "
                "called with arrays, and must return one product for each pair."
            )
        return cls.from_table(table, name or getattr(f, "__name__", "function"), convention)

    @classmethod
    def from_table(
        cls, table: Any, name: str | None = None, convention: str | None = None
    ) -> "Multiplier":
        """The multiplier of a table[weight, input].

        Args:
            table: a matrix of whole numbers, or the path of an .npy or .csv file with one.
            name: what to call it; by default the file's name without its ending.
            convention: it must be said, because the shape does not say it.

        Raises:
            OSError: the file cannot be read.
            TypeError: the table does not hold numbers.
            ValueError: the file holds no table; shape, convention or a cell, which is named, are
                not admitted.
        """
        _require_known("convention", convention, CONVENTIONS)
        if isinstance(table, str | os.PathLike):
            name, table = name or Path(table).stem, _read_table(Path(table))
        name = name or "table"
        return cls(name, convention, _checked_table(table, convention, name))

    def __repr__(self) -> str:
        rows, columns = self.table.shape
        return f"Multiplier({self.name!r}, {self.convention!r}, {rows} x {columns})"

    @property
    def weights(self) -> np.ndarray:
        """The operand of each row of the table."""
        return np.arange(self.table.shape[0]) - (128 if self.convention == "signed" else 0)

    @property
    def inputs(self) -> np.ndarray:
        """The operand of each column of the table."""
        return np.arange(self.table.shape[1]) - (128 if self.convention == "signed" else 0)

    @cached_property
    def error(self) -> np.ndarray:
        """The table minus the true products, int64, in the shape of the table."""
        return self.table.astype(np.int64) - np.outer(self.weights, self.inputs)

    def statistics(
        self, weights: np.ndarray | None = None, inputs: np.ndarray | None = None
    ) -> ErrorStatistics:
        """The error over all pairs of operands, as they index the table; by default over the whole.

        Raises:
            ValueError: an operand is not in the table, or there are none.
        """
        rows, columns = self._index(0, weights), self._index(1, inputs)
        error = self.error[np.ix_(rows, columns)]
        true = np.outer(self.weights[rows], self.inputs[columns])
        if error.size == 0:
            raise ValueError("there are no operand pairs: give at least one weight and one input.")
        size, meant = np.abs(error), true != 0
        relative = size[meant] / np.abs(true[meant])
        return ErrorStatistics(
            pairs=error.size,
            probability=float((error != 0).mean()),
            mean=float(size.mean()),
            max=int(size.max()),
            bias=float(error.mean()),
            mean_relative=float(relative.mean()) if relative.size else 0.0,
        )

    def exact_when(self) -> dict[str, dict[str, bool]]:
        """By exhaustive check: is every product exact when the named operand is of a kind?

        Kinds: 'Fibonacci code' (no two adjacent ones in the magnitude) and 'power of two' (0 too).
        Which operand: 'weight', 'input', 'either' (one of them is enough) and 'both' (it takes
        both).
        """
        answer, w, x = {}, np.abs(self.weights), np.abs(self.inputs)
        for kind, rows, columns in (
            ("Fibonacci code", (w & w >> 1) == 0, (x & x >> 1) == 0),
            ("power of two", (w & w - 1) == 0, (x & x - 1) == 0),
        ):
            by_weight, by_input = not self.error[rows].any(), not self.error[:, columns].any()
            by_both = not self.error[np.ix_(rows, columns)].any()
            answer[kind] = {"weight": by_weight, "input": by_input}
            answer[kind] |= {"either": by_weight and by_input, "both": by_both}
        return answer

    @cached_property
    def operand_table(self) -> np.ndarray:
        """The products of int8 operands, signs applied: int64 (256, 256) by the operands' bytes.

        Cells of an operand that is not admitted (`admits`) are 0.
        """
        if self.convention == "signed":
            return self.table[np.ix_(CODES + 128, CODES + 128)].astype(np.int64)
        magnitude, sign = np.abs(CODES), np.sign(CODES)
        rows, columns = (np.minimum(magnitude, size - 1) for size in self.table.shape)
        products = self.table[np.ix_(rows, columns)] * np.outer(sign, sign)
        return products * np.outer(magnitude == rows, magnitude == columns)

    @property
    def admits(self) -> tuple[bool, bool]:
        """Whether a weight, and whether an input, of -128 has a place in the table."""
        rows, columns = self.table.shape
        return rows > 128, columns > 128

    @cached_property
    def exact_weights(self) -> np.ndarray:
        """(256,) bool by the weight's byte: is its product exact with every admitted input?"""
        weights, inputs = (admits | (CODES > -128) for admits in self.admits)
        wrong = self.operand_table != np.outer(CODES, CODES)
        return weights & ~wrong[:, inputs].any(axis=1)

    @cached_property
    def largest_product(self) -> int:
        """The largest absolute value of a product of admitted int8 operands."""
        return int(np.abs(self.operand_table).max())

    @cached_property
    def rank_bound(self) -> int:
        """The rank of the error modulo a prime: at most the rank, found without factorizing."""
        return modular_rank(self._int8_part(self.error))

    @property
    def rank(self) -> int:
        """The exact rank of the error over the operands of int8, proved by its factorization."""
        return self.factorization.rank

    @cached_property
    def factorization(self) -> Factorization:
        """Integer factors of the error over the operands of int8, verified cell by cell.

        Over magnitudes 0..128 (or 0..127 where the table ends there), or over -128..127 if the
        convention is 'signed'.
        """
        error = self._int8_part(self.error)
        if self.closed_form is None:
            return factorize(error)
        found = self.closed_form.error_factors()
        found.verify(error)
        return found

    @cached_property
    def gemm(self) -> Gemm:
        """The multiplier as a sum of int8 products, by the fewest that are known.

        From the closed form; from the true product and the factors of the error; or from the
        factors of the products themselves.
        """
        form = self.closed_form
        if form is not None and len(form.terms) <= MANY_TERMS:
            return gemm_of_closed_form(form)
        found = gemm_of_factors(self.factorization, self.convention, linear=True)
        products = self._int8_part(self.table)
        if form is None and modular_rank(products) <= self.rank:
            other = gemm_of_factors(factorize(products), self.convention, linear=False)
            return min(found, other, key=lambda gemm: gemm.count)
        return found

    def _int8_part(self, table: np.ndarray) -> np.ndarray:
        """The rows and the columns that an int8 operand can meet."""
        return table if self.convention == "signed" else table[:129, :129]

    def _index(self, axis: int, operands: np.ndarray | None) -> np.ndarray:
        known = (self.weights, self.inputs)[axis]
        operands = known if operands is None else np.asarray(operands).reshape(-1)
        outside = operands[~np.isin(operands, known)]
        if len(outside):
            raise ValueError(
                f"{('weight', 'input')[axis]} {outside[0]} is not in the table of {self.name!r}, "
                f"which has {known[0]}..{known[-1]}."
            )
        return (operands - known[0]).astype(np.int64)


def multiplier_names() -> tuple[str, ...]:
    """The names of the shipped multipliers, which serve wherever a multiplier is asked for."""
    return tuple(_SHIPPED)


def find_multiplier(multiplier: str | Multiplier) -> Multiplier:
    """The shipped multiplier of that name; a Multiplier is given back as it is.

    Raises:
        ValueError: there is none of that name.
        TypeError: neither a name nor a Multiplier.
    """
    if isinstance(multiplier, Multiplier):
        return multiplier
    if not isinstance(multiplier, str):
        raise TypeError(
            f"{type(multiplier).__name__} is not a multiplier: give a Multiplier or one of the "
            f"names {', '.join(_SHIPPED)}."
        )
    _require_known("multiplier", multiplier, _SHIPPED)
    return _shipped(multiplier)


def _require_known(kind: str, word: str | None, known: Collection[str]) -> None:
    if word not in known:
        close = difflib.get_close_matches(str(word), known, n=2, cutoff=0.5)
        near = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"there is no {kind} {word!r}{near} The {kind}s are {', '.join(known)}.")


def _read_table(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        return np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except ValueError as problem:
        raise ValueError(
            f"{path} does not hold a table of numbers ({problem}): save the one table with "
            "numpy.save, or as lines of numbers with commas between."
        ) from None


def _checked_table(table: Any, convention: str, name: str) -> np.ndarray:
    """The table as a read-only int32 array of its own, if it is one of that convention."""
    named, signed = f"the table of {name!r}", convention == "signed"
    if np.ma.is_masked(table):
        i = ", ".join(map(str, np.argwhere(np.ma.getmaskarray(table))[0]))
        raise ValueError(f"{named} is masked in cell [{i}]: fill what is masked with products.")
    try:
        table = np.asarray(table)
    except ValueError:
        raise ValueError(
            f"{named} has rows of different lengths: it must be a matrix, table[weight, input]."
        ) from None
    if table.dtype.kind not in "iuf":
        raise TypeError(f"{named} holds {table.dtype}: it must hold whole numbers.")
    if table.dtype.kind == "f":  # float32 takes the limit of 32 bits for 2**31
        table = table.astype(np.promote_types(table.dtype, np.float64))
    fits, wanted = table.shape == (256, 256), "256 x 256"
    if convention == "sign-magnitude":
        fits = table.ndim == 2 and all(128 <= size <= 256 for size in table.shape)
        wanted = "128 x 128, or 129 and up to 256 where an operand of -128 is admitted"
    if not fits:
        raise ValueError(
            f"{named} has shape {table.shape}: for convention {convention!r} it must be {wanted}, "
            "table[weight, input]."
        )
    first = -128 if signed else 0
    by_zero = np.outer(*(np.arange(size) + first for size in table.shape)) == 0
    for bad, why in (
        (~(np.floor(table) == table), "it must be a whole number"),
        ((table < -(2**31)) | (table > 2**31 - 1), "it must fit 32 bits"),
        (by_zero & (table != 0) & (not signed), "a product with 0 has no sign and must be 0"),
    ):
        if bad.any():
            i, j = map(int, np.argwhere(bad)[0])
            raise ValueError(
                f"{named} says {table[i, j]} for weight {i + first} and input {j + first} "
                f"(row {i}, column {j}): {why} ({bad.sum()} such cells)."
            )
    own = table.astype(np.int32)
    own.setflags(write=False)
    return own


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


def _truncated(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    return (weight & ~3) * (data & ~3)


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

# name -> (definition, and of its closed form the linear coefficient and the terms)
_SHIPPED: dict[str, tuple[Callable, np.ndarray, list[tuple[np.ndarray, BitTerm]]]] = {
    "exact": (np.multiply, _WEIGHT, []),
    "or_pairs": (_merged_rows(2, np.bitwise_or), _WEIGHT, _or_terms(2)),
    "xor_pairs": (_merged_rows(2, np.bitwise_xor), _WEIGHT, [(-2 * _PAIRS, BitTerm((1,)))]),
    "or_fours": (_merged_rows(4, np.bitwise_or), _WEIGHT, _or_terms(4)),
    # The inputs' pairs, twice: x & (x << 1) & 0b10101010
    "kulkarni": (_kulkarni, _WEIGHT, [(-_PAIRS, BitTerm((1,), 0xAA))]),
    "truncated": (_truncated, 0 * _WEIGHT, [(_WEIGHT & ~3, BitTerm((), 0xFC))]),
}


@cache
def _shipped(name: str) -> Multiplier:
    definition, linear, terms = _SHIPPED[name]
    found = Multiplier.from_function(definition, name, "unsigned")
    return replace(found, closed_form=ClosedForm(linear, tuple(terms)))
