"""Matrix products with inexact multipliers, bit for bit, and a layer that is made of one.

    y[m, n] = sum over k of table[w[n, k], x[m, k]]

Summing a table takes a look-up for every partial product. But the table is the true product plus
an error of some rank r, so the sum is 1 + r int8 GEMMs, of x and w mapped through the error's
factors. The ways there, all equal number for number:

    "exact"    one GEMM, where every weight is one on which the multiplier is exact
    "gemm"     1 + r int8 GEMMs
    "lookup"   the table, by rows: for each k, table[w[:, k]] is one row of N for each value of x
"""

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmat.exact import chosen_method, exact_product
from posmat.gemm import as_rows, engine_for
from posmat.multipliers import BitTerm, Multiplier, find_multiplier, multiplier_names
from posmat.problem import check_operands
from posmat.products import INT32_MAX_IN_FEATURES

PATHS = ("auto", "exact", "gemm", "lookup")

# The look-up path takes as long as about this many int8 GEMMs with their operands' mapping; on a
# processor with AVX512-VNNI, one thread, at the seed's size. More GEMMs than that: look up.
LOOKUP_IN_GEMMS = 128
GEMM_BLOCK = 65_528  # the largest K of one int8 GEMM here: its sums fit int32; a multiple of 8
SCRATCH_BYTES = 4 * 2**20  # of mapped operands at a time
COLUMN_BYTES = 8 * 1024  # a K block with all its columns, for each row: 2 MiB for 256 rows
EMBED_BYTES = 1152 * 1024  # of x that are mapped at a time: smaller parts cost more calls
INDEX_BYTES = 512 * 1024  # of look-up indices that are made at a time, to stay in the cache
KEPT_BYTES = 16 * 2**20  # a larger scratch buffer is given back to the system after the call
GATHER_ROWS = 16  # up to so many rows of x, single look-ups are faster than rows of the table


def inexact_product(
    x: Tensor, w: Tensor, multiplier: str | Multiplier, path: str = "auto"
) -> Tensor:
    """The product X Wᵀ in which every multiplication is done by `multiplier`.

    Equal, number for number, to summing the table over the inner dimension. A layer whose weights
    stay is faster as an `InexactLinear`, which prepares them once.

    Args:
        x, w: X (M, K) and W (N, K), int8.
        multiplier: a Multiplier or the name of a shipped one.
        path: 'auto' chooses (see `choose_path`); 'exact', 'gemm' and 'lookup' ask for one.

    Returns:
        Y (M, N): int32 where K times the largest product fits, int64 beyond.

    Raises:
        TypeError: an operand is not int8.
        ValueError: the shapes do not fit, an operand is not one that the multiplier's convention
            admits, there is no such multiplier or path, or 'exact' is asked for weights on which
            the multiplier is not.
    """
    check_operands(x, w)
    found = find_multiplier(multiplier)
    return _prepare(w, found, choose_path(w, found, path)).product(x)


def choose_path(w: Tensor, multiplier: str | Multiplier, path: str = "auto") -> str:
    """Which way `inexact_product` and `InexactLinear` take for these weights.

    'exact' if every weight is one on which the multiplier is exact for all inputs; else 'gemm', if
    the multiplier takes at most `LOOKUP_IN_GEMMS` of them; else 'lookup'. A path other than 'auto'
    is given back, once it is known to serve.

    Raises:
        TypeError, ValueError: see `inexact_product`.
    """
    found = find_multiplier(multiplier)
    if path not in PATHS:
        raise ValueError(f"there is no path {path!r}: the paths are {', '.join(PATHS)}.")
    _check_weight(w, found)
    if path in ("gemm", "lookup"):
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
    if found.closed_form is None and found.rank_bound >= LOOKUP_IN_GEMMS:
        return "lookup"  # without factorizing: there are at least as many products as the rank
    return "gemm" if found.gemm.count <= LOOKUP_IN_GEMMS else "lookup"


