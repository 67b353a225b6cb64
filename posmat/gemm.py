"""The product of a fully connected layer as GEMMs: exact, by the fastest engine of the machine.

    float32_product           float32 GEMMs over K blocks that float32 sums exactly: right anywhere
    int8_product              one int8 GEMM, `torch._int_mm`, where that is exact
    one_sided_product         2 W X⁺ - W |X|: the inputs as bytes without a sign, two GEMMs
    positive_matrix_product   W⁺ (X + 128) - W⁻ (X + 128) - 128 Σ W: no multiplication of a negative
                              number, two GEMMs

Every method takes int8 X (M, K) and int8 W (N, K), or what was prepared of W before, and gives the
integer Y (M, N): int32 where that holds every sum, int64 beyond. Each is a sum of GEMMs, and an
*engine* multiplies: int8 where the processor has that, is fast at it and was found exact for the
range of the operands; else float32. The choice between the methods is in `posmat.exact`.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.problem import NotAvailable, check_operands
from posmat.products import accumulator_dtype
from posmat.proof import BYTES, INT8, MAGNITUDES, choose, circumstances, require_exact

# Bytes of X's parts that are formed at a time on a CPU, for 128 outputs and one thread. Smaller
# blocks stay nearer to the processor until the GEMM reads them, and cost more calls than they gain.
BLOCK_BYTES = 2304 * 1024
SCRATCH_LIMIT = 16 * 2**20  # a larger scratch buffer is given back to the system after the call
MOST_VIEWS = 64  # of one buffer that are kept
LARGEST = {torch.int8: 128, torch.uint8: 255}  # the largest magnitude of a left operand
# Rows that begin a multiple of 4 KiB apart share the same few places in a processor's cache, and a
# GEMM over them takes up to a sixth longer: what is laid out here has so many elements in between.
ROW_GAP = 64


# --- scratch memory ------------------------------------------------------------------------------


class _Kept(threading.local):
    def __init__(self):
        # A buffer, and its views by their shapes: after a GEMM, which leaves nothing else in the
        # caches, making a view takes as long as to add up a small result.
        self.buffers: dict[tuple[str, torch.dtype], tuple[Tensor, dict[tuple, Tensor]]] = {}


_kept = _Kept()


def scratch(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, gap: int = 0
) -> Tensor:
    """Memory of this name that the thread's next call uses again; no result is made of it.

    A fresh temporary of megabytes is mapped and unmapped by the system at every call, which costs
    more than to fill it. CUDA has an allocator that keeps memory, and knows which stream still
    reads it: there it is always fresh.

    Args:
        gap: elements between the rows of a matrix, on a CPU.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    shape = tuple(shape)
    buffer, views = _kept.buffers.get((name, dtype), (None, {}))
    found = views.get(shape)
    if found is not None:
        return found
    width = shape[-1] + gap
    elements = math.prod(shape[:-1]) * width
    # A tensor that was made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        if buffer is None or buffer.numel() < elements:
            buffer, views = torch.empty(elements, dtype=dtype, device=device), {}
            if elements * dtype.itemsize <= SCRATCH_LIMIT and type(buffer) is Tensor:
                _kept.buffers[name, dtype] = buffer, views
        if len(views) >= MOST_VIEWS:
            views.clear()
        rows = buffer[:elements].view(*shape[:-1], width)
        view = views[shape] = rows[..., : shape[-1]]
    return view


def release_scratch() -> None:
    """Give back what this thread's calls have kept for the next ones: some MB at the most."""
    _kept.buffers.clear()


# --- engines: how a device multiplies ------------------------------------------------------------


