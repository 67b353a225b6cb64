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
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posmat.multipliers.factors import DIGIT_BASE, Factorization, digits, factorize, modular_rank

CONVENTIONS = ("sign-magnitude", "unsigned", "signed")
MANY_TERMS = 4  # more functions of bits than that are looked up together in less time
CODES = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)  # the int8 of each byte


class ErrorStatistics(NamedTuple):
    """What a multiplier's error is over a set of operand pairs, each pair counted once.

    pairs: how many pairs.
    probability: the share of pairs with a wrong product.
    mean, max: of the error's absolute value.
    bias: the mean of the error itself, product minus true product.
    mean_relative: the mean of |error / true product| where the true product is not 0.
    """

    pairs: int
    probability: float
    mean: float
    max: int
    bias: float
    mean_relative: float


class BitTerm(NamedTuple):
    """A function of an input's magnitude: a & (a << s) for every s of `shifts`, & `mask`.

    Its value is made of bits of a, so it is never more than a. With a shift it never has the lowest
    set bit of a: the row below has a zero there.
    """

    shifts: tuple[int, ...] = ()
    mask: int = 0xFF

    def values(self, magnitude: np.ndarray) -> np.ndarray:
        """The function of each magnitude."""
        result = magnitude & self.mask
        for shift in self.shifts:
            result = result & (magnitude << shift)
        return result


