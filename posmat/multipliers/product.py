"""Matrix products with inexact multipliers, bit for bit.

    y[m, n] = sum over k of table[w[n, k], x[m, k]]

Summing a table takes a look-up for every partial product. But the table is the true product plus
an error of some rank r, so the sum is 1 + r GEMMs, of x and w mapped through the error's factors.
The ways there, all equal number for number:

    "exact"    one GEMM, where every weight is one on which the multiplier is exact
    "gemm"     1 + r GEMMs, by the engine that `posmat.layer.engines` chooses: int8 or float32
    "lookup"   the table, by rows: for each k, table[w[:, k]] is one row of N for each value of x
    "compiled" one look-up per product, in C and on one thread: slower, to compare with

What the weights need is prepared once, by `prepare_inexact`.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.layer.engines import Engine, Form, Term, engine_for, scratch, sum_of_gemms
from posmat.layer.gemm import PreparedWeight, check_for
from posmat.layer.products import INT32_MAX_IN_FEATURES
from posmat.layer.proof import INT8
from posmat.multipliers.gemms import BitTerm
from posmat.multipliers.lookup import compiled_lookup_product
from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier

PATHS = ("auto", "exact", "gemm", "lookup", "compiled")

# By engine, how many GEMMs with their operands' mapping take as long as the look-up path: one
# thread, at the seed's size, on a processor with AVX512-VNNI.
LOOKUP_IN_GEMMS = {"int8": 128, "float32": 40}
COLUMN_BYTES = 2 * 2**20  # of operands that are looked up in one GEMM
EMBED_BYTES = 256 * 1024  # of x that are mapped at a time, to stay in the cache over a few passes
INDEX_BYTES = 512 * 1024  # of look-up indices that are made at a time, to stay in the cache
LOOKUP_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of rows of the table made at a time, float32
GATHER_ROWS = 16  # up to so many rows of x, single look-ups are faster than rows of the table


class InexactWeight(PreparedWeight):
    """int8 weights W (N, K), as they were when prepared, made ready for `multiplier` by `path`.

    gemms: how many GEMMs of the layer's size the product takes; 0 where it looks up.
    """

    def __init__(self, w: Tensor, multiplier: Multiplier, path: str):
        super().__init__(w)
        self.multiplier, self.path = multiplier, _path(w, multiplier, path)
        self.gemms = multiplier.gemm.count if self.path == "gemm" else int(self.path == "exact")
        # Partial sums may wrap on the way in int32: additions modulo 2**32 end where they should
        # as soon as the sum itself fits.
        K = self.shape[1]
        fits = K <= INT32_MAX_IN_FEATURES and K * multiplier.largest_product <= 2**31 - 1
        self._accumulator = torch.int32 if fits else torch.int64
        self._table = _Table(w, multiplier) if self.path == "lookup" else None
        self._weight = w.clone(memory_format=torch.contiguous_format)
        self._terms: dict[str, list[Term]] = {}
        if self.path in ("exact", "gemm"):
            self._laid_out(engine_for(w.device, INT8))

    def __repr__(self) -> str:
        words = {"exact": "exact on these weights: one GEMM", "lookup": "table look-up"}
        words["compiled"] = "one look-up per product"
        way = words.get(self.path, f"{self.gemms} GEMM{'s' * (self.gemms != 1)}")
        return f"InexactWeight{self.shape}: {self.multiplier.name!r}, path {self.path!r} ({way})"

    def product(self, x: Tensor) -> Tensor:
        """Y (M, N) of int8 X (M, K), whose shape and dtype are known to fit."""
        _check_admitted(x, self.multiplier, "input")
        N, K = self.shape
        if self.path == "compiled":
            return compiled_lookup_product(x, self._weight, self.multiplier).to(self._accumulator)
        if self._table is None:
            engine = engine_for(x.device, INT8)
            return sum_of_gemms(x, self._laid_out(engine), N, engine, self._accumulator)
        y = torch.zeros((len(x), N), dtype=self._accumulator, device=x.device)
        if 0 not in (len(x), N, K):
            self._table.add_to(y, x)
        return y

    def _laid_out(self, engine: Engine) -> list[Term]:
        """The terms of the sum for an engine: another one than before, where switches changed."""
        if engine.name not in self._terms:
            multiplier = find_multiplier("exact") if self.path == "exact" else self.multiplier
            self._terms[engine.name] = _terms(self._weight, multiplier, engine)
        return self._terms[engine.name]


def prepare_inexact(w: Tensor, multiplier: str | Multiplier, path: str = "auto") -> InexactWeight:
    """What `inexact_product` needs of int8 weights (N, K), computed once and outside the clock.

    Later changes of the weights do not count. `path` is one of those above; 'auto' takes
    'exact' if the multiplier is exact on every weight, else 'gemm', unless a look-up is faster
    (see `LOOKUP_IN_GEMMS`).

    Raises:
        TypeError, ValueError: w is no matrix of int8, or not admitted by the multiplier; there is
            no such multiplier or path; or 'exact' is asked for weights on which it is not.
    """
    return InexactWeight(w, find_multiplier(multiplier), path)


def inexact_product(
    x: Tensor,
    w: Tensor | InexactWeight,
    multiplier: str | Multiplier | None = None,
    path: str = "auto",
) -> Tensor:
    """The product X Wᵀ by an inexact multiplier: number for number the sum of its table over K.

    X (M, K) is int8, and so is W (N, K), or w is what `prepare_inexact` made of it, which knows
    multiplier and path. Y (M, N) is int32 where K times the largest product fits, int64 beyond.

    Raises:
        TypeError: an operand is not int8; or the multiplier is missing, or given a second time.
        ValueError: the shapes do not fit, or the multiplier does not admit an operand or the path.
    """
    check_for("inexact_product", x, w, InexactWeight)
    prepared = isinstance(w, InexactWeight)
    if prepared and (multiplier is not None or path != "auto"):
        raise TypeError(f"w is made for {w.multiplier.name!r}: give neither multiplier nor path.")
    if not prepared and multiplier is None:
        raise TypeError("multiplier is missing: name one, or give w as prepare_inexact makes it.")
    return (w if prepared else prepare_inexact(w, multiplier, path)).product(x)


def _path(w: Tensor, found: Multiplier, path: str) -> str:
    """The way that is asked for, once it is known to serve; the one to take where it is 'auto'."""
    if path not in PATHS:
        raise ValueError(f"there is no path {path!r}: the paths are {', '.join(PATHS)}.")
    _check_admitted(w, found, "weight")
    if path in ("gemm", "lookup", "compiled"):
        return path
    inexact = ~torch.from_numpy(found.exact_weights).to(w.device)[w.view(torch.uint8).long()]
    if not bool(inexact.any()):
        return "exact"
    if path == "exact":
        n, k = inexact.nonzero()[0].tolist()
        raise ValueError(
            f"path='exact' was asked for, and {found.name!r} is not exact on the weight "
            f"{int(w[n, k])} (row {n}, column {k}): use path='auto', or quantize to its codes."
        )
    return way_of(found, w.device)


def way_of(multiplier: Multiplier, device: torch.device) -> str:
    """'gemm' or 'lookup', whichever should be faster on weights that are not exact."""
    most = LOOKUP_IN_GEMMS[engine_for(device, INT8).name]
    if multiplier.closed_form is None and multiplier.rank_bound >= most:
        return "lookup"  # without factorizing: there are at least as many products as the rank
    return "gemm" if multiplier.gemm.count <= most else "lookup"


def _check_admitted(t: Tensor, multiplier: Multiplier, what: str) -> None:
    axis, name = {"weight": (0, "w"), "input": (1, "x")}[what]
    low, high = multiplier.admitted[axis]
    # A look at what cannot be outside would cost a pass over it.
    if t.numel() and ((low > -128 and t.min() < low) or (high < 127 and t.max() > high)):
        i, j = ((t < low) | (t > high)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{i}, {j}] is {int(t[i, j])}, and the table of {multiplier.name!r} admits no "
            f"such {what}, only {low}..{high}: clamp to these, or give a larger table."
        )


def error_product(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """What the multiplier adds to the exact product X Wᵀ: int64 (M, N), itself a product."""
    return inexact_product(x, w, multiplier).long().sub_(inexact_product(x, w, "exact"))


class OutputError(NamedTuple):
    """A layer's error under a multiplier, per output and over a batch, each (N,) float64."""

    bias: Tensor  # the mean of inexact minus exact
    spread: Tensor  # its standard deviation
    signal: Tensor  # the standard deviation of the exact output, to compare with


