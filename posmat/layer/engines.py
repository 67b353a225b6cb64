"""Engines: how a machine multiplies matrices of bytes, exactly and fast, and sums of such GEMMs.

Every method here is a sum of GEMMs of parts of X with parts of W. An *engine* multiplies: int8
where the processor has that, is fast at it and was found exact for the range of the operands; else
float32, over K blocks whose sums float32 holds.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.layer.problem import NotAvailable
from posmat.layer.products import accumulator_dtype
from posmat.layer.proof import INT8, choose, circumstances

# Bytes of X's parts that are formed at a time on a CPU, for 128 outputs and one thread. Smaller
# blocks stay nearer to the processor until the GEMM reads them, and cost more calls than they gain.
BLOCK_BYTES = 2304 * 1024
SCRATCH_LIMIT = 16 * 2**20  # a larger scratch buffer is given back to the system after the call
MOST_VIEWS = 64  # of one buffer that are kept
LARGEST = {torch.int8: 128, torch.uint8: 255}  # the largest magnitude of a left operand
# Rows that begin a multiple of 4 KiB apart share the same few places in a processor's cache, and a
# GEMM over them takes up to a sixth longer: what is laid out here has so many elements in between.
ROW_GAP = 64


class _Kept(threading.local):
    def __init__(self):
        # (name, dtype) -> a buffer, and its views by their shapes: after a GEMM, which leaves
        # nothing else in the caches, making a view takes as long as to add up a small result.
        self.buffers: dict[tuple, tuple[Tensor, dict[tuple, Tensor]]] = {}


_kept = _Kept()


def scratch(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, gap: int = 0
) -> Tensor:
    """Memory of this name that the thread's next call uses again; no result is made of it.

    A fresh temporary of megabytes is mapped and unmapped by the system at every call, which costs
    more than to fill it. CUDA has an allocator that keeps memory, and knows which stream still
    reads it: there it is always fresh. `gap` elements lie between the rows, on a CPU.
    """
    shape = tuple(shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    buffer, views = _kept.buffers.get((name, dtype), (None, {}))
    found = views.get(shape)
    if found is not None:
        return found
    rows, width = shape[0], shape[1] + gap
    elements = rows * width
    # A tensor that was made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        if buffer is None or buffer.numel() < elements:
            buffer, views = torch.empty(elements, dtype=dtype, device=device), {}
            if elements * dtype.itemsize <= SCRATCH_LIMIT and type(buffer) is Tensor:
                _kept.buffers[name, dtype] = buffer, views
        if len(views) >= MOST_VIEWS:
            views.clear()
        view = views[shape] = buffer[:elements].view(rows, width)[:, : shape[1]]
    return view


def release_scratch() -> None:
    """Give back what this thread's calls have kept for the next ones: some MB at the most."""
    _kept.buffers.clear()


class Engine(NamedTuple):
    """One way to multiply a (M, K), int8 or uint8, by b (K, R), int8 or as it was prepared."""

    name: str
    largest_sum: int  # the product is exact while no partial sum can exceed it
    gemm: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (a, b, memory to use) -> int32 (M, R)
    prepare: Callable[[Tensor], Tensor]  # int8 weights (R, K) -> (K, R), laid out

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
    (M, K), (down, along), (first, column), N = a.shape, a.stride(), b.stride(), b.shape[1]
    if (  # CUDA takes both as they are: looked at at once, or it takes longer than the GEMM
        a.dtype == torch.int8
        and along == first == 1
        and M > 16
        and down >= K <= column
        and not (K | N | down | column) % 8
        and not (a.data_ptr() | b.data_ptr()) % 16
    ):
        return torch._int_mm(a, b)
    if a.dtype == torch.uint8:
        low = padded_gemm((a & 127).view(torch.int8), b)
        high = padded_gemm((a >> 7).view(torch.int8), b)
        return low.add_(high, alpha=128)
    y = torch._int_mm(in_eights(as_rows(a), 24), in_eights(as_rows(b.t())).t())
    return y if y.shape == (M, N) else y[:M, :N].contiguous()