class Engine(NamedTuple):
    """One way to multiply a (M, K), int8 or uint8, by b (K, R), int8.

    gemm: (a, b, out) -> a b as int32 (M, R), exact while no partial sum can exceed `largest_sum`;
        b is int8 or rows of what `prepare` gave, and `out` is memory that it may use.
    prepare: int8 weights (R, K) -> (K, R), laid out for the engine.
    """

    name: str
    largest_sum: int
    gemm: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    prepare: Callable[[Tensor], Tensor]

    def longest(self, largest_product: int) -> int:
        """The largest K that is exact, whatever the order of summation; in eights, as CUDA asks."""
        return max(1, self.largest_sum // largest_product // 8 * 8)


def as_rows(t: Tensor) -> Tensor:
    """The same matrix with rows of adjacent elements, copied only where it must be.

    oneDNN takes the strides at their word, also those that PyTorch counts as contiguous because
    their dimension is 1 long; an expanded matrix (stride 0) gives it wrong numbers.
    """
    rows, columns = t.shape
    if t.stride(1) == 1 and t.stride(0) >= columns and columns > 1:
        return t
    t = t.contiguous()
    return t if t.stride() == (columns, 1) else t.as_strided((rows, columns), (columns, 1))


def direct_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """One int8 GEMM of a CPU, which takes both signed and unsigned bytes on its left."""
    if a.shape[1] == 1:
        # The strides of a (1, N) matrix that was transposed are those of a row and of a column.
        # oneDNN mistakes one for the other, and returns memory that it has never written.
        return a.int() * b.int()
    a, b = as_rows(a), as_rows(b.t()).t()
    return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)


def padded_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """One int8 GEMM of a CUDA device, which takes int8 only, M above 16, and N and K in eights.

    Zeros fill up what is missing, and cuBLASLt wants rows to begin where it can load from: what is
    a part of a wider matrix may have to be copied. Bytes are split into their upper bit and their
    lower seven, a = (a & 127) + 128 (a >> 7), without a look at the data, which would have to wait
    for it.
    """
    if a.dtype == torch.uint8:
        low = padded_gemm((a & 127).view(torch.int8), b)
        high = padded_gemm((a >> 7).view(torch.int8), b)
        return low.add_(high, alpha=128)
    M, N = a.shape[0], b.shape[1]
    a, b = as_rows(a), as_rows(b.t())
    y = torch._int_mm(aligned(pad(a, 8, at_least=24)), aligned(pad(b, 8)).t())
    return y[:M, :N].contiguous()


