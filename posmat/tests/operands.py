"""Operands for the tests of matrix products, and what their result is checked against."""

import pytest
import torch
from torch import Tensor

from posmat.layer import proof
from posmat.layer.engines import by_int8
from posmat.layer.exact import exact_product
from posmat.layer.gemm import (
    float32_product,
    int8_product,
    one_sided_product,
    positive_matrix_product,
    prepare_float32,
    prepare_positive,
)
from posmat.layer.products import accumulator_dtype, integer_product

CPU = torch.device("cpu")
METHODS = [float32_product, int8_product, one_sided_product, positive_matrix_product, exact_product]
PREPARED = [(positive_matrix_product, prepare_positive), (float32_product, prepare_float32)]
# With weights that were prepared before they are methods too.
WAYS = {method.__name__: method for method in METHODS} | {
    prepare.__name__: lambda x, w, method=method, prepare=prepare: method(x, prepare(w))
    for method, prepare in PREPARED
}
LAYOUTS = ["plain", "transposed", "columns of a wider matrix", "every other one"]


def operands(M: int, N: int, K: int, low: int = -128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random int8 operands on the CPU; unlike `random_operands` it knows sizes of 0."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(
        torch.randint(low, 128, (rows, K), dtype=torch.int8, generator=generator, device="cpu")
        for rows in (M, N)
    )


def constant(rows: int, columns: int, value: int) -> Tensor:
    return torch.full((rows, columns), value, dtype=torch.int8)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers in another place of memory."""
    rows, columns = t.shape
    if layout == "plain":
        return t
    if layout == "transposed":
        return t.t().contiguous().t()
    larger = torch.full((2 * rows, 2 * columns + 3), 77, dtype=t.dtype)
    part = larger[:rows, 1 : 1 + columns] if "wider" in layout else larger[::2, : 2 * columns : 2]
    return part.copy_(t)


def unaligned():
    """Operands whose rows begin where CUDA's int8 GEMM cannot load from."""
    wider_x, wider_w = operands(24, 16, 67)
    yield wider_x[:, 1:65], wider_w[:, 1:65]
    yield operands(24, 8, 65_537)  # its last block begins anywhere
    x, w = operands(24, 16, 64)
    longer = torch.empty(24 * 64 + 3, dtype=torch.int8)
    yield longer[3:].view(24, 64).copy_(x), w


def is_available(method) -> bool:
    """Whether a method is one that this processor does not refuse; it is asked for proof."""
    return method is not int8_product or proof.prove(by_int8, CPU).exact


def check(method, x: Tensor, w: Tensor) -> None:
    """`method` gives, number for number and in the right dtype, what the reference gives."""
    if not is_available(method):
        pytest.skip("int8 x int8 is not exact on this processor")
    y = method(x, w)
    assert y.dtype == accumulator_dtype(x.shape[1])
    assert y.shape == (x.shape[0], w.shape[0])
    assert torch.equal(y.long(), integer_product(x, w))
