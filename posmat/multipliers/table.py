"""Inexact multipliers as objects: definition, table, error, and when they are exact.

A hardware multiplier of two 8-bit numbers is a table of 65,536 products. Small ones are cheap
because some products are wrong; whatever their circuit, all that a matrix product feels of them is
the table, always `table[weight, input]`, and its error, table minus the true product.
"""

import difflib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posmat.multipliers import gemms
from posmat.multipliers.cmodel import tabulate
from posmat.multipliers.factors import Factorization, factorize, modular_rank
from posmat.multipliers.formats import SIDES, read_table
from posmat.multipliers.gemms import CODES, SIGNS, ClosedForm, Gemm

CONVENTIONS = ("sign-magnitude", "unsigned", "signed", "two's complement")
ORDERS = ("weight, input", "input, weight")
MANY_TERMS = 4  # more functions of bits than that are looked up together in less time


class ErrorStatistics(NamedTuple):
    """A multiplier's error, table minus true product, over pairs of operands."""

    pairs: int
    ER: float  # error rate, also EP: the share of pairs with a wrong product
    MAE: float  # mean absolute error, also MED
    NMED: float  # MAE / the table's largest true product: of n bits unsigned (2**n - 1)**2
    MRED: float  # mean of |error / true product| over the pairs whose true product is not 0
    WCE: int  # worst case, the largest absolute error
    bias: float  # mean of the error, also ME
    variance: float  # of the error


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A multiplier of a weight and an input, known by its table.

    Made by `from_function`, `from_table` or `from_c`; `find_multiplier` knows some by name. The
    convention says how operands of n bits, 4 to 8, index the table:

    'sign-magnitude': magnitudes from 0 on; the product has the sign of the operands' product, and
        the sign of 0 is plus. 128 rows hold weights -127..127, 129 and more hold -128 too; so do
        columns the inputs.
    'unsigned': 2**n x 2**n, a circuit for 0..2**n - 1, used on magnitudes with the sign restored.
    'signed': 2**n x 2**n over -2**(n - 1)..2**(n - 1) - 1 in this order, taken as it is.
    """

    name: str
    convention: str
    table: np.ndarray  # int32, table[weight, input], read-only
    closed_form: ClosedForm | None = field(default=None, repr=False)

    @classmethod
    def from_function(
        cls,
        f: Callable[[Any, Any], Any],
        name: str | None = None,
        convention: str = "sign-magnitude",
        check: bool = True,
    ) -> "Multiplier":
        """The multiplier that a function defines: f(weight, input).

        f is called with two int64 arrays of one shape that hold every pair of operands: magnitudes
        0..128 by default, 0..255 if 'unsigned', -128..127 if 'signed'. Where it does not return a
        product for each, it is called with two ints, pair by pair. Errors are as of `from_table`.
        """
        if not callable(f):
            raise TypeError(f"{f!r} is not callable: give a function f(weight, input).")
        require_known("convention", convention, CONVENTIONS[:3])
        size = 129 if convention == "sign-magnitude" else 256
        weight, data = np.meshgrid(*[_operands(convention, size)] * 2, indexing="ij")
        try:
            table = f(weight.copy(), data.copy())
        except (AttributeError, TypeError, ValueError):  # as int() and if refuse an array
            table = None
        if np.shape(table) != weight.shape:
            table = np.vectorize(f, otypes=[object])(weight, data).tolist()
        name = name or getattr(f, "__name__", "function")
        return cls.from_table(table, name, convention, ORDERS[0], check)

    @classmethod
    def from_table(
        cls,
        table: Any,
        name: str | None = None,
        convention: str | None = None,
        operands: str | None = None,
        check: bool = True,
    ) -> "Multiplier":
        """The multiplier of a table, which is an array or in a file.

        Args:
            table: a matrix of whole numbers, or the path of a file with one: .npy, .csv, .txt,
                .bin or .h (see `posmat.multipliers.formats`).
            name: what to call it; by default the file's name without its ending.
            convention: it must be said, because the shape does not say it. There is one more than
                the class keeps, "two's complement": signed, by bytes, 0..127 and then -128..-1.
            operands: 'weight, input' or 'input, weight', what rows and columns are; it must be
                said of a table that is not symmetric.
            check: whether to refuse a table that another convention fits far better.

        Raises:
            OSError: the file cannot be read.
            TypeError: the table does not hold numbers.
            ValueError: the file holds no table, or a shape, a word or a cell is not admitted.
        """
        require_known("convention", convention, CONVENTIONS)
        require_known("order of operands", operands or ORDERS[0], ORDERS)
        if isinstance(table, str | os.PathLike):
            name, table = name or Path(table).stem, read_table(Path(table), convention)
        name = name or "table"
        named = f"the table of {name[:60]!r}"
        table = _matrix(table, convention, named)
        if check:
            _refuse_misread(table, convention, named)
        if convention == "two's complement":
            table, convention = np.roll(table, [len(table) // 2] * 2, (0, 1)), "signed"
        if operands is None and not np.array_equal(table, table.T):
            of_cell = f"a table of shape {table.shape}"
            if len(table) == table.shape[1]:
                i, j = map(int, np.argwhere(table != table.T)[0])
                a, b = (int(o) for o in _operands(convention, len(table))[[i, j]])
                of_cell = f"{a} by {b} is {table[i, j]}, and {b} by {a} is {table[j, i]}"
            raise ValueError(
                f"{named} is not symmetric ({of_cell}): give operands='weight, input' if its rows "
                "are weights, or else 'input, weight'."
            )
        table = np.ascontiguousarray(table.T if operands == ORDERS[1] else table)
        table.setflags(write=False)
        return cls(name, convention, table)

    @classmethod
    def from_c(
        cls,
        path: str | os.PathLike,
        name: str | None = None,
        function: str | None = None,
        operands: str = "input, weight",
        bits: int | None = None,
        signed: bool | None = None,
    ) -> "Multiplier":
        """The multiplier of a model in C, compiled and asked for every product.

        The file is a program, and it is run: in a process of its own, for a minute at the most.
        What its comments state as MAE and WCE is held against its table.

        Args:
            name: what to call it; by default as the function.
            function: which; by default the one public function of two integers.
            operands: what its parameters are, in their order.
            bits, signed: of the operands, where neither a name like mul8s_1KV8 nor the types tell.

        Raises:
            NotAvailable: there is no C compiler.
            OSError: the file cannot be read.
            ValueError: it does not compile, does not end, is no multiplier of 4 to 8 bits, does not
                say of which, or states another error than its table has.
        """
        require_known("order of operands", operands, ORDERS)
        function, table, convention = tabulate(Path(path), function, bits, signed)
        return cls.from_table(table, name or function, convention, operands, check=False)

    def __repr__(self) -> str:
        rows, columns = self.table.shape
        return f"Multiplier({self.name!r}, {self.convention!r}, {rows} x {columns})"

    @property
    def weights(self) -> np.ndarray:
        """The operand of each row of the table."""
        return _operands(self.convention, len(self.table))

    @property
    def inputs(self) -> np.ndarray:
        """The operand of each column of the table."""
        return _operands(self.convention, self.table.shape[1])

    @cached_property
    def error(self) -> np.ndarray:
        """The table minus the true products, int64, in the shape of the table."""
        return self.table.astype(np.int64) - np.outer(self.weights, self.inputs)

    def statistics(
        self,
        weights: Collection[int] | Mapping[int, int] | None = None,
        inputs: Collection[int] | Mapping[int, int] | None = None,
    ) -> ErrorStatistics:
        """The error over all pairs of operands, as they index the table; by default all it has.

        `weights` and `inputs` are values, or how often each value occurs, {value: count}. It is a
        ValueError if one is not in the table, or there are none.
        """
        # Python integers: sums that are exact, whatever the counts, and rounded once.
        counts = np.outer(self._counted(0, weights), self._counted(1, inputs))
        pairs = counts.sum()
        if not pairs:
            raise ValueError("there are no operand pairs: give at least one weight and one input.")
        error, true = self.error, np.outer(self.weights, self.inputs)
        size, meant = np.abs(error), true != 0
        total, squares = (counts * error).sum(), (counts * error * error).sum()
        MAE, relative = (counts * size).sum() / pairs, (counts * size)[meant] / np.abs(true[meant])
        return ErrorStatistics(
            pairs=pairs,
            ER=counts[size > 0].sum() / pairs,
            MAE=MAE,
            NMED=MAE / int(np.abs(true).max()),
            MRED=math.fsum(relative) / max(1, counts[meant].sum()),
            WCE=int(size[counts > 0].max()),
            bias=total / pairs,
            variance=(pairs * squares - total**2) / pairs**2,
        )

    def exact_when(self) -> dict[str, dict[str, bool]]:
        """By exhaustive check: is every product exact when the named operand is of a kind?

        Kinds: 'Fibonacci code' (no two adjacent ones in the magnitude) and 'power of two' (0 too).
        Which operand: 'weight', 'input', 'either' (one is enough) and 'both' (it takes both).
        """
        kinds = {"Fibonacci code": lambda m: m & m >> 1, "power of two": lambda m: m & m - 1}
        answer = {}
        for kind, too_many in kinds.items():
            rows, columns = (too_many(abs(o)) == 0 for o in (self.weights, self.inputs))
            by = {"weight": not self.error[rows].any(), "input": not self.error[:, columns].any()}
            by["either"] = by["weight"] and by["input"]
            answer[kind] = by | {"both": not self.error[np.ix_(rows, columns)].any()}
        return answer

    @cached_property
    def operand_table(self) -> np.ndarray:
        """The products of int8 operands, signs applied: int64 (256, 256) by the operands' bytes.

        Cells of an operand that is not in the table are 0.
        """
        part = self._int8_part(self.table).astype(np.int64)
        if self.convention == "signed":
            return np.pad(part, 128 - len(part) // 2)[np.ix_(CODES + 128, CODES + 128)]
        magnitude, wide = np.abs(CODES), np.pad(part, [(0, 129 - size) for size in part.shape])
        return wide[np.ix_(magnitude, magnitude)] * np.outer(SIGNS, SIGNS)

    @property
    def admitted(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The lowest and the highest int8 weight, and input, that the table holds."""
        ends = ((int(o[0] or -o[-1]), int(o[-1])) for o in (self.weights, self.inputs))
        return tuple((max(-128, low), min(127, high)) for low, high in ends)

    @property
    def limits(self) -> tuple[int, int]:
        """The largest m for which -m and m are int8 weights of the table, and inputs."""
        return tuple(min(127, -low, high) for low, high in self.admitted)

    @cached_property
    def slopes(self) -> tuple[np.ndarray, np.ndarray]:
        """The product's derivative by the input, at each weight, and by the weight, at each input.

        float64 (256,) by the operand's byte: the least-squares slope of the table's row of a weight
        over the inputs, and of the column of an input over the weights, within `limits`.
        """
        found = []
        tables = self.operand_table, self.operand_table.T
        for table, largest in zip(tables, reversed(self.limits), strict=True):
            meant = np.abs(gemms.CODES) <= largest
            values = gemms.CODES[meant] - gemms.CODES[meant].mean()
            found.append(table[:, meant] @ values / (values**2).sum())
        return tuple(found)

    @cached_property
    def exact_weights(self) -> np.ndarray:
        """(256,) bool by the weight's byte: is its product exact with every admitted input?"""
        weights, inputs = ((low <= CODES) & (high >= CODES) for low, high in self.admitted)
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
        """Integer factors of the error over the operands of int8, verified cell by cell."""
        error = self._int8_part(self.error)
        if self.closed_form is None:
            return factorize(error)
        found = self.closed_form.error_factors()
        found.verify(error)
        return found

    @cached_property
    def gemm(self) -> Gemm:
        """The multiplier as a sum of int8 products, by the fewest that are known.

        From the closed form; the true product and the error's factors; or the products' factors.
        """
        form = self.closed_form
        if form is not None and len(form.terms) <= MANY_TERMS:
            return gemms.gemm_of_closed_form(form)
        found = gemms.gemm_of_factors(self.factorization, self.convention, linear=True)
        products = self._int8_part(self.table)
        if form is None and modular_rank(products) <= self.rank:
            other = gemms.gemm_of_factors(factorize(products), self.convention, linear=False)
            return min(found, other, key=lambda gemm: gemm.count)
        return found

    def _int8_part(self, table: np.ndarray) -> np.ndarray:
        """The rows and the columns that an int8 operand can meet."""
        return table if self.convention == "signed" else table[:129, :129]

    def _counted(self, axis: int, operands: Collection | Mapping | None) -> np.ndarray:
        """How often each row, or column, is meant, in Python integers."""
        known = (self.weights, self.inputs)[axis]
        counts, operands = 0 * known.astype(object), known if operands is None else operands
        if not isinstance(operands, Mapping):
            operands = Counter(np.asarray([*operands]).reshape(-1).tolist())
        for value, count in operands.items():
            if value not in known or count < 0 or count != int(count):
                raise ValueError(
                    f"{('weight', 'input')[axis]} {value}, {count} times, is not in the table of "
                    f"{self.name!r}, which has {known[0]}..{known[-1]}."
                )
            counts[value - known[0]] = int(count)
        return counts