def error_product(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """What the multiplier adds to the exact product X Wᵀ: int64 (M, N), itself a product.

    Raises:
        TypeError, ValueError: see `inexact_product`.
    """
    inexact = inexact_product(x, w, multiplier).long()
    return inexact.sub_(_prepare(w, find_multiplier("exact"), "exact").product(x))


class OutputError(NamedTuple):
    """A layer's error under a multiplier, per output and over a batch, each (N,) float64.

    bias: the mean of inexact minus exact.
    spread: its standard deviation.
    signal: the standard deviation of the exact output, to compare with.
    """

    bias: Tensor
    spread: Tensor
    signal: Tensor


def output_error(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> OutputError:
    """Bias and spread of every output of a layer W (N, K) over a batch X (M, K).

    Raises:
        TypeError, ValueError: see `inexact_product`.
    """
    error = error_product(x, w, multiplier).double()
    exact = _prepare(w, find_multiplier("exact"), "exact").product(x).double()
    return OutputError(error.mean(0), error.std(0, correction=0), exact.std(0, correction=0))


def straight_through_product(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """`inexact_product` for training: floating operands that hold int8 values, and a gradient.

    Forward, the inexact product of these values, as floats of x's dtype (float32 is exact up to
    2**24). Backward, the gradient of the exact product x wᵀ, as if the multiplier were a true one:
    the straight-through estimate.

    Args:
        x, w: X (M, K) and W (N, K), floating, every element a whole number in -128..127.
        multiplier: a Multiplier or the name of a shipped one.

    Raises:
        TypeError: an operand is not floating.
        ValueError: an element is not a whole number in -128..127; see also `inexact_product`.
    """
    found = find_multiplier(multiplier)
    codes, w_codes = _as_int8(x, "x"), _as_int8(w, "w")
    check_operands(codes, w_codes)
    prepared = _prepare(w_codes, found, choose_path(w_codes, found))
    return _StraightThrough.apply(x, w, codes, prepared)


class InexactLinear(nn.Module):
    """A linear layer of int8 weights whose every multiplication is done by `multiplier`.

    What the product needs is prepared once, here, and anew after the weight or the table was moved,
    loaded or written to (PyTorch counts what is written, except through `.data`, which the layer
    therefore cannot see). Only the int8 weight and the table are in the state dict, and in its
    metadata the table's convention and name: a layer that loads them multiplies as the one that
    saved them. Without the metadata, a plain dict's, the layer's own convention stays.

    Args:
        w: W (out_features, in_features), int8; it is copied.
        multiplier: a Multiplier or the name of a shipped one.
        path: 'auto', 'exact', 'gemm' or 'lookup', see `choose_path`; the one that is taken is the
            attribute `path`.

    Raises:
        TypeError, ValueError: see `inexact_product`.
    """

    weight: Tensor
    table: Tensor

    def __init__(self, w: Tensor, multiplier: str | Multiplier, path: str = "auto"):
        super().__init__()
        self._multiplier = find_multiplier(multiplier)
        self.asked_path = path
        _check_weight(w, self._multiplier)
        with torch.inference_mode(False):  # a tensor of inference mode does not count its changes
            weight = w.detach().clone(memory_format=torch.contiguous_format)
            table = torch.tensor(self._multiplier.table, device=w.device)
        self.register_buffer("weight", weight)
        self.register_buffer("table", table)
        self._prepared: _Prepared | None = None
        self._prepared_from: list[tuple[Tensor, int]] = []
        self._ready()

    @property
    def multiplier(self) -> Multiplier:
        """The multiplier of the table as it is now."""
        self._ready()
        return self._multiplier

    @property
    def path(self) -> str:
        """The way that is taken for the weight and the table as they are now."""
        return self._ready().path

    @property
    def in_features(self) -> int:
        """K, the inner dimension."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N, the outputs."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Y (..., N) of int8 X (..., K): int32, or int64 where K times the largest product asks.

        Raises:
            TypeError: x is not int8; for training there is `straight_through`.
            ValueError: its last dimension is not K, or it holds a -128 that is not admitted.
        """
        if not isinstance(x, Tensor) or x.dtype != torch.int8:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"x is {found}: it must be torch.int8. To train through the layer, call "
                "straight_through with floating x."
            )
        flat = self._flat(x)
        return self._ready().product(flat).reshape(*x.shape[:-1], self.out_features)

    def straight_through(self, x: Tensor) -> Tensor:
        """The same for a floating X (..., K) of int8 values, with the exact layer's gradient.

        Raises:
            TypeError, ValueError: see `straight_through_product`.
        """
        codes = self._flat(_as_int8(x, "x"))
        flat, weight = x.reshape(codes.shape), self.weight.to(x.dtype)
        y = _StraightThrough.apply(flat, weight, codes, self._ready())
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, multiplier and path, for `print(layer)`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        if self.weight.is_meta:  # without numbers there is no path yet
            return f"{sizes}, multiplier={self._multiplier.name!r}"
        multiplier, path = self.multiplier, self.path
        way = {
            "exact": "exact on these weights: one GEMM",
            "gemm": "int8 GEMMs",
            "lookup": "table look-up",
        }[path]
        if path == "gemm":
            way = f"{multiplier.gemm.count} {way}"
        return f"{sizes}, multiplier={multiplier.name!r}, path={path!r} ({way})"

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: its last dimension must be "
                f"in_features={self.in_features}."
            )
        if x.device != self.weight.device:
            raise ValueError(
                f"x is on {x.device} and the layer on {self.weight.device}: move one of them."
            )
        return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)

    def _ready(self) -> "_Prepared":
        """What the product needs of weight and table, made anew after one of them changed."""
        for name in ("weight", "table"):
            if getattr(self, name).is_inference():  # copied, moved or loaded in inference mode
                with torch.inference_mode(False):  # a copy that counts its changes
                    setattr(self, name, getattr(self, name).clone())
        weight, table = self.weight, self.table
        if not self._prepared_from or any(
            now is not before or now._version != version
            for now, (before, version) in zip((weight, table), self._prepared_from, strict=True)
        ):
            with torch.inference_mode(False):
                self._multiplier = self._multiplier_of(table)
                path = choose_path(weight, self._multiplier, self.asked_path)
                self._prepared = _prepare(weight, self._multiplier, path)
            self._prepared_from = [(weight, weight._version), (table, table._version)]
        return self._prepared

    def _multiplier_of(
        self, table: Tensor, convention: str | None = None, name: str | None = None
    ) -> Multiplier:
        """The layer's multiplier or a shipped one, if the table is theirs; else one made of it."""
        convention = convention or self._multiplier.convention
        values = table.numpy(force=True)
        for known in (self._multiplier, *map(find_multiplier, multiplier_names())):
            named = known.convention == convention and name in (None, known.name)
            if named and np.array_equal(known.table, values):
                return known
        return Multiplier.from_table(values, name or "table", convention)

    def _forget(self) -> None:
        self._prepared, self._prepared_from = None, []

    def _apply(self, fn, recurse=True):
        self._forget()  # what was prepared is on the old device
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        found = self._multiplier if self.table.is_meta else self._multiplier_of(self.table)
        if hasattr(destination, "_metadata"):
            said = {"convention": found.convention, "multiplier": found.name}
            destination._metadata.setdefault(prefix[:-1], {}).update(said)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        """Load weight and table, if they are what this layer can multiply with."""
        weight, table = (state_dict.get(prefix + name) for name in ("weight", "table"))
        convention, name = (local_metadata.get(key) for key in ("convention", "multiplier"))
        multiplier = self._multiplier
        try:
            if isinstance(table, Tensor) and not table.is_meta:
                multiplier = self._multiplier_of(table, convention, name)
                if multiplier is not self._multiplier and convention is None:
                    _refuse_unsigned(multiplier, prefix)
            if isinstance(weight, Tensor) and not weight.is_meta:
                _check_weight(weight, multiplier, f"{prefix}weight")
        except (TypeError, ValueError) as problem:
            rest[-1].append(str(problem))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if multiplier.table.shape == self.table.shape:  # else the size was refused
            self._multiplier = multiplier
        self._forget()

    def __getstate__(self):
        return {**self.__dict__, "_prepared": None, "_prepared_from": []}


