"""The product of a fully connected layer as GEMMs: exact, by the fastest engine of the machine.

Every method takes int8 X (M, K) and int8 W (N, K), or what was prepared of W before, and gives the
integer Y (M, N): int32 where that holds every sum, int64 beyond. It refuses what `check_operands`
refuses, weights that were prepared for another method (TypeError), and a machine on which no engine
is exact for it (NotAvailable). The choice between the methods is in `posmat.layer.exact`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.layer.engines import (
    ENGINES,
    INT8_ENGINES,
    Engine,
    Form,
    Term,
    by_int8,
    engine_for,
    product_of,
    scratch,
    sum_of_gemms,
)
from posmat.layer.problem import NotAvailable, check_operands
from posmat.layer.products import accumulator_dtype
from posmat.layer.proof import BYTES, MAGNITUDES, prove


def _part(x: Tensor) -> Tensor:
    return scratch("part", x.shape, torch.int8, x.device)


# |-128| has the bits of 128, and X + 128 those of X but the first: both are read without a sign.
MAGNITUDE = Form(lambda x: torch.abs(x, out=_part(x)).view(torch.uint8))
POSITIVE_PART = Form(lambda x: torch.clamp(x, min=0, out=_part(x)).view(torch.uint8))
SHIFTED = Form(lambda x: torch.bitwise_xor(x, -128, out=_part(x)).view(torch.uint8))


class PreparedWeight:
    """int8 weights W (N, K), as they were when prepared; to `check_operands` they look like W."""

    dtype, ndim = torch.int8, 2

    def __init__(self, w: Tensor):
        if not isinstance(w, Tensor) or w.dtype != torch.int8:
            found = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"w is {found}: the weights must be torch.int8.")
        if w.ndim != 2:
            raise ValueError(
                f"w has shape {tuple(w.shape)}: it must be a matrix (out_features, in_features)."
            )
        self.shape, self.device = tuple(w.shape), w.device


class Float32Weight(PreparedWeight):
    """int8 weights as float32 (K, N), for `float32_product`."""

    def __init__(self, w: Tensor):
        super().__init__(w)
        self.matrix = ENGINES["float32"].prepare(w)


class PositiveWeight(PreparedWeight):
    """What `positive_matrix_product` needs of int8 weights W (N, K)."""

    def __init__(self, w: Tensor, lay_out: bool = False):
        super().__init__(w)
        # W⁺ = max(W, 0) above W⁻ = max(-W, 0), which has 127 where it would be 128; and only where
        # W has a -128 a third matrix, with 1 at those places.
        lowest = w == -128
        parts = [w.clamp(min=0), w.clamp(min=-127).neg().clamp(min=0)]
        if bool(lowest.any()):
            parts.append(lowest.to(torch.int8))
        self.parts, self.scales = torch.cat(parts), (1, -1, -1)[: len(parts)]
        self.start = (-128 * w.sum(1, dtype=torch.int64)).to(accumulator_dtype(w.shape[1]))
        self._engine = engine = engine_for(w.device, BYTES) if lay_out else None
        if engine:
            longest = longest_block(self.parts, 255, engine)
            self._term = Term(engine.prepare(self.parts), longest, SHIFTED, self.scales)

    def term(self, engine: Engine) -> Term:
        """The sum's only term, laid out for the engine or else of the parts as they are."""
        if engine is self._engine:
            return self._term
        return Term(self.parts.t(), engine.longest(255 * 128), SHIFTED, self.scales)


def longest_block(w: Tensor, largest: int, engine: Engine) -> int:
    """How many columns of w (R, K) an engine may sum at once, for left operands up to `largest`.

    As many as for any weights, or more where these are small enough: the fewest blocks of one
    length, in eights, that no row's sum of magnitudes is too large for.
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
        TypeError, ValueError: w is not int8, or not a matrix.
    """
    return PositiveWeight(w, lay_out=True)


