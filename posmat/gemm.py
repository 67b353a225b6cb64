"""The product of a fully connected layer as GEMMs: exact, and as fast as the machine's int8 GEMM.

    float32_product            float32 GEMMs over K blocks of at most 1,024: exact anywhere
    int8_product               one int8 GEMM: the fastest, where it is exact
    one_sided_product          W X⁺ - W X⁻, magnitudes on X's side: two GEMMs that never saturate
    positive_matrix_product    2 (W⁺ X⁺ + W⁻ X⁻) - |W| |X|, magnitudes on both sides: three GEMMs
    fused_elementwise_product  the seed's pipeline without its memory, by a compiler

Every method takes int8 X (M, K) and int8 W (N, K), or what was prepared of W before, and gives the
integer Y (M, N): int32 where that holds every sum, int64 beyond. The choice between them is in
`posmat.exact`.
"""

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.problem import NotAvailable, check_operands
from posmat.products import FLOAT32_MAX_IN_FEATURES, INT32_MAX_IN_FEATURES, accumulator_dtype
from posmat.proof import is_out_of_memory, require_exact
from posmat.signmag import SignMagnitude, as_sign_magnitude, to_sign_magnitude

# A K block of a sum of uint8 x int8 products, 255 · 128 at the most, fits int32, and so does twice
# the sum of magnitudes; a multiple of 8, as CUDA wants it.
INT8_BLOCK = 65_528

# Bytes of X's magnitudes that are formed at a time on a CPU, for 128 outputs and one thread. They
# are read again at once, by the GEMM, and should still be in the second-level cache then.
BLOCK_BYTES = 576 * 1024
SCRATCH_LIMIT = 8 * 2**20  # a larger scratch buffer is given back to the system after the call

RECOMPILE_LIMIT = 1024  # programs that PyTorch may compile of the seed's pipeline in one process


# --- one GEMM, on any device ---------------------------------------------------------------------


class Engine(NamedTuple):
    """How a device multiplies int8 matrices.

    gemm: (a, b, out=None) -> a b as int32, for a (M, K) uint8 or int8 and b (K, N) int8, where a
        and bᵀ are as `as_rows` leaves them. `out` is memory that it may use for the result.
    block: the largest K for which it is exact for uint8 magnitudes to 128.
    """

    name: str
    gemm: Callable[..., Tensor]
    block: int


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
    """One GEMM of a CPU, which takes both signed and unsigned bytes on its left."""
    if a.shape[1] == 1:
        # The strides of a (1, N) matrix that was transposed are those of a row and of a column.
        # oneDNN mistakes one for the other, and returns memory that it has never written.
        return a.int() * b.int()
    return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)


def padded_gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """One GEMM of a CUDA device, which takes int8 only, M above 16, and N and K in eights.

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
    y = torch._int_mm(aligned(pad(a, 8, at_least=24)), aligned(pad(b.t(), 8)).t())
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
    """One GEMM of a device without int8 arithmetic; exact for the K of its engine."""
    total = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    # Autocast would round the sum to 8 or 11 bits; it leaves alone what is written to `out`.
    return torch.mm(a.float(), b.float(), out=total).int()


ENGINES = {
    "direct": Engine("direct", direct_gemm, INT8_BLOCK),
    "padded": Engine("padded", padded_gemm, INT8_BLOCK),
    "float32": Engine("float32", float32_gemm, FLOAT32_MAX_IN_FEATURES),
}


def engine_for(device: torch.device) -> Engine:
    """The engine of a device: int8 where it has that, and float32 where it has not."""
    if device.type == "cpu":
        return ENGINES["direct"]
    return ENGINES["padded" if _has_int8_gemm(device) else "float32"]


@functools.cache
def _has_int8_gemm(device: torch.device) -> bool:
    zeros = torch.zeros((32, 32), dtype=torch.int8, device=device)
    try:
        torch._int_mm(zeros, zeros.t())
    except RuntimeError as error:  # a card older than int8 tensor cores, or no such operation
        if is_out_of_memory(error):
            raise  # of the moment: not kept
        return False
    return True


# --- scratch memory ------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Memory for one call's intermediates, kept for the next call of the same thread.

    A fresh temporary of megabytes is mapped and unmapped by the system at every call, which costs
    as much as computing what it holds. No result is ever made of this memory. A call takes a buffer
    away and brings it back, so a call within a call finds none and makes its own. CUDA has an
    allocator that keeps memory, and knows which stream still reads it: there it is always fresh.
    """

    def __init__(self):
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.empty(elements, dtype=dtype, device=device)
        buffer = self.kept.pop((name, dtype), None)
        if buffer is None or buffer.numel() < elements:
            # A tensor that was made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = torch.empty(elements, dtype=dtype, device=device)
        return buffer

    def bring_back(self, name: str, buffer: Tensor) -> None:
        small = buffer.numel() * buffer.element_size() <= SCRATCH_LIMIT
        if small and buffer.device.type == "cpu" and type(buffer) is Tensor:
            self.kept[name, buffer.dtype] = buffer