class ClosedForm(NamedTuple):
    """m(w, x) = linear(w) · x + sum of coefficient(w) · term(x), for magnitudes 0..128.

    linear: (129,) integers.
    terms: pairs of coefficients (129,) and a BitTerm.
    """

    linear: np.ndarray
    terms: tuple[tuple[np.ndarray, BitTerm], ...]


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


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A multiplier of a weight and an input, known by its table.

    Use `Multiplier.from_function`, `Multiplier.from_table`, or a name (`find_multiplier`).

    name: what to call it.
    convention: how operands index the table.
        'sign-magnitude': magnitudes from 0 on; the product has the sign of the operands' product.
            128 rows hold weights -127..127, 129 and more hold -128 too; so do columns the inputs.
        'unsigned': 256 x 256, a circuit for 0..255, used on magnitudes with the sign restored.
        'signed': 256 x 256 over -128..127 in this order, taken as it is.
    table: int32, table[weight, input], read-only.
    """

    name: str
    convention: str
    table: np.ndarray
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
        numbers in the same shape.

        Raises:
            TypeError: f is not callable.
            ValueError: see `from_table`.
        """
        if not callable(f):
            raise TypeError(f"{f!r} is not callable: give a function f(weight, input).")
        size = 129 if _checked_convention(convention) == "sign-magnitude" else 256
        operands = np.arange(size, dtype=np.int64) - (128 if convention == "signed" else 0)
        weight, data = np.meshgrid(operands, operands, indexing="ij")
        name = name or getattr(f, "__name__", "function")
        table = _as_array(f(weight, data), name)
        if table.shape != weight.shape:
            raise ValueError(
                f"f gave shape {table.shape} for operands of shape {weight.shape}: it is called "
                "with arrays, and must return one product for each pair."
            )
        return cls(name, convention, _checked_table(table, convention, name))

    @classmethod
    def from_table(
        cls,
        table: Any,
        name: str | None = None,
        convention: str | None = None,
    ) -> "Multiplier":
        """The multiplier of a table[weight, input], from an array or an .npy or .csv file.

        Args:
            table: a two-dimensional array of whole numbers, or the path of a file with one.
            name: what to call it; the default is the file's name without its ending.
            convention: 'sign-magnitude', 'unsigned' or 'signed'; it must be said, because the
                shape does not say it.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: the table does not hold numbers.
            ValueError: the file holds no table; shape, values or convention are not admitted. The
                first offending cell is named.
        """
        if convention is None:
            raise ValueError(f"convention= is not given: say which of {', '.join(CONVENTIONS)}.")
        _checked_convention(convention)
        if isinstance(table, str | os.PathLike):
            path = Path(table)
            name = name or path.stem
            table = _read_table(path)
        name = name or "table"
        return cls(name, convention, _checked_table(_as_array(table, name), convention, name))

    def __repr__(self) -> str:
        rows, columns = self.table.shape
        return f"Multiplier({self.name!r}, {self.convention!r}, {rows} x {columns})"

    @property
    def weights(self) -> np.ndarray:
        """The operand of each row of the table."""
        return self._operands(0)

    @property
    def inputs(self) -> np.ndarray:
        """The operand of each column of the table."""
        return self._operands(1)

    @cached_property
    def error(self) -> np.ndarray:
        """The table minus the true products, int64, in the shape of the table."""
        return self.table.astype(np.int64) - np.outer(self.weights, self.inputs)

    def statistics(
        self, weights: np.ndarray | None = None, inputs: np.ndarray | None = None
    ) -> ErrorStatistics:
        """The error over all pairs of `weights` and `inputs`; by default over the whole table.

        Args:
            weights, inputs: operands as they index the table, for example the Fibonacci codes or
                `range(128)`.

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
        Which operand: 'weight', 'input', 'either' (one of them is enough, whichever it is) and
        'both' (both of them are of the kind).
        """
        answer = {}
        for kind, belongs in (("Fibonacci code", _is_fibonacci), ("power of two", _is_power)):
            rows, columns = belongs(np.abs(self.weights)), belongs(np.abs(self.inputs))
            by_weight = not self.error[rows].any()
            by_input = not self.error[:, columns].any()
            answer[kind] = {
                "weight": by_weight,
                "input": by_input,
                "either": by_weight and by_input,
                "both": not self.error[np.ix_(rows, columns)].any(),
            }
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
        """For each byte of an int8 weight: is its product exact with every admitted input?"""
        weights, inputs = (CODES if admits else np.maximum(CODES, -127) for admits in self.admits)
        true = np.outer(weights, inputs)
        columns = np.flatnonzero(inputs == CODES)
        exact = (self.operand_table[:, columns] == true[:, columns]).all(axis=1)
        return exact & (weights == CODES)

    @cached_property
    def largest_product(self) -> int:
        """The largest absolute value of a product of admitted int8 operands."""
        return int(np.abs(self.operand_table).max())

    @property
    def rank_bound(self) -> int:
        """The rank of the error modulo a prime: at most the rank, found without factorizing."""
        if self.closed_form is not None:
            return self.factorization.rank
        return self._rank_bound

    @property
    def rank(self) -> int:
        """The exact rank of the error over the operands of int8, proved by its factorization."""
        return self.factorization.rank

    @cached_property
    def factorization(self) -> Factorization:
        """Integer factors of the error over the operands of int8, verified cell by cell.

        Over magnitudes 0..128 (or 0..127 where the table ends there), or over -128..127 if the
        convention is 'signed'. The shipped multipliers have theirs in closed form.
        """
        if self.closed_form is None:
            return factorize(self._int8_error)
        magnitude = np.arange(129)
        pairs = [(self.closed_form.linear - magnitude, magnitude)]
        pairs += [(c, term.values(magnitude)) for c, term in self.closed_form.terms]
        pairs = [(a, b) for a, b in pairs if a.any()]
        a = np.array([a for a, _ in pairs], np.int64).reshape(-1, 129).T
        b = np.array([b for _, b in pairs], np.int64).reshape(-1, 129)
        found = Factorization(a, b)
        found.verify(self._int8_error)
        return found

    @cached_property
    def gemm(self) -> Gemm:
        """The multiplier as a sum of int8 products, by the fewest that are known.

        From the closed form; or the true product and the factors of the error; or, where that
        takes fewer, the factors of the products themselves.
        """
        if self.closed_form is not None:
            if len(self.closed_form.terms) <= MANY_TERMS:
                return _gemm_of_closed_form(self.closed_form)
            return _gemm_of_factors(self.factorization, self.convention, linear=True)
        candidates = [_gemm_of_factors(self.factorization, self.convention, linear=True)]
        products = self._int8_error + np.outer(*self._int8_operands)
        if modular_rank(products) <= self.factorization.rank:
            candidates.append(_gemm_of_factors(factorize(products), self.convention, linear=False))
        return min(candidates, key=lambda gemm: gemm.count)

    @cached_property
    def _rank_bound(self) -> int:
        return modular_rank(self._int8_error)

    @property
    def _int8_operands(self) -> tuple[np.ndarray, np.ndarray]:
        """The operands of the rows and the columns that an int8 operand can meet."""
        if self.convention == "signed":
            return self.weights, self.inputs
        return self.weights[:129], self.inputs[:129]

    @property
    def _int8_error(self) -> np.ndarray:
        return self.error if self.convention == "signed" else self.error[:129, :129]

    def _operands(self, axis: int) -> np.ndarray:
        first = -128 if self.convention == "signed" else 0
        return np.arange(first, first + self.table.shape[axis])

    def _index(self, axis: int, operands: np.ndarray | None) -> np.ndarray:
        known = self._operands(axis)
        if operands is None:
            return np.arange(len(known))
        index = np.asarray(operands).reshape(-1) - known[0]
        outside = np.flatnonzero((index < 0) | (index >= len(known)))
        if len(outside):
            raise ValueError(
                f"{('weight', 'input')[axis]} {index[outside[0]] + known[0]} is not in the table "
                f"of {self.name!r}, which has {known[0]}..{known[-1]}."
            )
        return index.astype(np.int64)