# --- one int8 GEMM --------------------------------------------------------------------------------


def _int8_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a bᵀ as int32, for int8 a (M, K) and b (N, K) with K <= GEMM_BLOCK: the one GEMM used here.

    It is `exact_product`, by the method that was proved exact on this device. Where that is the
    plain int8 GEMM its checks are skipped, and `out` is memory that it may use for the result: a
    fresh one of 128 KiB and more is mapped and unmapped by the system at every call.
    """
    if chosen_method(a.device) == "int8_product":
        return engine_for(a.device).gemm(as_rows(a), as_rows(b).t(), out)
    return exact_product(a, b)


# --- scratch memory -------------------------------------------------------------------------------

_kept = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the next call of this thread uses again; no result is made of it.

    Fresh temporaries of megabytes are mapped and unmapped by the system at every call, which costs
    more than to fill them. CUDA's allocator keeps memory itself, and knows who still reads it.
    """
    elements = math.prod(shape)
    if device.type != "cpu" or elements * dtype.itemsize > KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    buffers = _kept.__dict__
    key = f"{name} {dtype}"
    if key not in buffers or buffers[key].numel() < elements:
        with torch.inference_mode(False):  # else it could not be written to outside of it
            buffers[key] = torch.empty(elements, dtype=dtype)
    return buffers[key][:elements].view(shape)