_scratch = _Scratch()


def release_scratch() -> None:
    """Give back what this thread's calls have kept for the next ones: some MB at the most."""
    _scratch.kept.clear()


def _block_sizes(M: int, N: int, K: int, device: torch.device, longest: int) -> tuple[int, int]:
    """Rows and columns of X that are taken at a time.

    The more outputs there are, the less forming the magnitudes matters, and the more adding up the
    K blocks: the columns grow with N.
    """
    if device.type != "cpu":
        return M, min(K, longest)
    elements = BLOCK_BYTES * min(max(N // 128, 1), 8) * min(torch.get_num_threads(), 8)
    columns = min(K, longest, max(1, elements // min(M, 256)))
    rows = min(M, max(256, min(elements // columns, 2**20 // N)))
    return rows, columns


def _views(buffer: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The beginning of an int8 buffer in a shape, and the same bytes read without a sign."""
    signed = buffer[: shape.numel()].view(shape)
    return signed, signed.view(torch.uint8)


# --- the methods ---------------------------------------------------------------------------------


class Float32Weight(NamedTuple):
    """int8 weights kept as float32 (N, K) for `float32_product`."""

    matrix: Tensor


class PositiveWeight(NamedTuple):
    """What `positive_matrix_product` needs of int8 weights W (N, K).

    positive: int8 (N, K), W⁺ = max(W, 0).
    negative: int8 (N, K), W⁻ = max(-W, 0), with 127 where it would be 128.
    magnitude: int8 (N, K), |W| = W⁺ + W⁻, with 127 where it would be 128.
    lowest: int8 (N, K), 1 where W is -128 and the two above miss 1; None where W has no -128.
    """

    positive: Tensor
    negative: Tensor
    magnitude: Tensor
    lowest: Tensor | None


def prepare_positive(w: Tensor) -> PositiveWeight:
    """The non-negative parts of int8 weights (N, K), computed once and outside the clock.

    Raises:
        TypeError, ValueError: see `check_weight`.
    """
    check_weight(w)
    clipped = w.clamp(min=-127).contiguous()
    positive, magnitude = clipped.clamp(min=0), clipped.abs()
    is_lowest = w == -128
    lowest = is_lowest.to(torch.int8).contiguous() if bool(is_lowest.any()) else None
    return PositiveWeight(positive, magnitude - positive, magnitude, lowest)


def prepare_float32(w: Tensor) -> Float32Weight:
    """int8 weights (N, K) as float32.

    Raises:
        TypeError, ValueError: see `check_weight`.
    """
    check_weight(w)
    return Float32Weight(w.to(torch.float32, memory_format=torch.contiguous_format))


def check_weight(w: Tensor) -> None:
    """Refuse what is not a matrix of int8 weights (N, K).

    Raises:
        TypeError: w is not int8.
        ValueError: w is not a matrix.
    """
    if w.dtype != torch.int8:
        raise TypeError(f"w is {w.dtype}: the weights must be torch.int8.")
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
    check_operands(x, _like_int8(w.matrix) if isinstance(w, Float32Weight) else w)
    return blocked_float32(x, w)


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """One int8 GEMM, `torch._int_mm`.

    Raises:
        NotAvailable: it is not exact on this machine. An x86 processor without VNNI sums pairs of
            products in 16 bits, which saturate.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("int8_product", w)
    check_operands(x, w)
    require_exact("int8_product", plain_int8, x.device)
    return plain_int8(x, w)


def one_sided_product(x: Tensor, w: Tensor) -> Tensor:
    """W X⁺ - W X⁻: X as two matrices of magnitudes, which are bytes without a sign.

    Magnitudes reach 128, so a pair of products with int8 weights stays within 2 · 128 · 127 and
    2 · 128 · -128 = -2**15, which 16 bits just hold: exact also where `int8_product` saturates.

    Raises:
        NotAvailable: this machine has no GEMM of uint8 and int8 that works.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("one_sided_product", w)
    check_operands(x, w)
    require_exact("one_sided_product", one_sided, x.device)
    return one_sided(x, w)


def positive_matrix_product(x: Tensor, w: Tensor | PositiveWeight) -> Tensor:
    """2 (W⁺ X⁺ + W⁻ X⁻) - |W| |X|: every multiplication is between non-negative numbers.

    |W| |X| counts every partial product as if it were non-negative; the other term counts those
    that are, twice. What remains is the seed's sum, in three GEMMs, and a fourth where W has a
    -128, whose magnitude int8 does not hold. X's magnitudes are uint8, which does.

    Args:
        x: X (M, K), int8.
        w: W (N, K), int8, or its `PositiveWeight`, prepared before.

    Raises:
        NotAvailable: this machine has no GEMM of uint8 and int8 that works.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("positive_matrix_product", w, PositiveWeight)
    check_operands(x, w.magnitude if isinstance(w, PositiveWeight) else w)
    require_exact("positive_matrix_product", positive, x.device)
    return positive(x, w)


def plain_int8(x: Tensor, w: Tensor) -> Tensor:
    """`int8_product` without its checks: what the probe tries."""
    engine = engine_for(x.device)
    if engine.name == "float32":
        raise NotAvailable(f"{x.device} has no int8 GEMM")
    (M, K), N = x.shape, w.shape[0]
    if 0 in (M, N, K):
        return torch.zeros((M, N), dtype=accumulator_dtype(K), device=x.device)
    x, w = as_rows(x), as_rows(w)
    if K <= INT32_MAX_IN_FEATURES:
        return engine.gemm(x, w.t())
    y = torch.zeros((M, N), dtype=torch.int64, device=x.device)
    for k in range(0, K, engine.block):
        block = slice(k, k + engine.block)
        y += engine.gemm(as_rows(x[:, block]), as_rows(w[:, block]).t())
    return y


def one_sided(x: Tensor, w: Tensor) -> Tensor:
    """`one_sided_product` without its checks: what the probe tries.

    With X⁻ = |X| - X⁺ it is 2 W X⁺ - W |X|, whose two magnitudes take less time to form than X⁻
    does. As in `positive`, nothing passes the accumulator on the way.
    """
    (M, K), N, device = x.shape, w.shape[0], x.device
    y = torch.zeros((M, N), dtype=accumulator_dtype(K), device=device)
    if 0 in (M, N, K):
        return y
    engine = engine_for(device)
    gemm = engine.gemm
    rows, columns = _block_sizes(M, N, K, device, engine.block)
    part_buffer = _scratch.take("part", rows * columns, torch.int8, device)
    sum_buffer = _scratch.take("sum", rows * N, torch.int32, device)
    w_blocks = as_rows(w).t().split(columns)  # (k, N), all of them at once: each view costs time
    for x_rows, y_rows in zip(x.split(rows), y.split(rows), strict=True):
        shape, out = None, sum_buffer[: y_rows.numel()].view(y_rows.shape)
        for x_block, w_block in zip(x_rows.split(columns, 1), w_blocks, strict=True):
            if x_block.shape != shape:
                shape = x_block.shape
                part, magnitude = _views(part_buffer, shape)
            torch.abs(x_block, out=part)  # |X|, and |-128| wraps to the bits of 128
            y_rows.sub_(gemm(magnitude, w_block, out))
            torch.clamp(x_block, min=0, out=part)  # X⁺
            y_rows.add_(gemm(magnitude, w_block, out), alpha=2)
    _scratch.bring_back("part", part_buffer)
    _scratch.bring_back("sum", sum_buffer)
    return y


def positive(x: Tensor, w: Tensor | PositiveWeight) -> Tensor:
    """`positive_matrix_product` without its checks: what the probe tries.

    Nothing passes the accumulator on the way. After each K block y is the product so far; within
    one it first falls by |W| |X| of the block and then climbs, never beyond K · 2**14.
    """
    weight = w if isinstance(w, PositiveWeight) else prepare_positive(w)
    (M, K), N, device = x.shape, weight.magnitude.shape[0], x.device
    y = torch.zeros((M, N), dtype=accumulator_dtype(K), device=device)
    if 0 in (M, N, K):
        return y
    if weight.lowest is not None:
        y += 128 * weight.lowest.sum(1, dtype=y.dtype)  # see the last GEMM
    engine = engine_for(device)
    gemm = engine.gemm
    rows, columns = _block_sizes(M, N, K, device, engine.block)
    part_buffer = _scratch.take("part", rows * columns, torch.int8, device)
    whole_buffer = _scratch.take("whole", rows * columns, torch.int8, device)
    sum_buffer = _scratch.take("sum", rows * N, torch.int32, device)
    w_blocks = [matrix.t().split(columns) for matrix in weight if matrix is not None]  # (k, N)
    for x_rows, y_rows in zip(x.split(rows), y.split(rows), strict=True):
        shape, out = None, sum_buffer[: y_rows.numel()].view(y_rows.shape)
        for x_block, (w_pos, w_neg, w_whole, *ones) in zip(
            x_rows.split(columns, 1), zip(*w_blocks, strict=True), strict=True
        ):
            if x_block.shape != shape:
                shape = x_block.shape
                part, x_part = _views(part_buffer, shape)
                whole, x_whole = _views(whole_buffer, shape)
            torch.abs(x_block, out=whole)  # |X|, and |-128| wraps to the bits of 128
            torch.clamp(x_block, min=0, out=part)  # X⁺, while the block of X is in the cache
            y_rows.sub_(gemm(x_whole, w_whole, out))
            y_rows.add_(gemm(x_part, w_pos, out), alpha=2)
            # X⁻ = |X| - X⁺, where X⁺ is |X| or 0: no bit is borrowed, and xor takes half the time.
            torch.bitwise_xor(whole, part, out=part)
            y_rows.add_(gemm(x_part, w_neg, out), alpha=2)
            if ones:
                # So far -128 counted as -127, and 1 · X is missing at its places E. X + 128 is
                # non-negative, the same bits but the first, and E X = E (X + 128) - 128 Σ E.
                torch.bitwise_xor(x_block, -128, out=part)
                y_rows.sub_(gemm(x_part, ones[0], out))
    _scratch.bring_back("part", part_buffer)
    _scratch.bring_back("whole", whole_buffer)
    _scratch.bring_back("sum", sum_buffer)
    return y


def blocked_float32(x: Tensor, w: Tensor | Float32Weight) -> Tensor:
    """`float32_product` without its checks: what the probe tries."""
    prepared = isinstance(w, Float32Weight)
    weight = w.matrix if prepared else w
    (M, K), N, device = x.shape, weight.shape[0], x.device
    y = torch.zeros((M, N), dtype=accumulator_dtype(K), device=device)
    if 0 in (M, N, K):
        return y
    rows, columns = min(M, 1024), min(K, FLOAT32_MAX_IN_FEATURES)
    if device.type != "cpu":
        rows = M
    x_buffer = _scratch.take("x", rows * columns, torch.float32, device)
    w_buffer = _scratch.take("w", 0 if prepared else N * columns, torch.float32, device)
    sum_buffer = _scratch.take("sum", rows * N, torch.float32, device)
    integer_buffer = _scratch.take("sum", rows * N, torch.int32, device)
    for k in range(0, K, columns):
        w_block = weight[:, k : k + columns]
        if not prepared:
            w_block = w_buffer[: w_block.numel()].view(w_block.shape).copy_(w_block)
        for m in range(0, M, rows):
            x_block, y_block = x[m : m + rows, k : k + columns], y[m : m + rows]
            x_float = x_buffer[: x_block.numel()].view(x_block.shape).copy_(x_block)
            total = sum_buffer[: y_block.numel()].view(y_block.shape)
            torch.mm(x_float, w_block.t(), out=total)
            y_block += integer_buffer[: y_block.numel()].view(y_block.shape).copy_(total)
    for name, buffer in (("x", x_buffer), ("w", w_buffer), ("sum", sum_buffer)):
        _scratch.bring_back(name, buffer)
    _scratch.bring_back("sum", integer_buffer)
    return y


# --- the seed's pipeline, compiled ---------------------------------------------------------------


def fused_elementwise_product(x: Tensor, w: Tensor | SignMagnitude) -> Tensor:
    """The seed's pipeline without its memory: a compiler makes one loop of its four steps.

    Magnitudes times magnitudes, times signs times signs, summed: no partial product ever leaves
    the processor. The first call compiles, which takes seconds; so does the first with another
    number of threads, and the first whose sums need int64.

    Args:
        x: X (M, K), int8.
        w: W (N, K), int8, or its signs and magnitudes computed before, as the seed does.

    Raises:
        NotAvailable: torch.compile finds no compiler that works here, or gave up.
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("fused_elementwise_product", w, SignMagnitude)
    weight = as_sign_magnitude(w)
    check_operands(x, weight.sign)
    (M, K), N = x.shape, weight.sign.shape[0]
    accumulator = accumulator_dtype(K)
    if 0 in (M, N, K):
        return torch.zeros((M, N), dtype=accumulator, device=x.device)
    # A size of 1 would be compiled for itself: 2 at the least, and one program serves all.
    parts = [_two_or_more(part) for part in (*to_sign_magnitude(x), *weight)]
    try:
        with torch.no_grad(), _quiet_compiler(), _one_program():
            y = _compiled()(*parts, accumulator)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise NotAvailable(
                f"fused_elementwise_product was compiled {RECOMPILE_LIMIT} times in this process, "
                "each time for other circumstances, and torch.compile gave up: call "
                "torch.compiler.reset(), or use elementwise_product."
            ) from error
        if not isinstance(error, (RuntimeError, ImportError, OSError)):
            raise
        needed = "Triton" if x.device.type == "cuda" else "a C++ compiler"
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise NotAvailable(
            f"fused_elementwise_product needs torch.compile, which does not work for "
            f"{x.device.type} here ({type(error).__name__}: {reason.strip()}). Install {needed}, "
            "or use elementwise_product."
        ) from error
    return y[:M, :N]


def _two_or_more(t: Tensor) -> Tensor:
    rows, columns = t.shape
    if rows > 1 and columns > 1:
        return t.contiguous()
    return F.pad(t, (0, max(0, 2 - columns), 0, max(0, 2 - rows)))


def _seed_pipeline(
    x_sign: Tensor,
    x_magnitude: Tensor,
    w_sign: Tensor,
    w_magnitude: Tensor,
    accumulator: torch.dtype,
) -> Tensor:
    magnitudes = w_magnitude.int() * x_magnitude.int().unsqueeze(1)  # (M, N, K)
    signs = w_sign.int() * x_sign.int().unsqueeze(1)  # (M, N, K)
    return (magnitudes * signs).sum(2, dtype=accumulator)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_seed_pipeline, dynamic=True, fullgraph=True)


@contextlib.contextmanager
def _one_program() -> Iterator[None]:
    """Compile once for all sizes, also those that happen to be equal, and as often as it takes.

    PyTorch gives up after eight programs for one function. There is one here for each number of
    threads, accumulator, device and such switches of the process as autocast.
    """
    import torch._dynamo.config as dynamo
    from torch.fx.experimental import _config as shapes

    with (
        dynamo.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT),
        shapes.patch(use_duck_shape=False),
    ):
        yield


@contextlib.contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silence the deprecation warnings about PyTorch that loading its compiler prints."""
    if "torch._inductor.compile_fx" in sys.modules:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


GEMM_METHODS: dict[str, Callable[..., Tensor]] = {
    method.__name__: method
    for method in (
        float32_product,
        int8_product,
        one_sided_product,
        positive_matrix_product,
        fused_elementwise_product,
    )
}


def _like_int8(t: Tensor) -> Tensor:
    """A matrix of no memory with the shape and device of t, for the check of operands."""
    return torch.empty(1, dtype=torch.int8, device=t.device).expand(t.shape)