def multiplier_names() -> tuple[str, ...]:
    """The names of the shipped multipliers, which serve wherever a multiplier is asked for."""
    return tuple(_SHIPPED)


def find_multiplier(multiplier: str | Multiplier) -> Multiplier:
    """The shipped multiplier of that name; a Multiplier is given back as it is.

    Raises:
        ValueError: there is none of that name; near names are suggested.
        TypeError: neither a name nor a Multiplier.
    """
    if isinstance(multiplier, Multiplier):
        return multiplier
    if not isinstance(multiplier, str):
        raise TypeError(
            f"{type(multiplier).__name__} is not a multiplier: give a Multiplier or one of the "
            f"names {', '.join(_SHIPPED)}."
        )
    if multiplier not in _SHIPPED:
        raise ValueError(
            f"there is no multiplier {multiplier!r}{_near(multiplier, _SHIPPED)}. "
            f"The names are {', '.join(_SHIPPED)}."
        )
    return _shipped(multiplier)


# --- what comes in is checked ---------------------------------------------------------------------


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f": did you mean {' or '.join(map(repr, close))}?" if close else ""


def _checked_convention(convention: str) -> str:
    if convention not in CONVENTIONS:
        raise ValueError(
            f"there is no convention {convention!r}{_near(str(convention), CONVENTIONS)}. "
            f"The conventions are {', '.join(CONVENTIONS)}."
        )
    return convention


def _read_table(path: Path) -> np.ndarray:
    if path.suffix.lower() not in (".npy", ".csv"):
        raise ValueError(f"{path} is neither an .npy nor a .csv file: save the table as one.")
    if not path.exists():
        raise FileNotFoundError(f"there is no table at {path}.")
    if not path.is_file() or path.stat().st_size == 0:
        kind = "a folder" if path.is_dir() else "an empty file"
        raise ValueError(f"{path} is {kind}: give a file with a table of numbers.")
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a file without numbers
            return np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except (ValueError, UserWarning) as problem:
        raise ValueError(
            f"{path} does not hold a table of numbers ({problem}): save the one table with "
            "numpy.save, or as lines of numbers with commas between."
        ) from None


def _as_array(table: Any, name: str) -> np.ndarray:
    if np.ma.is_masked(table):
        i = ", ".join(map(str, np.argwhere(np.ma.getmaskarray(table))[0]))
        raise ValueError(
            f"the table of {name!r} is masked in cell [{i}]: fill what is masked with products."
        )
    try:
        return np.asarray(table)
    except ValueError:
        raise ValueError(
            f"the table of {name!r} has rows of different lengths: it must be a matrix, "
            "table[weight, input]."
        ) from None