def in_eights(t: Tensor, at_least: int = 0) -> Tensor:
    """The same int8 matrix as CUDA takes it, with rows of zeros up to `at_least` of them too."""
    rows, columns = t.shape
    more_rows, more_columns = max(at_least - rows, -rows % 8), -columns % 8
    if more_rows or more_columns:
        return F.pad(t, (0, more_columns, 0, more_rows))
    if t.stride(0) % 8 or t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t


def float32_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """One float32 GEMM, of operands whose sums float32 holds: TF32 and bfloat16 round no byte."""
    # Autocast would round the sum to 8 or 11 bits; it leaves alone what is written to `out`.
    M, R, device = a.shape[0], b.shape[1], a.device
    left = scratch("left", a.shape, torch.float32, device, ROW_GAP).copy_(a)
    if b.dtype != torch.float32:  # a copy of rows as rows takes a third of one that transposes
        b = scratch("right", (R, len(b)), torch.float32, device, ROW_GAP).copy_(b.t()).t()
    total = torch.mm(left, b, out=scratch("total", (M, R), torch.float32, device))
    return total.int() if out is None else out.copy_(total)


ENGINES = {
    "direct": Engine(
        "int8", 2**31 - 1, direct_gemm, lambda w: F.pad(w, (0, ROW_GAP))[:, : w.shape[1]].t()
    ),
    "padded": Engine("int8", 2**31 - 1, padded_gemm, lambda w: as_rows(w).t()),
    "float32": Engine(
        "float32",
        2**24,
        float32_gemm,
        lambda w: w.t().to(torch.float32, memory_format=torch.contiguous_format),
    ),
}


# The engine of `torch._int_mm` by kind of device, whether or not that is good at it.
INT8_ENGINES = defaultdict(lambda: ENGINES["padded"], cpu=ENGINES["direct"])
_engines: dict[tuple, Engine] = {}


def engine_for(device: torch.device, operands: str = INT8) -> Engine:
    """The fastest engine found exact on a device, for left operands INT8, MAGNITUDES or BYTES.

    Raises:
        NotAvailable: none is exact, which no known device is the case for.
    """
    key = operands, circumstances(device)
    engine = _engines.get(key)
    if engine is None:
        name, findings = choose({"int8": by_int8, "float32": by_float32}, device, operands)
        if name is None:
            told = "; ".join(f"{name}: {finding}" for name, finding in findings.items())
            raise NotAvailable(f"no GEMM is exact on {device} for {operands}: {told}.")
        engine = INT8_ENGINES[device.type] if name == "int8" else ENGINES["float32"]
        _engines[key] = engine
    return engine


class Form(NamedTuple):
    """What a GEMM takes of X in the place of X."""

    make: Callable[[Tensor], Tensor]  # x (m, k), int8 -> (m, k · width), a byte each, as scratch
    width: int = 1  # columns of the part for each of x
    block_bytes: int = BLOCK_BYTES  # of the part, made at a time


class Term(NamedTuple):
    """scales[i] · form(X) W_i, added up over matrices W_i (K · width, N) that lie side by side."""

    weights: Tensor  # (K · width, len(scales) · N), int8 or as the engine prepared it
    longest: int  # the most of these rows that the engine may sum at once
    form: Form | None = None  # None for X itself
    scales: tuple[int, ...] = (1,)


def sum_of_gemms(
    x: Tensor,
    terms: Sequence[Term],
    N: int,
    engine: Engine,
    accumulator: torch.dtype,
    start: Tensor | None = None,
) -> Tensor:
    """The sum of terms (M, N), each row on top of `start` (N,): in int32 modulo 2**32."""
    M, K = x.shape
    if 0 in (M, N, K) or not terms:
        return torch.zeros((M, N), dtype=accumulator, device=x.device)
    weights, longest, form, scales = terms[0]
    if start is not None:
        y = start.expand(M, N).clone(memory_format=torch.contiguous_format)
    elif form is None and scales == (1,) and accumulator == torch.int32 and longest >= K:
        y, terms = engine.gemm(x, weights, None), terms[1:]
    else:
        y = torch.zeros((M, N), dtype=accumulator, device=x.device)
    for term in terms:
        _add_term(x, y, term, engine)
    return y