# --- the product, by each path --------------------------------------------------------------------


class _Prepared:
    """Weights made ready for one path; `product(x)` is the whole product."""

    path: str

    def __init__(self, w: Tensor, multiplier: Multiplier):
        self.multiplier = multiplier
        self.N, self.K = w.shape
        # Partial sums may wrap on the way in int32: additions modulo 2**32 end where they should
        # as soon as the sum itself fits.
        fits = self.K * multiplier.largest_product <= 2**31 - 1
        fits = fits and self.K <= INT32_MAX_IN_FEATURES
        self.accumulator = torch.int32 if fits else torch.int64

    def product(self, x: Tensor) -> Tensor:
        """Y (M, N) of int8 X (M, K)."""
        _check_admitted(x, "x", self.multiplier, 1)
        y = torch.empty((len(x), self.N), dtype=self.accumulator, device=x.device)
        if x.numel() and self.N:
            self.fill(x, y)
            return y
        return y.zero_()

    def fill(self, x: Tensor, y: Tensor) -> None:
        """Write the product into y, whatever it holds."""
        raise NotImplementedError


class _Chunk(NamedTuple):
    """Up to 16 columns of factors that are looked up at once.

    keys: the input's operands that one index covers: 2, as the 65,536 pairs of bytes, or 1.
    rows: what an index gives, as one element of 2 to 16 bytes.
    weights: for each K block, the weights' factors int8 (N, block · columns).
    """

    scale: int
    columns: int
    keys: int
    rows: Tensor
    weights: list[Tensor]