def _checked_table(table: np.ndarray, convention: str, name: str) -> np.ndarray:
    """The table as a read-only int32 array of its own, if it is one of that convention."""
    if table.dtype.kind not in "iuf":
        raise TypeError(f"the table of {name!r} holds {table.dtype}: it must hold whole numbers.")
    if table.dtype.kind == "f":  # float32 takes the limit of 32 bits for 2**31
        table = table.astype(np.promote_types(table.dtype, np.float64))
    if convention == "sign-magnitude":
        fits = table.ndim == 2 and all(128 <= size <= 256 for size in table.shape)
        wanted = "128 x 128, or 129 and up to 256 where an operand of -128 is admitted"
    else:
        fits, wanted = table.shape == (256, 256), "256 x 256"
    if not fits:
        raise ValueError(
            f"the table of {name!r} has shape {table.shape}: for convention {convention!r} it must "
            f"be {wanted}, table[weight, input]."
        )
    first = -128 if convention == "signed" else 0

    def refuse(bad: np.ndarray, why: str) -> None:
        cells = np.argwhere(bad)
        if len(cells):
            i, j = map(int, cells[0])
            raise ValueError(
                f"the table of {name!r} says {table[i, j]} for weight {i + first} and input "
                f"{j + first} (row {i}, column {j}): {why} ({len(cells)} such cells)."
            )

    if table.dtype.kind == "f":
        refuse(~np.isfinite(table) | (table != np.floor(table)), "it must be a whole number")
    refuse((table < -(2**31)) | (table > 2**31 - 1), "it must fit 32 bits")
    if convention != "signed":
        border = np.zeros(table.shape, dtype=bool)
        border[0] = border[:, 0] = True
        refuse(border & (table != 0), "a product with 0 has no sign and must be 0")
    own = table.astype(np.int32)
    own.setflags(write=False)
    return own


# --- the shipped ones -----------------------------------------------------------------------------


def _is_fibonacci(magnitude: np.ndarray) -> np.ndarray:
    return (magnitude & (magnitude >> 1)) == 0


def _is_power(magnitude: np.ndarray) -> np.ndarray:
    return (magnitude & (magnitude - 1)) == 0


def _merged_rows(group: int, merge: np.ufunc) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The multiplier that merges its eight rows in groups, and sums the groups."""

    def multiply(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
        rows = np.array([(weight >> i & 1) * (data << i) for i in range(8)])
        return sum(merge.reduce(rows[i : i + group]) for i in range(0, 8, group))

    return multiply


def _kulkarni(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Two-bit blocks multiplied each with each; 3 · 3 = 7, so that a block's product has 3 bits."""
    total = np.zeros_like(weight)
    for i in range(0, 8, 2):
        for j in range(0, 8, 2):
            a, b = weight >> i & 3, data >> j & 3
            total += np.where((a == 3) & (b == 3), 7, a * b) << (i + j)
    return total


def _or_terms(group: int) -> tuple[tuple[np.ndarray, BitTerm], ...]:
    """The error of OR-ing rows in groups, by inclusion and exclusion.

    An OR of rows is their sum, less what any two have in common, plus what any three have, less
    what four have. Rows i and i + d have in common b_i b_(i+d) · (a & a << d) << i: sets of rows
    with the same distances share one function of the input.
    """
    weight = np.arange(129)
    coefficients: dict[tuple[int, ...], np.ndarray] = {}
    for start in range(0, 8, group):
        for count in range(2, group + 1):
            for rows in combinations(range(start, start + group), count):
                chosen = np.prod([weight >> i & 1 for i in rows], axis=0) << rows[0]
                distances = tuple(i - rows[0] for i in rows[1:])
                sign = 1 if count % 2 else -1
                coefficients[distances] = coefficients.get(distances, 0) + sign * chosen
    return tuple((c, BitTerm(distances)) for distances, c in coefficients.items())


