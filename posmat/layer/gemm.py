"""The product of a fully connected layer as GEMMs: exact, by the fastest engine of the machine.

    float32_product           float32 GEMMs over K blocks that float32 sums exactly: right anywhere
    int8_product              one int8 GEMM, `torch._int_mm`, where that is exact
    one_sided_product         2 W X⁺ - W |X|: the inputs as bytes without a sign, two GEMMs
    positive_matrix_product   W⁺ (X + 128) - W⁻ (X + 128) - 128 Σ W: no multiplication of a negative
                              number, two GEMMs

Every method takes int8 X (M, K) and int8 W (N, K), or what was prepared of W before, and gives the
integer Y (M, N): int32 where that holds every sum, int64 beyond. The choice between the methods is
in `posmat.layer.exact`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.layer.engines import (
    ENGINES,
    Engine,
    Form,
    Term,
    by_float32,
    by_int8,
    engine_for,
    int8_engine,
    product_of,
    scratch,
    sum_of_gemms,
)
from posmat.layer.problem import check_operands
from posmat.layer.products import accumulator_dtype
from posmat.layer.proof import BYTES, MAGNITUDES, require_exact

# --- forms of X -----------------------------------------------------------------------------------


def _part(x: Tensor) -> Tensor:
    return scratch("part", x.shape, torch.int8, x.device)


def _magnitude(x: Tensor) -> Tensor:
    return torch.abs(x, out=_part(x)).view(torch.uint8)  # |-128| has the bits of 128


def _positive_part(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=_part(x)).view(torch.uint8)


def _shifted(x: Tensor) -> Tensor:
    """X + 128, 0 to 255: the same bits but the first, read without a sign."""
    return torch.bitwise_xor(x, -128, out=_part(x)).view(torch.uint8)


MAGNITUDE = Form(_magnitude)
POSITIVE_PART = Form(_positive_part)
SHIFTED = Form(_shifted)


# --- weights, prepared ----------------------------------------------------------------------------


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


# --- the methods ----------------------------------------------------------------------------------


def float32_product(x: Tensor, w: Tensor | Float32Weight) -> Tensor:
    """float32 GEMMs over blocks of at most 1,024 of K, added up as integers.

    1,024 products of int8 numbers sum to 2**24 at the most, and float32 holds every integer up to
    there: exact on any device, in any order of summation.

    Raises:
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("float32_product", w, Float32Weight)
    if isinstance(w, Tensor):
        check_operands(x, w)
        return by_float32(x, w)
    check_operands(x, like_int8(*w.matrix.shape[::-1], w.matrix.device))
    return product_of(x, w.matrix, ENGINES["float32"])


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