def _add_term(x: Tensor, y: Tensor, term: Term, engine: Engine) -> None:
    (M, K), N = x.shape, y.shape[1]
    weights, longest, form, scales = term
    width = form.width if form else 1
    longest = max(1, longest // width // 2 * 2)  # look-ups take pairs
    rows, columns = _block_sizes(x, N, longest, form, engine)
    if y.dtype == torch.int32:  # what is multiplied modulo 2**32 may be scaled modulo 2**32
        scales = tuple((scale + 2**31) % 2**32 - 2**31 for scale in scales)
    w_blocks, lengths = (weights,), []  # views take time: of a single block there are none
    if columns < K:
        lengths = _lengths(K, longest, columns)
        # Of the weights an odd K was filled up with zeros, where pairs are looked up.
        w_lengths = _lengths(len(weights) // width, longest, columns)
        w_blocks = weights.split([length * width for length in w_lengths])
    in_rows = zip(x.split(rows), y.split(rows), strict=True) if rows < M else ((x, y),)
    for x_rows, y_rows in in_rows:
        x_blocks = x_rows.split(lengths, 1) if lengths else (x_rows,)
        for x_block, w_block in zip(x_blocks, w_blocks, strict=True):
            part = form.make(x_block) if form else x_block
            out = scratch("sum", (len(x_rows), w_block.shape[1]), torch.int32, x.device)
            found = engine.gemm(part, w_block, out)
            each = (found,) if len(scales) == 1 else found.split(N, 1)
            for scale, one in zip(scales, each, strict=True):
                y_rows.add_(one, alpha=scale)


def _block_sizes(
    x: Tensor, N: int, longest: int, form: Form | None, engine: Engine
) -> tuple[int, int]:
    """Rows and columns of X that are taken at a time."""
    M, K = x.shape
    if x.device.type != "cpu" or (form is None and engine.name == "int8"):
        return M, min(K, longest)
    width, block_bytes = (form.width, form.block_bytes) if form else (1, BLOCK_BYTES)
    # The more outputs, the less forming the parts matters, and the more adding up the K blocks.
    elements = block_bytes * min(max(N // 128, 1), 8) * min(torch.get_num_threads(), 8) // width
    columns = min(K, longest, max(1, elements // min(M, 256)))
    if 1 < columns < K:
        columns -= columns % 2  # look-ups take pairs
    return min(M, max(256, min(elements // columns, 2**20 // N))), columns


def _lengths(K: int, longest: int, columns: int) -> list[int]:
    """Blocks of up to `columns` of K columns, none of which reaches over a multiple of `longest`.

    Weights that are small enough for a longer block than any would allow were added up between
    these multiples: it holds for the blocks there and for their parts, not for others as long.
    """
    return [
        min(columns, longest - k % longest, K - k)
        for start in range(0, K, longest)
        for k in range(start, min(start + longest, K), columns)
    ]


def by_int8(a: Tensor, w: Tensor) -> Tensor:
    """a Wᵀ by `torch._int_mm`, for int8 or uint8 a: what the probe tries."""
    return product_of(a, w.t(), INT8_ENGINES[a.device.type])


def by_float32(a: Tensor, w: Tensor) -> Tensor:
    """a Wᵀ by float32 GEMMs over K blocks, for int8 or uint8 a: what the probe tries."""
    return product_of(a, w.t(), ENGINES["float32"])


def product_of(a: Tensor, weights: Tensor, engine: Engine) -> Tensor:
    """One GEMM of a (M, K), int8 or uint8, and weights (K, N), int8 or as the engine has them."""
    (M, K), N, largest = a.shape, weights.shape[1], LARGEST[a.dtype] * 128
    if 0 < K * largest <= engine.largest_sum and M and N:  # where int32 holds the sum too
        # As the sum below would; not to ask it saves 1 to 3 % of the time beside a fast GEMM.
        return engine.gemm(a, weights, None)
    terms = [Term(weights, engine.longest(largest))]
    return sum_of_gemms(a, terms, N, engine, accumulator_dtype(K))