def _pair_bits() -> np.ndarray:
    """h(w) = w & (w >> 1) & 0b01010101: the pairs of rows that a weight chooses both of."""
    weight = np.arange(129)
    return weight & weight >> 1 & 0x55


# name -> (definition, closed form's linear coefficient and terms); built when first asked for
_SHIPPED: dict[str, tuple[Callable, Callable[[], tuple]]] = {
    "exact": (lambda w, x: w * x, lambda: (np.arange(129), ())),
    "or_pairs": (_merged_rows(2, np.bitwise_or), lambda: (np.arange(129), _or_terms(2))),
    "xor_pairs": (
        _merged_rows(2, np.bitwise_xor),
        lambda: (np.arange(129), ((-2 * _pair_bits(), BitTerm((1,))),)),
    ),
    "or_fours": (_merged_rows(4, np.bitwise_or), lambda: (np.arange(129), _or_terms(4))),
    # 2 h(x) = x & (x << 1) & 0b10101010
    "kulkarni": (
        _kulkarni,
        lambda: (np.arange(129), ((-_pair_bits(), BitTerm((1,), 0xAA)),)),
    ),
    "truncated": (
        lambda w, x: (w & ~3) * (x & ~3),
        lambda: (np.zeros(129, np.int64), ((np.arange(129) & ~3, BitTerm((), 0xFC)),)),
    ),
}


@cache
def _shipped(name: str) -> Multiplier:
    definition, closed_form = _SHIPPED[name]
    made = Multiplier.from_function(definition, name, "unsigned")
    return Multiplier(name, made.convention, made.table, ClosedForm(*closed_form()))


# --- from factors to int8 GEMMs -------------------------------------------------------------------


def _signed_int8(by_magnitude: np.ndarray) -> np.ndarray:
    """A function of 129 magnitudes as one of 256 int8 bytes, with the operand's sign."""
    signed = np.sign(CODES) * by_magnitude[np.abs(CODES)]
    if signed.min() < -128 or signed.max() > 127:
        raise AssertionError("a factor beyond int8 was not split")
    return signed.astype(np.int8)


def _gemm_of_closed_form(form: ClosedForm) -> Gemm:
    """The closed form with the cheaper input factor for each term, where the weights leave room.

    c · s·term(|x|) is also c · x - c · (x ^ term(|x|)), for a term without the lowest set bit: the
    XOR clears bits of a non-negative x, and of a negative x = ~(|x| - 1), whose bits above the
    lowest set one of |x| are its complement, sets the same ones. That saves applying the sign.
    """
    linear, bit_terms = form.linear, []
    for coefficient, term in form.terms:
        moved = linear + coefficient
        if term.shifts and np.abs(moved[:128]).max() <= 127 and abs(moved[128]) <= 128:
            linear = moved
            bit_terms.append((_signed_int8(-coefficient), term, True))
        else:
            bit_terms.append((_signed_int8(coefficient), term, False))
    return Gemm(_signed_int8(linear) if linear.any() else None, tuple(bit_terms), {})


def _gemm_of_factors(found: Factorization, convention: str, linear: bool) -> Gemm:
    """Each factor split into int8 digits; digits' products of one scale stand together."""

    def by_byte(factor: np.ndarray) -> list[np.ndarray]:
        if convention == "signed":
            return [digit[CODES + 128] for digit in digits(factor)]
        return [
            _signed_int8(np.pad(digit.astype(np.int64), (0, 129 - len(digit))))
            for digit in digits(factor)
        ]

    columns: dict[int, tuple[list, list]] = {}
    for a, b in zip(found.weight_factor.T, found.input_factor, strict=True):
        for i, weights in enumerate(by_byte(a)):
            for j, inputs in enumerate(by_byte(b)):
                left, right = columns.setdefault(DIGIT_BASE ** (i + j), ([], []))
                left.append(weights)
                right.append(inputs)
    return Gemm(
        CODES.astype(np.int8) if linear else None,
        (),
        {
            scale: (np.stack(left, axis=1), np.stack(right, axis=1))
            for scale, (left, right) in columns.items()
        },
    )