def prepare_float32(w: Tensor) -> Float32Weight:
    """int8 weights (N, K) as float32; raises as `prepare_positive` does."""
    return Float32Weight(w)


def check_for(method: str, x: Tensor, w: Tensor | PreparedWeight, *prepared: type) -> None:
    """Refuse operands that do not fit, and weights that are not a tensor or one of `prepared`."""
    if not isinstance(w, (Tensor, *prepared)):
        others = "".join(f" or a {kind.__name__}" for kind in prepared)
        raise TypeError(
            f"w is a {type(w).__name__}: {method} takes an int8 tensor{others}. Give it the "
            "weights themselves, or what was prepared for it."
        )
    check_operands(x, w)


def float32_product(x: Tensor, w: Tensor | Float32Weight) -> Tensor:
    """float32 GEMMs over blocks of at most 1,024 of K, added up as integers.

    1,024 products of int8 numbers sum to 2**24 at the most, and float32 holds every integer up to
    there: exact on any device, in any order of summation.
    """
    check_for("float32_product", x, w, Float32Weight)
    return product_of(x, w.t() if isinstance(w, Tensor) else w.matrix, ENGINES["float32"])


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """One int8 GEMM, `torch._int_mm`, also where PyTorch has but a slow loop for it.

    It is not available where pairs of products are summed in 16 bits, which saturate: on x86
    processors without VNNI.
    """
    check_for("int8_product", x, w)
    exact, finding = prove(by_int8, x.device)
    if not exact:
        raise NotAvailable(
            f"int8_product is not exact on this {x.device}: {finding}. Use exact_product, which "
            "takes the fastest method that was found exact here."
        )
    return by_int8(x, w)


def one_sided_product(x: Tensor, w: Tensor) -> Tensor:
    """2 W X⁺ - W |X|, where X⁺ = max(X, 0): the inputs as bytes without a sign.

    With X = X⁺ - X⁻ and |X| = X⁺ + X⁻ it is W X⁺ - W X⁻. Magnitudes reach 128, so a pair of
    products with int8 weights stays within 2 · 128 · 127 and 2 · 128 · -128 = -2**15, which 16 bits
    just hold: the int8 engine is exact for it also where `int8_product` saturates.
    """
    check_for("one_sided_product", x, w)
    return one_sided(x, w, engine_for(x.device, MAGNITUDES))


def one_sided(x: Tensor, w: Tensor, engine: Engine | None = None) -> Tensor:
    """`one_sided_product` without its checks; by `torch._int_mm`, where no engine is given."""
    engine = engine or INT8_ENGINES[x.device.type]
    weights, longest = w.t(), engine.longest(128 * 128)
    terms = [Term(weights, longest, MAGNITUDE, (-1,)), Term(weights, longest, POSITIVE_PART, (2,))]
    return sum_of_gemms(x, terms, w.shape[0], engine, accumulator_dtype(x.shape[1]))


def positive_matrix_product(x: Tensor, w: Tensor | PositiveWeight) -> Tensor:
    """W⁺ (X + 128) - W⁻ (X + 128) - 128 Σ W: every multiplication is between non-negative numbers.

    X + 128 is a byte, 0 to 255, the same bits as X but the first; W⁺ = max(W, 0) and
    W⁻ = max(-W, 0) are the weights' magnitudes, 0 to 128, each where the sign is its own. The last
    term is known with the weights. So a multiplier of a bare 8-bit input by a magnitude of 7 bits
    serves, whose product the weight's sign then adds or subtracts; a magnitude of 128 takes a third
    GEMM, of the ones that 127 misses. W⁺ and W⁻ are Fibonacci codes if |W| is one.
    """
    check_for("positive_matrix_product", x, w, PositiveWeight)
    weight = w if isinstance(w, PositiveWeight) else PositiveWeight(w)
    (N, K), engine = weight.shape, engine_for(x.device, BYTES)
    return sum_of_gemms(x, [weight.term(engine)], N, engine, accumulator_dtype(K), weight.start)