class _GemmPrepared(_Prepared):
    """One int8 GEMM for each product of an input's and a weight's function."""

    path = "gemm"

    def __init__(self, w: Tensor, multiplier: Multiplier):
        super().__init__(w, multiplier)
        gemm, codes = multiplier.gemm, w.view(torch.uint8).long()

        def mapped(factors: np.ndarray) -> Tensor:
            return _spread(torch.from_numpy(factors).to(w.device)[codes])

        self.linear = None if gemm.linear is None else mapped(gemm.linear)
        self.terms = [(mapped(factors), term, xor) for factors, term, xor in gemm.bit_terms]
        widest = max((weights.shape[1] for weights, _ in gemm.columns.values()), default=1)
        # An even number of operands: they are looked up in pairs.
        self.block = max(2, COLUMN_BYTES // min(widest, 16) // 2 * 2)
        self.chunks = []
        for scale, (weights, inputs) in gemm.columns.items():
            for start, count, columns in _chunks(weights.shape[1]):
                pad = ((0, 0), (0, columns - count))
                part = np.pad(weights[:, start : start + count], pad)
                of_input = np.pad(inputs[:, start : start + count], pad)
                keys, rows = _rows_by_index(of_input)
                blocks = []
                for block in codes.split(self.block, dim=1):
                    even = torch.from_numpy(part).to(w.device)[block]  # (N, block, columns)
                    even = F.pad(even, (0, 0, 0, block.shape[1] % 2))
                    blocks.append(_spread(even.reshape(self.N, even.shape[1] * columns)))
                self.chunks.append(_Chunk(scale, columns, keys, rows.to(w.device), blocks))

    def fill(self, x: Tensor, y: Tensor) -> None:
        """Row blocks of x that fit the scratch memory; each through every GEMM."""
        columns = max((chunk.columns for chunk in self.chunks), default=1)
        row_bytes = max(self.K, min(self.K, self.block) * columns, 4 * self.N)
        rows = len(x) if x.device.type == "cuda" else max(256, SCRATCH_BYTES // row_bytes)
        for x_rows, y_rows in zip(x.split(rows), y.split(rows), strict=True):
            out = _scratch("sum", y_rows.shape, torch.int32, x.device)
            if self.linear is None:
                y_rows.zero_()
            elif self.accumulator == torch.int32 and self.K <= GEMM_BLOCK:
                found = _int8_gemm(x_rows, self.linear, y_rows)
                if found.data_ptr() != y_rows.data_ptr():
                    y_rows.copy_(found)
            else:
                _add_gemm(x_rows, self.linear, y_rows.zero_(), out)
            for weights, term, xor in self.terms:
                _add_gemm(_embed(x_rows, term, xor), weights, y_rows, out)
            if self.chunks:
                self._add_chunks(x_rows, y_rows, out)

    def _add_chunks(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        for i, k in enumerate(range(0, self.K, self.block)):
            x_block = x[:, k : k + self.block]
            for chunk in self.chunks:
                part = _int8_gemm(_look_up(x_block, chunk.keys, chunk.rows), chunk.weights[i], out)
                y.add_(part if chunk.scale == 1 else _scaled(part, chunk.scale, y))


class _LookupPrepared(_Prepared):
    """The table itself, by rows of it, or by single look-ups where x has few rows.

    For one k, `table[w[:, k], v]` for all n and v is a matrix with a row for every value v of an
    input; x[m, k] chooses one, and adding up the chosen rows over k is an embedding bag. Its floats
    are whole numbers whose partial sums stay within 2**24, hence exact: a larger table is split in
    two digits, and sums are moved to integers before they can grow beyond.
    """

    path = "lookup"

    def __init__(self, w: Tensor, multiplier: Multiplier):
        super().__init__(w, multiplier)
        self.codes = w.view(torch.uint8).int()
        by_input = torch.from_numpy(multiplier.operand_table.T.copy()).to(w.device)  # (x, w)
        self.by_input = by_input
        low = (by_input + 2**14) % 2**15 - 2**14
        parts = [(1, low), (2**15, (by_input - low) >> 15)]
        if multiplier.largest_product <= 2**17:
            parts = [(1, by_input)]
        self.parts = [
            (scale, part.float(), max(1, 2**24 // max(1, int(part.abs().max()))))
            for scale, part in parts
        ]

    def fill(self, x: Tensor, y: Tensor) -> None:
        """Few rows one by one; many by rows of the table."""
        y.zero_()
        if len(x) <= GATHER_ROWS:
            table, codes = self.by_input.flatten(), self.codes
            for x_row, y_row in zip(x.view(torch.uint8).int() * 256, y, strict=True):
                y_row.add_(table[x_row + codes].sum(1))  # of (N, K)
            return
        for scale, table, limit in self.parts:
            n_step = min(self.N, 128)
            k_step = max(1, min(2**18 // (256 * n_step), limit, self.K))
            for n in range(0, self.N, n_step):
                self._add_outputs(x, y[:, n : n + n_step], self.codes[n : n + n_step], k_step,
                                  scale, table, limit)  # fmt: skip

    def _add_outputs(
        self,
        x: Tensor,
        y: Tensor,
        codes: Tensor,
        k_step: int,
        scale: int,
        table: Tensor,
        limit: int,
    ) -> None:
        total = torch.zeros(y.shape, dtype=torch.float32, device=x.device)
        summed = 0
        for k in range(0, self.K, k_step):
            columns = codes[:, k : k + k_step].T  # (k, n)
            count = len(columns)
            if summed + count > limit:
                y.add_(_scaled(total, scale, y))
                total.zero_()
                summed = 0
            # (v, k, n): row v · count + k is table[w[:, k], v]
            rows = torch.index_select(table, 1, columns.reshape(-1)).view(256 * count, -1)
            index = x[:, k : k + count].contiguous().view(torch.uint8).int().mul_(count)
            index.add_(torch.arange(count, dtype=torch.int32, device=x.device))
            total.add_(F.embedding_bag(index, rows, mode="sum"))
            summed += count
        y.add_(_scaled(total, scale, y))


def _prepare(w: Tensor, multiplier: Multiplier, path: str) -> _Prepared:
    """Weights that `choose_path` has checked, made ready for the path that it gave."""
    if path == "lookup":
        return _LookupPrepared(w, multiplier)
    if path == "exact":
        prepared = _GemmPrepared(w, find_multiplier("exact"))
        prepared.path = path
        prepared.multiplier = multiplier  # whose convention says what is admitted
        return prepared
    return _GemmPrepared(w, multiplier)


def _add_gemm(a: Tensor, b: Tensor, y: Tensor, out: Tensor) -> None:
    for k in range(0, a.shape[1], GEMM_BLOCK):
        block = slice(k, k + GEMM_BLOCK)
        y.add_(_int8_gemm(a[:, block], b[:, block], out))


def _scaled(part: Tensor, scale: int, y: Tensor) -> Tensor:
    """part · scale in y's dtype; in int32 modulo 2**32, as the sum's bound allows."""
    whole = part.long() if y.dtype == torch.int64 or scale >= 2**31 else part.to(y.dtype)
    return (whole * scale).to(y.dtype) if scale != 1 else whole


def _embed(x: Tensor, term: BitTerm, xor: bool) -> Tensor:
    """x ^ term(|x|), or s·term(|x|), as scratch memory (M, K) of int8.

    In blocks of rows, so that the intermediate is small.
    """
    embedded = _scratch("embedded", x.shape, torch.int8, x.device)
    rows = len(x) if x.device.type == "cuda" else max(1, EMBED_BYTES // x.shape[1])
    doubled = _scratch("doubled", (min(rows, len(x)), x.shape[1]), torch.int8, x.device)
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


def _spread(w: Tensor) -> Tensor:
    """The same weights (N, K) with 64 bytes between their rows.

    Rows that begin a multiple of 4 KiB apart share the same few places in a processor's cache: of
    K = 16,384 a GEMM takes a sixth longer for it.
    """
    return F.pad(w, (0, 64))[:, : w.shape[1]] if w.device.type == "cpu" else w


def _chunks(columns: int) -> Iterator[tuple[int, int, int]]:
    """Cut columns into (start, count, padded count): 16s, 8, 4, 2, 1.

    A look-up of a chunk takes as long as two GEMMs, whatever its width: a chunk is filled up with
    one column of zeros before it is made of two.
    """
    start = 0
    while columns:
        size = 16 if columns >= 15 else max(s for s in (1, 2, 4, 8) if s - 1 <= columns)
        count = min(size, columns)
        yield start, count, size
        start, columns = start + count, columns - count


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


def _look_up(x: Tensor, keys: int, rows: Tensor) -> Tensor:
    """The factors of every element of x (M, k), side by side, as scratch memory (M, k · c) int8.

    An index is int32, four times as large as what it is made of: few rows at a time, so that it is
    still in the cache when it is used. An odd k gets a zero, which has no factor's weight.
    """
    if x.shape[1] % 2:
        x = F.pad(x, (0, 1))
    if keys == 1:
        keyed = x.view(torch.uint8)
    else:
        if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
            # Not x.contiguous(), which gives back a single row with an odd stride as it is.
            x = x.clone(memory_format=torch.contiguous_format)
        keyed = x.view(torch.int16)
    M, k = keyed.shape
    found = _scratch("rows", (M, k), rows.dtype, x.device)
    step = M if x.device.type == "cuda" else max(1, INDEX_BYTES // (4 * k))
    indices = _scratch("index", (min(step, M), k), torch.int32, x.device)
    for part, to in zip(keyed.split(step), found.split(step), strict=True):
        index = indices[: len(part)].copy_(part)
        if keys == 2:
            index.bitwise_and_(0xFFFF)
        torch.index_select(rows, 0, index.view(-1), out=to.view(-1))
    return found.view(torch.int8)


# --- operands and gradients -----------------------------------------------------------------------


def _check_weight(w: Tensor, multiplier: Multiplier, name: str = "w") -> None:
    if not isinstance(w, Tensor) or w.dtype != torch.int8:
        found = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(
            f"{name} is {found}: it must be torch.int8. Quantize floating weights, for example "
            "with quantize_fibonacci; integers outside -128..127 have no place in it."
        )
    if w.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(w.shape)}: it must be (out_features, in_features)."
        )
    _check_admitted(w, name, multiplier, 0)


def _refuse_unsigned(multiplier: Multiplier, prefix: str) -> None:
    """A 'signed' table is not zero wherever an operand is -128; an 'unsigned' one is, at 0."""
    table = multiplier.table
    if multiplier.convention == "signed" and not (table[0].any() or table[:, 0].any()):
        raise ValueError(
            f"{prefix}table comes without its convention and would say that every product with "
            "-128 is 0: it looks like an 'unsigned' table, and this layer is 'signed'. Load what "
            "state_dict() gave, which says the convention, or make the layer of its convention."
        )


def _check_admitted(t: Tensor, name: str, multiplier: Multiplier, axis: int) -> None:
    if multiplier.admits[axis] or not t.numel() or int(t.min()) > -128:
        return
    i, j = (t == -128).nonzero()[0].tolist()
    raise ValueError(
        f"{name}[{i}, {j}] is -128, and the table of {multiplier.name!r} ends at magnitude 127: "
        f"it admits no such {('weight', 'input')[axis]}. Clamp to -127, or give a table with 129 "
        f"{('rows', 'columns')[axis]}."
    )


def _as_int8(t: Tensor, name: str) -> Tensor:
    """The int8 values that a floating tensor holds, if it holds nothing else."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        found = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} is {found}: a gradient is taken of floating operands.")
    values = t.detach()
    wrong = (values != values.round()) | (values < -128) | (values > 127) | values.isnan()
    if bool(wrong.any()):
        raise ValueError(
            f"{name} holds {float(values[wrong][0])!r}: every element must be a whole number in "
            "-128..127; scale and round it first, straight through as well."
        )
    return values.to(torch.int8)


class _StraightThrough(torch.autograd.Function):
    """Forward the inexact product, backward the exact product's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, codes: Tensor, prepared: _Prepared) -> Tensor:
        ctx.save_for_backward(x, w)
        return prepared.product(codes).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w = ctx.saved_tensors
        grad_x = grad @ w.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad.T @ x.to(grad.dtype)).to(w.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None, None
