import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posmat as pm
from posmat.layer.products import INT32_MAX_IN_FEATURES, integer_product, linear_product
from posmat.measure import memory
from posmat.tests.operands import operands

IN_BLOCKS = [pm.elementwise_product, pm.sign_magnitude_product]
WHOLE = [pm.unblocked_elementwise_product, pm.unblocked_sign_magnitude_product]
EXACT = [*IN_BLOCKS, *WHOLE]
METHODS = [*EXACT, linear_product, integer_product]  # the layer is exact at these small K
SIZES = [(1, 1, 1), (3, 5, 7), (17, 1, 130), (1, 33, 64), (40, 600, 9), (2, 3, 1024)]
SIZES += [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
CORNERS = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)


def by_hand(x, w):
    """The product in Python's own integers."""
    x, w = x.tolist(), w.tolist()
    return [[sum(a * b for a, b in zip(u, v, strict=True)) for v in w] for u in x]


def test_the_reference_is_the_product_in_pythons_integers(device):
    X, W = pm.random_operands(pm.ProblemSize(5, 6, 300), device=device, low=-128, high=127)
    assert integer_product(X, W).dtype == torch.int64
    assert integer_product(X, W).tolist() == by_hand(X, W)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_irregular_sizes_empty_ones_and_strides(method, device):
    for M, N, K in SIZES:
        x, w = (t.to(device) for t in operands(M, N, K))
        pairs = [(x, w)]
        if N:
            pairs.append((x.T.contiguous().T, w[:1].expand(N, K)))
        for pair in pairs:
            y = method(*pair)
            assert y.shape == (M, N)
            assert torch.equal(y.long(), integer_product(*pair))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_all_corners(method, device):
    pairs = torch.cartesian_prod(CORNERS, CORNERS).to(device)  # (36, 2)
    x, w = pairs[:, :1], pairs[:, 1:]
    assert method(x, w).tolist() == by_hand(x, w)
    x, w = pairs.T.contiguous()[:1], pairs.T.contiguous()[1:]
    assert method(x, w).tolist() == by_hand(x, w)


@pytest.mark.parametrize("method", EXACT)
@settings(max_examples=30, deadline=None)
@given(*(st.integers(*ends) for ends in ((1, 9), (1, 9), (0, 40), (1, 200), (0, 2**16))))
def test_blocks_of_any_size_give_the_same(method, M, N, K, block_elements, seed):
    x, w = (CORNERS[t.long() % 6] for t in operands(M, N, K, seed=seed))
    arguments = {"block_elements": block_elements} if method in IN_BLOCKS else {}
    assert method(x, w, **arguments).tolist() == by_hand(x, w)


@pytest.mark.parametrize("method", [pm.sign_magnitude_product, pm.unblocked_sign_magnitude_product])
def test_weights_split_before_give_the_same(method, device):
    X, W = (t.to(device) for t in operands(4, 5, 60))
    assert torch.equal(method(X, pm.to_sign_magnitude(W)), method(X, W))


@pytest.mark.parametrize("method", IN_BLOCKS)
def test_a_block_of_nothing_is_refused(method):
    x = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="block_elements=0"):
        method(x, x, 0)


def test_the_int32_bound_from_both_sides():
    assert pm.accumulator_dtype(INT32_MAX_IN_FEATURES) == torch.int32
    assert pm.accumulator_dtype(INT32_MAX_IN_FEATURES + 1) == torch.int64
    for K in (INT32_MAX_IN_FEATURES, INT32_MAX_IN_FEATURES + 1):
        x = torch.full((1, 1), -128, dtype=torch.int8).expand(1, K)
        for method in (pm.elementwise_product, pm.sign_magnitude_product):
            y = method(x, x)
            assert y.dtype == pm.accumulator_dtype(K)
            assert y.item() == K * 128 * 128


def test_floating_operands(device):
    X, W = pm.random_operands(pm.ProblemSize(4, 5, 300), dtype=torch.float32, device=device)
    exact = X.double() @ W.double().T
    bound = 300 * 2**-23 * (X.double().abs() @ W.double().abs().T)
    for method in (linear_product, pm.elementwise_product, pm.unblocked_elementwise_product):
        y = method(X, W)
        assert y.dtype == torch.float32
        assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("method", METHODS)
def test_operands_that_do_not_fit_are_refused(method):
    x, w = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\(2, 3\) .* \(2, 4\)"):
        method(x, w)
    with pytest.raises(TypeError):
        method(x.short(), x)


def test_blocks_bound_the_memory_and_the_whole_form_shows_that_it_is_measured():
    """268 million partial products are 1 GB as int32; in blocks both forms stay below 64 MB."""
    forms = [pm.elementwise_product, pm.sign_magnitude_product, pm.unblocked_sign_magnitude_product]
    rows = pm.peak_memory({form.__name__: form for form in forms}, pm.ProblemSize(1024, 1024, 256))
    peak = rows.set_index("method")["peak_bytes"]
    assert rows["operand_bytes"].tolist() == [2 * 1024 * 256] * 3
    assert peak.iloc[:2].max() <= 64e6
    assert peak.iloc[2] >= 5 * 1024 * 1024 * 256


def test_where_the_mark_cannot_be_reset_nothing_is_told(monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR_REFS", "/nowhere/clear_refs")  # as on macOS
    size, cpu = pm.ProblemSize(64, 64, 64), torch.device("cpu")
    facts = memory._measure(pm.unblocked_elementwise_product, size, torch.int8, 0, cpu, 1)
    assert facts["state"] == "not available" and facts["peak_bytes"] is None


def test_memory_that_cannot_be_measured_is_said():
    with pytest.raises(RuntimeError, match=r"memory of gcd at .* exit code 1 .*is there memory"):
        pm.peak_memory({"gcd": math.gcd}, pm.ProblemSize(1, 1, 1))  # takes no tensors