def pad(t: Tensor, multiple: int, at_least: int = 0) -> Tensor:
    """Add rows and columns of zeros up to the next multiple, and rows up to `at_least`."""
    rows, columns = t.shape
    more_rows = max(at_least, -(-rows // multiple) * multiple) - rows
    more_columns = -columns % multiple
    return F.pad(t, (0, more_columns, 0, more_rows)) if more_rows or more_columns else t


def aligned(t: Tensor) -> Tensor:
    """The same int8 matrix with its first row at a multiple of 16 bytes and all rows in eights."""
    if t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def float32_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """One float32 GEMM, of operands whose sums float32 holds.

    Autocast would round the sum to 8 or 11 bits; it leaves alone what is written to `out`. TF32 and
    bfloat16, where they were asked for, hold bytes without rounding.
    """
    M, R, device = a.shape[0], b.shape[1], a.device
    left = scratch("left", a.shape, torch.float32, device, ROW_GAP).copy_(a)
    if b.dtype != torch.float32:  # a copy of rows as rows takes a third of one that transposes
        b = scratch("right", (R, len(b)), torch.float32, device, ROW_GAP).copy_(b.t()).t()
    total = torch.mm(left, b, out=scratch("total", (M, R), torch.float32, device))
    return total.int() if out is None else out.copy_(total)


def _with_gaps(w: Tensor) -> Tensor:
    return F.pad(w, (0, ROW_GAP))[:, : w.shape[1]].t()


def _as_rows_of_outputs(w: Tensor) -> Tensor:
    return w.t().to(torch.float32, memory_format=torch.contiguous_format).contiguous()


ENGINES = {
    "direct": Engine("int8", 2**31 - 1, direct_gemm, _with_gaps),
    "padded": Engine("int8", 2**31 - 1, padded_gemm, lambda w: as_rows(w).t()),
    "float32": Engine("float32", 2**24, float32_gemm, _as_rows_of_outputs),
}


def int8_engine(device: torch.device) -> Engine:
    """The engine of `torch._int_mm`, whether or not the device is good at it."""
    return ENGINES["direct" if device.type == "cpu" else "padded"]


def engine_for(device: torch.device, operands: str = INT8) -> Engine:
    """The fastest engine that was found exact on a device, for left operands of a range.

    Args:
        operands: INT8, MAGNITUDES (bytes to 128) or BYTES (to 255), which saturate sums in 16 bits
            where bytes to 128 do not.

    Raises:
        NotAvailable: none is exact, which no known device is the case for.
    """
    key = operands, circumstances(device)
    engine = _engines.get(key)
    if engine is None:
        choice = choose({"int8": by_int8, "float32": by_float32}, device, operands)
        if choice.name is None:
            raise NotAvailable(f"no GEMM is exact on {device} for {operands}: {choice.told()}.")
        engine = int8_engine(device) if choice.name == "int8" else ENGINES["float32"]
        _engines[key] = engine
    return engine


_engines: dict[tuple, Engine] = {}


# --- sums of GEMMs -------------------------------------------------------------------------------


class Form(NamedTuple):
    """What a GEMM takes of X in the place of X.

    make: x (m, k), int8 -> a part (m, k · width) of `dtype`, as scratch memory.
    operands: the range of the part.
    width: columns of the part for each of x.
    block_bytes: of the part that are made at a time on a CPU, for 128 outputs and one thread.
    """

    make: Callable[[Tensor], Tensor]
    operands: str = INT8
    width: int = 1
    block_bytes: int = BLOCK_BYTES


class Term(NamedTuple):
    """scales[i] · form(X) W_iᵀ, added up over the matrices W_i that stand one below the other.

    weights: (K · width, len(scales) · N), int8 or as the engine prepared it.
    longest: the most of the rows of `weights` that the engine may sum at once.
    form: None for X itself.
    """

    weights: Tensor
    longest: int
    form: Form | None = None
    scales: tuple[int, ...] = (1,)


def sum_of_gemms(
    x: Tensor,
    terms: Sequence[Term],
    N: int,
    engine: Engine,
    accumulator: torch.dtype,
    start: Tensor | None = None,
) -> Tensor:
    """The sum of terms, (M, N): in int32 modulo 2**32, which is right where the whole sum fits.

    start: (N,) in the dtype of the accumulator, what every row begins with.
    """
    (M, K), device = x.shape, x.device
    if 0 in (M, N, K) or not terms:
        return torch.zeros((M, N), dtype=accumulator, device=device)
    first = terms[0]
    if (
        first.form is None
        and first.scales == (1,)
        and accumulator == torch.int32
        and first.longest >= K
        and start is None
    ):
        y = engine.gemm(x, first.weights, None)
        terms = terms[1:]
    elif start is None:
        y = torch.zeros((M, N), dtype=accumulator, device=device)
    else:
        y = start.expand(M, N).clone(memory_format=torch.contiguous_format)
    for term in terms:
        _add_term(x, y, term, engine)
    return y


def _add_term(x: Tensor, y: Tensor, term: Term, engine: Engine) -> None:
    (M, K), N, device = x.shape, y.shape[1], x.device
    weights, longest, form, scales = term
    width = form.width if form else 1
    rows, columns = _block_sizes(M, N, K, device, max(1, longest // width), form, engine)
    if y.dtype == torch.int32:  # what is multiplied modulo 2**32 may be scaled modulo 2**32
        scales = tuple((scale + 2**31) % 2**32 - 2**31 for scale in scales)
    # Views take time: where there is one block, there are none.
    w_blocks = weights.split(columns * width) if columns < K else (weights,)
    in_rows = zip(x.split(rows), y.split(rows), strict=True) if rows < M else ((x, y),)
    for x_rows, y_rows in in_rows:
        x_blocks = x_rows.split(columns, 1) if columns < K else (x_rows,)
        for x_block, w_block in zip(x_blocks, w_blocks, strict=True):
            part = form.make(x_block) if form else x_block
            out = scratch("sum", (len(x_rows), w_block.shape[1]), torch.int32, device)
            found = engine.gemm(part, w_block, out)
            if len(scales) == 1:
                y_rows.add_(found, alpha=scales[0])
                continue
            for scale, one in zip(scales, found.split(N, 1), strict=True):
                y_rows.add_(one, alpha=scale)


def _block_sizes(
    M: int, N: int, K: int, device: torch.device, longest: int, form: Form | None, engine: Engine
) -> tuple[int, int]:
    """Rows and columns of X that are taken at a time.

    The more outputs there are, the less forming the parts matters, and the more adding up the K
    blocks: the columns grow with N.
    """
    if device.type != "cpu" or (form is None and engine.name == "int8"):
        return M, min(K, longest)
    width, block_bytes = (form.width, form.block_bytes) if form else (1, BLOCK_BYTES)
    elements = block_bytes * min(max(N // 128, 1), 8) * min(torch.get_num_threads(), 8) // width
    columns = min(K, longest, max(1, elements // min(M, 256)))
    if columns > 1:
        columns -= columns % 2 if columns < K else 0  # look-ups take pairs
    rows = min(M, max(256, min(elements // columns, 2**20 // N)))
    return rows, columns


def by_int8(a: Tensor, w: Tensor) -> Tensor:
    """a Wᵀ by `torch._int_mm`, for int8 or uint8 a: what the probe tries."""
    return _plain(a, w, int8_engine(a.device))


def by_float32(a: Tensor, w: Tensor) -> Tensor:
    """a Wᵀ by float32 GEMMs over K blocks, for int8 or uint8 a: what the probe tries."""
    return _plain(a, w, ENGINES["float32"])


def _plain(a: Tensor, w: Tensor, engine: Engine) -> Tensor:
    weights = w.matrix if isinstance(w, Float32Weight) else w.t()
    term = Term(weights, engine.longest(LARGEST[a.dtype] * 128))
    return sum_of_gemms(a, [term], weights.shape[1], engine, accumulator_dtype(a.shape[1]))


# --- the methods ---------------------------------------------------------------------------------


def _part(name: str, x: Tensor) -> Tensor:
    return scratch(name, x.shape, torch.int8, x.device)


def _magnitude(x: Tensor) -> Tensor:
    return torch.abs(x, out=_part("part", x)).view(torch.uint8)  # |-128| has the bits of 128


def _positive_part(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=_part("part", x)).view(torch.uint8)


def _shifted(x: Tensor) -> Tensor:
    """X + 128, 0 to 255: the same bits but the first, read without a sign."""
    return torch.bitwise_xor(x, -128, out=_part("part", x)).view(torch.uint8)


MAGNITUDE = Form(_magnitude, MAGNITUDES)
POSITIVE_PART = Form(_positive_part, MAGNITUDES)
SHIFTED = Form(_shifted, BYTES)


class Float32Weight(NamedTuple):
    """int8 weights kept as float32 (K, N) for `float32_product`."""

    matrix: Tensor


class PositiveWeight:
    """What `positive_matrix_product` needs of int8 weights W (N, K), as they were when prepared.

    parts: int8, one below the other: W⁺ = max(W, 0); W⁻ = max(-W, 0), with 127 where it would be
        128; and only where W has a -128 a third matrix, with 1 at those places.
    start: (N,), -128 Σ W, in the dtype of the product.
    """

    def __init__(self, w: Tensor):
        N, K = w.shape
        lowest = w == -128
        parts = [w.clamp(min=0), w.clamp(min=-127).neg().clamp(min=0)]
        if bool(lowest.any()):
            parts.append(lowest.to(torch.int8))
        self.shape, self.device = (N, K), w.device
        self.parts = torch.cat(parts)
        self.scales = (1, -1, -1)[: len(parts)]
        self.start = (-128 * w.sum(1, dtype=torch.int64)).to(accumulator_dtype(K))
        self._terms: dict[str, Term] = {}

    def term(self, engine: Engine) -> Term:
        """The sum's only term, as `lay_out` made it; without that, of the parts as they are."""
        found = self._terms.get(engine.name)
        return found or Term(self.parts.t(), engine.longest(255 * 128), SHIFTED, self.scales)

    def lay_out(self, engine: Engine) -> None:
        """Make the parts ready for an engine."""
        longest, weights = longest_block(self.parts, 255, engine), engine.prepare(self.parts)
        self._terms[engine.name] = Term(weights, longest, SHIFTED, self.scales)


def longest_block(w: Tensor, largest: int, engine: Engine) -> int:
    """How many columns of w (R, K) an engine may sum at once, for left operands up to `largest`.

    Guaranteed for any weights, or more where these are small enough: the columns are cut into the
    fewest blocks of one length, in eights, that no row's sum of magnitudes is too large for.
    """
    K, guaranteed = w.shape[1], engine.longest(largest * 128)
    if guaranteed >= K or not len(w):
        return guaranteed
    sums = F.pad(w.abs().view(torch.uint8).cumsum(1, dtype=torch.int64), (1, 0))
    most = engine.largest_sum // largest
    for blocks in range(max(1, -(-int(sums[:, -1].max()) // most)), -(-K // guaranteed)):
        length = -(-K // blocks // 8) * 8
        ends = torch.arange(0, K + length, length, device=w.device).clamp(max=K)
        if int(sums[:, ends].diff(dim=1).max()) <= most:
            return length
    return guaranteed


def prepare_positive(w: Tensor) -> PositiveWeight:
    """The non-negative parts of int8 weights (N, K), computed once and outside the clock.

    Raises:
        TypeError, ValueError: see `check_weight`.
    """
    check_weight(w)
    prepared = PositiveWeight(w)
    prepared.lay_out(engine_for(w.device, BYTES))
    return prepared


def prepare_float32(w: Tensor) -> Float32Weight:
    """int8 weights (N, K) as float32.

    Raises:
        TypeError, ValueError: see `check_weight`.
    """
    check_weight(w)
    return Float32Weight(ENGINES["float32"].prepare(w))


def check_weight(w: Tensor) -> None:
    """Refuse what is not a matrix of int8 weights (N, K).

    Raises:
        TypeError: w is not int8.
        ValueError: w is not a matrix.
    """
    if not isinstance(w, Tensor) or w.dtype != torch.int8:
        found = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"w is {found}: the weights must be torch.int8.")
    if w.ndim != 2:
        raise ValueError(
            f"w has shape {tuple(w.shape)}: it must be a matrix (out_features, in_features)."
        )


def require_kind(method: str, w: object, *prepared: type) -> None:
    """Refuse weights that were prepared for another method.

    Raises:
        TypeError: w is neither a tensor nor one of the types that `method` takes prepared.
    """
    if not isinstance(w, (Tensor, *prepared)):
        others = "".join(f" or a {kind.__name__}" for kind in prepared)
        raise TypeError(
            f"w is a {type(w).__name__}: {method} takes an int8 tensor{others}. Give it the "
            "weights themselves, or what was prepared for it."
        )


def float32_product(x: Tensor, w: Tensor | Float32Weight) -> Tensor:
    """float32 GEMMs over blocks of at most 1,024 of K, added up as integers.

    1,024 products of int8 numbers sum to 2**24 at the most, and float32 holds every integer up to
    there: exact on any device, in any order of summation.

    Raises:
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("float32_product", w, Float32Weight)
    prepared = isinstance(w, Float32Weight)
    check_operands(x, like_int8(*w.matrix.shape[::-1], w.matrix.device) if prepared else w)
    return by_float32(x, w)


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """One int8 GEMM, `torch._int_mm`, also where PyTorch has but a slow loop for it.

    Raises:
        NotAvailable: it is not exact on this machine. An x86 processor without VNNI sums pairs of
            products in 16 bits, which saturate.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("int8_product", w)
    check_operands(x, w)
    require_exact("int8_product", by_int8, x.device)
    return by_int8(x, w)


def one_sided_product(x: Tensor, w: Tensor) -> Tensor:
    """2 W X⁺ - W |X|, where X⁺ = max(X, 0): the inputs as bytes without a sign.

    With X = X⁺ - X⁻ and |X| = X⁺ + X⁻ it is W X⁺ - W X⁻. Magnitudes reach 128, so a pair of
    products with int8 weights stays within 2 · 128 · 127 and 2 · 128 · -128 = -2**15, which 16 bits
    just hold: the int8 engine is exact for it also where `int8_product` saturates.

    Raises:
        NotAvailable: no engine of this machine is exact.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("one_sided_product", w)
    check_operands(x, w)
    return one_sided(x, w, engine_for(x.device, MAGNITUDES))


def positive_matrix_product(x: Tensor, w: Tensor | PositiveWeight) -> Tensor:
    """W⁺ (X + 128) - W⁻ (X + 128) - 128 Σ W: every multiplication is between non-negative numbers.

    X + 128 is a byte, 0 to 255, the same bits as X but the first; W⁺ = max(W, 0) and
    W⁻ = max(-W, 0) are the weights' magnitudes, 0 to 128, each where the sign is its own. The last
    term is known with the weights. So a multiplier of a bare 8-bit input by a magnitude of 7 bits
    serves, whose product the weight's sign then adds or subtracts; a magnitude of 128 takes a third
    GEMM, of the ones that 127 misses. W⁺ and W⁻ are Fibonacci codes if |W| is one.

    Args:
        x: X (M, K), int8.
        w: W (N, K), int8, or its `PositiveWeight`, prepared before.

    Raises:
        NotAvailable: no engine of this machine is exact.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("positive_matrix_product", w, PositiveWeight)
    check_operands(x, w if isinstance(w, Tensor) else like_int8(*w.shape, w.device))
    weight = w if isinstance(w, PositiveWeight) else PositiveWeight(w)
    return positive(x, weight, engine_for(x.device, BYTES))


def one_sided(x: Tensor, w: Tensor, engine: Engine) -> Tensor:
    """`one_sided_product` without its checks, by one engine."""
    weights, longest = w.t(), engine.longest(128 * 128)
    terms = [
        Term(weights, longest, MAGNITUDE, (-1,)),
        Term(weights, longest, POSITIVE_PART, (2,)),
    ]
    return sum_of_gemms(x, terms, w.shape[0], engine, accumulator_dtype(x.shape[1]))


def one_sided_int8(x: Tensor, w: Tensor) -> Tensor:
    """`one_sided_product` by `torch._int_mm`: what the probe tries."""
    return one_sided(x, w, int8_engine(x.device))


def positive(x: Tensor, weight: PositiveWeight, engine: Engine) -> Tensor:
    """`positive_matrix_product` without its checks, by one engine."""
    N, K = weight.shape
    return sum_of_gemms(x, [weight.term(engine)], N, engine, accumulator_dtype(K), weight.start)


def like_int8(rows: int, columns: int, device: torch.device) -> Tensor:
    """A matrix of no memory with the shape and device of prepared weights, to check operands."""
    return torch.empty(1, dtype=torch.int8, device=device).expand(rows, columns)