def require_known(kind: str, word: str | None, known: Collection[str]) -> None:
    """Refuse a word that is not known, with those that are."""
    if word not in known:
        close = difflib.get_close_matches(str(word), known, n=2, cutoff=0.5)
        near = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"there is no {kind} {word!r}{near} The {kind}s are {', '.join(known)}.")


def _operands(convention: str, size: int) -> np.ndarray:
    operands = np.arange(size) - (0 if convention in CONVENTIONS[:2] else size // 2)
    return np.roll(operands, size // 2) if convention == "two's complement" else operands


def _matrix(table: Any, convention: str, named: str) -> np.ndarray:
    """The table as an int32 array of its own, if it is one of that convention."""
    if np.ma.is_masked(table):
        i = ", ".join(map(str, np.argwhere(np.ma.getmaskarray(table))[0]))
        raise ValueError(f"{named} is masked in cell [{i}]: fill what is masked with products.")
    try:
        table = np.asarray(table)
    except ValueError:
        raise ValueError(f"{named} has rows of different lengths: give a matrix.") from None
    if table.dtype.kind not in "iuf":
        raise TypeError(f"{named} holds {table.dtype}: it must hold whole numbers.")
    if table.dtype.kind == "f":  # float32 takes the limit of 32 bits for 2**31
        table = table.astype(np.promote_types(table.dtype, np.float64))
    sides, wanted = set(table.shape), "2**n x 2**n for 4 to 8 bits, 256 x 256 for 8"
    fits = table.ndim == 2 and len(sides) == 1 and sides <= set(SIDES)
    if convention == "sign-magnitude":
        wanted = "128 x 128, or up to 256 a side; for fewer bits square, 8, 16, 32 or 64 a side"
        fits |= table.ndim == 2 and all(128 <= side <= 256 for side in sides)
        fits |= table.shape in {(side, side) for n in (8, 16, 32, 64) for side in (n, n + 1)}
    if not fits:
        raise ValueError(
            f"{named} has shape {table.shape}: for convention {convention!r} it must be {wanted}."
        )
    bad = ~((np.floor(table) == table) & (table >= -(2**31)) & (table <= 2**31 - 1))
    if bad.any():
        i, j = map(int, np.argwhere(bad)[0])
        raise ValueError(
            f"{named} says {table[i, j]} in row {i}, column {j}: products must be whole numbers "
            f"that fit 32 bits ({bad.sum()} are not)."
        )
    return table.astype(np.int32)


def _refuse_misread(table: np.ndarray, convention: str, named: str) -> None:
    """Refuse a table that is four times nearer to the true products in another order or sign."""
    if convention == "unsigned" and table.min() < 0:
        i, j = map(int, np.argwhere(table < 0)[0])
        raise ValueError(
            f"{named} says {table[i, j]} in row {i}, column {j}, and an unsigned circuit has no "
            "negative product: give another convention, or check=False to take it as it is."
        )
    if len(table) not in SIDES or len(table) != table.shape[1]:
        return
    bits, MAE, low, high = len(table).bit_length() - 1, {}, table.min(), table.max()
    readings = {("", order): table for order in CONVENTIONS[1:]}
    for width in {16, 2 * bits}:
        if low >= 0 and high < 2**width:
            wrapped = (table + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
            how = f" with its products as int{width}"
            readings |= {(how, order): wrapped for order in CONVENTIONS[2:]}
        elif -(2 ** (width - 1)) <= low < 0 and high < 2 ** (width - 1):
            readings[f" with its products as uint{width}", "unsigned"] = table % 2**width
    for (how, order), products in readings.items():
        true = np.outer(*[_operands(order, len(table))] * 2)
        MAE[order, how] = np.abs(products - true).mean()
    own = MAE["unsigned" if convention == "sign-magnitude" else convention, ""]
    order, how = min(MAE, key=MAE.get)
    if own and 4 * MAE[order, how] <= own:
        raise ValueError(
            f"{named} as {convention!r} has a mean absolute error of {own:,.2f}, and as "
            f"{order!r}{how} of {MAE[order, how]:,.2f}: give that, or check=False to take it as is."
        )
