"""Operands for the tests of matrix products, and what their result is checked against."""

import pytest
import torch
from torch import Tensor

import posmat as pm
from posmat.layer import engines, proof

CPU = torch.device("cpu")
METHODS = [pm.float32_product, pm.int8_product, pm.one_sided_product, pm.positive_matrix_product]
PREPARED = [
    (pm.positive_matrix_product, pm.prepare_positive),
    (pm.float32_product, pm.prepare_float32),
]
# With weights that were prepared before they are methods too.
WAYS = {method.__name__: method for method in (*METHODS, pm.exact_product)} | {
    prepare.__name__: lambda x, w, method=method, prepare=prepare: method(x, prepare(w))
    for method, prepare in PREPARED
}


def operands(M: int, N: int, K: int, low: int = -128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random int8 operands on the CPU; unlike `random_operands` it knows sizes of 0."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(
        torch.randint(low, 128, (rows, K), dtype=torch.int8, generator=generator, device="cpu")
        for rows in (M, N)
    )


def constant(rows: int, columns: int, value: int) -> Tensor:
    return torch.full((rows, columns), value, dtype=torch.int8)


def layouts(t: Tensor) -> list[Tensor]:
    """The same numbers as they are, by columns, in part of a wider matrix, and every other one."""
    rows, columns = t.shape
    wide, sparse = (torch.full((2 * rows, 2 * columns + 3), 77, dtype=t.dtype) for _ in range(2))
    parts = wide[:rows, 1 : 1 + columns], sparse[::2, : 2 * columns : 2]
    return [t, t.t().contiguous().t(), *(part.copy_(t) for part in parts)]


def is_available(method) -> bool:
    """Whether a method is one that this processor does not refuse; it is asked for proof."""
    return method is not pm.int8_product or proof.prove(engines.by_int8, CPU).exact


def check(method, x: Tensor, w: Tensor) -> None:
    """`method` gives, number for number and in the right dtype, what the reference gives."""
    if not is_available(method):
        pytest.skip("int8 x int8 is not exact on this processor")
    y = method(x, w)
    assert y.dtype == pm.accumulator_dtype(x.shape[1])
    assert y.shape == (x.shape[0], w.shape[0])
    assert torch.equal(y.long(), pm.integer_product(x, w))