def output_error(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> OutputError:
    """Bias and spread of every output of a layer W (N, K) over a batch X (M, K)."""
    error = error_product(x, w, multiplier).double()
    exact = inexact_product(x, w, "exact").double()
    return OutputError(error.mean(0), error.std(0, correction=0), exact.std(0, correction=0))


def _terms(w: Tensor, multiplier: Multiplier, engine: Engine) -> list[Term]:
    """The multiplier's GEMMs of weights (N, K), laid out for an engine."""
    K, gemm, codes = w.shape[1], multiplier.gemm, w.view(torch.uint8).long()

    def term(factors: np.ndarray, largest: int, **rest) -> Term:
        longest = engine.longest(max(1, largest * int(np.abs(factors.astype(int)).max())))
        mapped = torch.from_numpy(factors).to(w.device)[codes]  # (N, K), or (N, K, columns)
        if mapped.ndim == 3:  # in pairs of inputs: an odd K gets a zero
            mapped = F.pad(mapped, (0, 0, 0, K % 2)).flatten(1)
        return Term(engine.prepare(mapped), longest, **rest)

    terms = [] if gemm.linear is None else [term(gemm.linear, 128)]
    for factors, bits, xor in gemm.bit_terms:
        terms.append(term(factors, 128, form=Form(partial(_embed, bits, xor))))
    for scale, (weights, inputs) in gemm.columns.items():
        for start, count, columns in _chunks(weights.shape[1]):
            of_weight, of_input = (
                np.pad(factors[:, start : start + count], ((0, 0), (0, columns - count)))
                for factors in (weights, inputs)
            )
            keys, rows = _rows_by_index(of_input)
            form = Form(partial(_look_up, keys, rows.to(w.device)), columns, COLUMN_BYTES)
            largest = int(np.abs(of_input.astype(int)).max())
            terms.append(term(of_weight, largest, form=form, scales=(scale,)))
    return terms


def _embed(term: BitTerm, xor: bool, x: Tensor) -> Tensor:
    """x ^ term(|x|), or s·term(|x|), as scratch memory (M, K) of int8; in blocks of rows."""
    embedded = scratch("part", x.shape, torch.int8, x.device)
    rows = len(x) if x.device.type == "cuda" else max(1, EMBED_BYTES // x.shape[1])
    doubled = scratch("doubled", (min(rows, len(x)), x.shape[1]), torch.int8, x.device)
    blocks = zip(x.split(rows), embedded.split(rows), strict=True)  # views made at once cost less
    for block, value in blocks:
        other = doubled[: len(block)]
        torch.abs(block, out=value)  # the bits of 128 are those that abs leaves of -128
        before = value
        for shift in range(1, max(term.shifts, default=0) + 1):
            torch.add(before, before, out=other)  # one place further left; what leaves is lost
            before = other
            if shift in term.shifts:
                value.bitwise_and_(other)
        if term.mask != 0xFF:
            value.bitwise_and_(term.mask - 256 if term.mask > 127 else term.mask)
        if xor:
            value.bitwise_xor_(block)
        else:
            # term(|x|) is at most |x|: clamping x to it leaves its sign.
            torch.neg(value, out=other)
            torch.clamp(block, min=other, max=value, out=value)
    return embedded


def _chunks(columns: int) -> Iterator[tuple[int, int, int]]:
    """Cut columns into (start, count, padded count): 16s, 8, 4, 2, 1.

    A look-up of a chunk takes as long as two GEMMs, whatever its width: a chunk is filled up with
    one column of zeros before it is made of two.
    """
    start = 0
    while start < columns:
        size = max(s for s in (1, 2, 4, 8, 16) if s - 1 <= columns - start)
        count = min(size, columns - start)
        yield start, count, size
        start += count


def _rows_by_index(factors: np.ndarray) -> tuple[int, Tensor]:
    """Up to 16 int8 factors of every byte (256, c), as elements of 2 to 16 bytes by an index.

    For up to 4 the index is a pair of bytes, 16 bits in the machine's order, and the element has
    the factors of both; for more, such a table of 65,536 would crowd the second-level cache.
    """
    c = factors.shape[1]
    keys = 1 if c > 4 else 2
    if keys == 2:
        pairs = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(65536, 2)
        factors = factors[pairs].reshape(65536, 2 * c)
    element = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[c * keys]
    return keys, torch.from_numpy(np.ascontiguousarray(factors)).view(element).flatten()


def _look_up(keys: int, rows: Tensor, x: Tensor) -> Tensor:
    """The factors of every element of x (M, k), side by side, as scratch memory (M, k · c) int8.

    An index is int32, four times as large as what it is made of: few rows at a time, so that it is
    still in the cache when it is used. An odd k gets a zero, which has no factor's weight.
    """
    if x.shape[1] % 2:
        x = F.pad(x, (0, 1))
    if keys == 2 and (x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2):
        # Not x.contiguous(), which gives back a single row with an odd stride as it is.
        x = x.clone(memory_format=torch.contiguous_format)
    keyed = x.view(torch.int16 if keys == 2 else torch.uint8)
    M, k = keyed.shape
    found = scratch("rows", (M, k), rows.dtype, x.device)
    step = M if x.device.type == "cuda" else max(1, INDEX_BYTES // (4 * k))
    indices = scratch("index", (min(step, M), k), torch.int32, x.device)
    for part, to in zip(keyed.split(step), found.split(step), strict=True):
        index = indices[: len(part)].copy_(part)
        if keys == 2:
            index.bitwise_and_(0xFFFF)
        torch.index_select(rows, 0, index.view(-1), out=to.view(-1))
    return found.view(torch.int8)


class _Table:
    """The table itself, by rows of it, or by single look-ups where x has few rows.

    For one k, `table[w[:, k], v]` for all n and v is a matrix with a row for every value v of an
    input; x[m, k] chooses one, and adding up the chosen rows over k is an embedding bag. Its floats
    are whole numbers whose partial sums stay within 2**24, hence exact: a larger table is split in
    two digits, and sums are moved to integers before they can grow beyond.
    """

    def __init__(self, w: Tensor, multiplier: Multiplier):
        self.codes = w.view(torch.uint8).int()
        self.by_input = torch.from_numpy(multiplier.operand_table.T.copy()).to(w.device)  # (x, w)
        parts = [(1, self.by_input)]
        if multiplier.largest_product > 2**17:
            low = (self.by_input + 2**14) % 2**15 - 2**14
            parts = [(1, low), (2**15, (self.by_input - low) >> 15)]
        self.parts = [
            (scale, part.float(), max(1, 2**24 // max(1, int(part.abs().max()))))
            for scale, part in parts
        ]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the product to y; of few rows one by one, of many by rows of the table."""
        if len(x) <= GATHER_ROWS:
            table = self.by_input.flatten()
            for x_row, y_row in zip(x.view(torch.uint8).int() * 256, y, strict=True):
                y_row.add_(table[x_row + self.codes].sum(1))  # of (N, K)
            return
        N, K = self.codes.shape
        n_step = min(N, 128)
        elements = LOOKUP_ELEMENTS.get(x.device.type, LOOKUP_ELEMENTS["cpu"])
        for scale, table, limit in self.parts:
            k_step = max(1, min(elements // (256 * n_step), limit, K))
            span = limit // k_step * k_step
            for n, start in product(range(0, N, n_step), range(0, K, span)):
                y_block = y[:, n : n + n_step]
                total = torch.zeros(y_block.shape, dtype=torch.float32, device=x.device)
                for k in range(start, min(start + span, K), k_step):
                    codes = self.codes[n : n + n_step, k : k + k_step].T  # (k, n)
                    count = len(codes)
                    # (v, k, n): row v · count + k is table[w[:, k], v]
                    rows = torch.index_select(table, 1, codes.reshape(-1)).view(256 * count, -1)
                    index = x[:, k : k + count].contiguous().view(torch.uint8).int().mul_(count)
                    index.add_(torch.arange(count, dtype=torch.int32, device=x.device))
                    total.add_(F.embedding_bag(index, rows, mode="sum"))
                y_block.add_((total.long() * scale).to(y.dtype))  # int32 modulo 2**32, as y is
