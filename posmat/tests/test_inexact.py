"""Inexact products against the summed table, number for number, by every path."""

import copy
import io
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posmat import inexact, lookup
from posmat.exact import chosen_method, explain
from posmat.fibonacci import quantize_fibonacci
from posmat.inexact import (
    InexactLinear,
    choose_path,
    error_product,
    inexact_product,
    output_error,
    straight_through_product,
)
from posmat.lookup import compiled_lookup_product, compiler_command
from posmat.multipliers import Multiplier, find_multiplier, multiplier_names
from posmat.problem import NotAvailable

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PATHS = ("gemm", "lookup")


def summed_table(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """The definition, from the table as it came in: one product at a time, summed as int64."""
    found = find_multiplier(multiplier)
    table = torch.from_numpy(found.table.astype(np.int64))
    x, w = x.cpu().long(), w.cpu().long()
    y = torch.zeros(len(x), len(w), dtype=torch.int64)
    for m in range(len(x)):
        if found.convention == "signed":
            y[m] = table[w + 128, x[m] + 128].sum(1)
        else:
            signs = w.sign() * x[m].sign()
            y[m] = (signs * table[w.abs(), x[m].abs()]).sum(1)
    return y


@cache
def tables() -> dict[str, Multiplier]:
    """Multipliers of chosen rank and of every convention; none is symmetric."""
    rng = np.random.default_rng(11)
    made = {}

    def low_rank(size: int, rank: int, spread: int, first: int = 0) -> np.ndarray:
        operands = np.arange(first, first + size)
        a = rng.integers(-spread, spread + 1, (size, rank))
        b = rng.integers(-spread, spread + 1, (rank, size))
        if not first:
            a[0], b[:, 0] = 0, 0
        return np.outer(operands, operands) + a @ b

    def add(name: str, table: np.ndarray, convention: str) -> None:
        assert not np.array_equal(table, table.T)
        made[name] = Multiplier.from_table(table, name, convention)

    for rank in (1, 3, 8, 20):
        add(f"rank {rank}", low_rank(129, rank, 11), "sign-magnitude")
    add("two digits", low_rank(129, 2, 3000), "sign-magnitude")
    add("no -128", low_rank(128, 5, 11), "sign-magnitude")
    add("no -128 in x", low_rank(129, 2, 11)[:, :128], "sign-magnitude")
    add("signed", low_rank(256, 4, 100, first=-128), "signed")
    add("unsigned", low_rank(256, 6, 11), "unsigned")
    full = rng.integers(0, 2**14, (129, 129))
    full[0], full[:, 0] = 0, 0
    add("full rank", full, "sign-magnitude")
    add("signed full rank", rng.integers(-(2**16), 2**16, (256, 256)), "signed")
    huge = rng.integers(-(2**31), 2**31, (129, 129))
    huge[0], huge[:, 0] = 0, 0
    add("32 bits", huge, "sign-magnitude")
    return made


TABLES = [
    "rank 1", "rank 3", "rank 8", "rank 20", "two digits", "no -128", "no -128 in x", "signed",
    "unsigned", "full rank", "signed full rank", "32 bits",
]  # fmt: skip
EVERY = [*multiplier_names(), *TABLES]


def get(name: str) -> Multiplier:
    return tables()[name] if name in TABLES else find_multiplier(name)


def operands(multiplier: Multiplier, M: int, N: int, K: int, seed: int = 0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    low_w, low_x = (-128 if admits else -127 for admits in multiplier.admits)
    x = torch.randint(low_x, 128, (M, K), dtype=torch.int8, generator=generator)
    w = torch.randint(low_w, 128, (N, K), dtype=torch.int8, generator=generator)
    return x.to(device), w.to(device)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype in (torch.int32, torch.int64)
    assert torch.equal(found.cpu().long(), expected)


@pytest.mark.parametrize("name", EVERY)
def test_every_pair_of_operands_by_every_path(name):
    # One product per output: y[m, n] = table[w[n], x[m]], all 65,536 of them.
    multiplier = get(name)
    low_w, low_x = (-128 if admits else -127 for admits in multiplier.admits)
    w = torch.arange(low_w, 128, dtype=torch.int8)[:, None]
    x = torch.arange(low_x, 128, dtype=torch.int8)[:, None]
    expected = summed_table(x, w, multiplier)
    if name in TABLES:
        assert not torch.equal(expected, expected.T)
    for path in ("auto", *PATHS):
        assert_equal(inexact_product(x, w, multiplier, path), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", EVERY)
def test_paths_are_the_summed_table(name, path):
    multiplier = get(name)
    # Odd and even K, more than one K block of chunks, few rows and more than a row block.
    for M, N, K in ((1, 1, 1), (3, 5, 7), (40, 9, 301), (17, 130, 64)):
        x, w = operands(multiplier, M, N, K, seed=K)
        assert_equal(inexact_product(x, w, multiplier, path), summed_table(x, w, multiplier))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["or_pairs", "or_fours", "truncated", "rank 3", "rank 20"])
def test_many_blocks_of_rows_and_columns(name, path, monkeypatch):
    monkeypatch.setattr(inexact, "SCRATCH_BYTES", 2**10)
    monkeypatch.setattr(inexact, "COLUMN_BYTES", 64)
    monkeypatch.setattr(inexact, "GEMM_BLOCK", 40)
    multiplier = get(name)
    x, w = operands(multiplier, 300, 6, 129)
    assert_equal(inexact_product(x, w, multiplier, path), summed_table(x, w, multiplier))


@pytest.mark.parametrize("name", EVERY)
def test_corners(name):
    multiplier = get(name)
    values = [0, 1, -1, 127, -127]
    at_w, at_x = ([*values, -128] if admits else values for admits in multiplier.admits)
    K = 260
    w = torch.tensor(at_w, dtype=torch.int8)[:, None].repeat(1, K)
    x = torch.tensor(at_x * 4, dtype=torch.int8)[:, None].repeat(1, K)  # beyond GATHER_ROWS
    expected = summed_table(x, w, multiplier)
    for path in PATHS:
        assert_equal(inexact_product(x, w, multiplier, path), expected)
        assert_equal(InexactLinear(w, multiplier, path)(x), expected)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(EVERY),
    path=st.sampled_from(("auto", *PATHS)),
    sizes=st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 40)),
    seed=st.integers(0, 2**20),
    zero=st.booleans(),
    transposed=st.booleans(),
)
def test_small_shapes(name, path, sizes, seed, zero, transposed):
    multiplier = get(name)
    x, w = operands(multiplier, *sizes, seed=seed)
    if zero:
        x[::2] = 0
        w[1::2] = 0
    if transposed:  # other strides, the same numbers
        x, w = x.T.contiguous().T, w.T.contiguous().T
    assert_equal(inexact_product(x, w, multiplier, path), summed_table(x, w, multiplier))


def test_expanded_and_sliced_operands():
    x, w = operands(get("rank 8"), 40, 12, 31)
    for name in ("or_pairs", "rank 8", "full rank"):
        multiplier = get(name)
        for left, right in (
            (x[:, 1:30], w[:, 1:30]),
            (x[:, ::3], w[:, ::3]),
            (x[:1].expand(40, 31), w[:1].expand(12, 31)),
            (x[:, :1].expand(40, 31), w),
        ):
            expected = summed_table(left, right, multiplier)
            for path in PATHS:
                assert_equal(inexact_product(left, right, multiplier, path), expected)


def test_rows_with_odd_strides_and_offsets_are_looked_up_in_pairs():
    # A single row is contiguous whatever its stride, and cannot be read in pairs as it is.
    for name in ("rank 1", "rank 3", "two digits"):
        multiplier = get(name)
        layer = InexactLinear(operands(multiplier, 1, 3, 16385)[1], multiplier)
        assert layer.path == "gemm" and layer.in_features > layer._ready().block
        memory, w = operands(multiplier, 10, 3, 7)
        for x in (
            memory[:1, :6],  # stride 7
            memory[1:2, 1:],  # and an offset
            memory[:, :6],
            memory.view(-1)[1:61].view(10, 6),  # an odd offset only
            memory.view(-1)[1:61].view(10, 6)[::3],
        ):
            expected = summed_table(x, w[:, :6], multiplier)
            assert_equal(inexact_product(x, w[:, :6], multiplier, "gemm"), expected)
        for M in (1, 2):
            x, _ = operands(multiplier, M, 1, 16385)
            assert_equal(layer(x), summed_table(x, layer.weight, multiplier))


def test_the_gemm_is_the_one_that_was_chosen():
    assert explain("cpu").startswith(f"exact_product on cpu, {torch.get_num_threads()} thread")
    assert explain("cpu").splitlines()[0].endswith(f": {chosen_method('cpu')}")
    assert chosen_method(torch.device("cpu")) == chosen_method()


def test_the_choice_and_its_override(monkeypatch):
    _, w = operands(get("rank 8"), 1, 4, 9)
    assert choose_path(w, "or_pairs") == "gemm"
    assert choose_path(w, get("rank 20")) == "gemm"
    assert choose_path(w, get("full rank")) == "lookup"
    assert choose_path(w, get("full rank"), "gemm") == "gemm"
    assert choose_path(w, "or_pairs", "lookup") == "lookup"
    monkeypatch.setattr(inexact, "LOOKUP_IN_GEMMS", 3)
    assert choose_path(w, "or_fours") == "lookup"
    assert InexactLinear(w, "or_fours").path == "lookup"


def test_weights_on_which_the_multiplier_is_exact_take_one_gemm(monkeypatch):
    torch.manual_seed(0)
    w = quantize_fibonacci(torch.randn(8, 50)).weight
    x, plain = operands(get("rank 8"), 20, 8, 50)
    layer = InexactLinear(w, "or_pairs")
    assert layer.path == "exact" and "exact on these weights: one GEMM" in repr(layer)
    calls = []
    gemm = inexact._int8_gemm
    monkeypatch.setattr(inexact, "_int8_gemm", lambda *a: calls.append(1) or gemm(*a))
    exact = x.long() @ w.long().T
    assert_equal(layer(x), exact)
    assert len(calls) == 1
    assert_equal(inexact_product(x, w, "or_pairs", "gemm"), exact)
    assert len(calls) == 3
    # On plain weights it is neither exact nor said to be.
    assert choose_path(plain, "or_pairs") == "gemm"
    assert not torch.equal(inexact_product(x, plain, "or_pairs").long(), x.long() @ plain.long().T)
    with pytest.raises(ValueError, match=r"not exact on the weight -?\d+ \(row 0, column \d+\)"):
        InexactLinear(plain, "or_pairs", path="exact")
    # or_fours is not exact on Fibonacci codes.
    assert choose_path(w, "or_fours") == "gemm"


def test_a_code_that_is_exact_still_refuses_what_the_table_does_not_hold():
    table = np.outer(np.arange(129), np.arange(128))
    multiplier = Multiplier.from_table(table, convention="sign-magnitude")
    layer = InexactLinear(torch.tensor([[1, -128]], dtype=torch.int8), multiplier)
    assert layer.path == "exact"
    with pytest.raises(ValueError, match=r"x\[0, 1\] is -128"):
        layer(torch.tensor([[1, -128]], dtype=torch.int8))


def test_the_result_widens_where_int32_might_end():
    # 2**31 - 1 once is int32; twice is not. And a product of 16,384 fits 131,071 times.
    table = np.zeros((256, 256), dtype=np.int64)
    table[127 + 128, 127 + 128] = 2**31 - 1
    multiplier = Multiplier.from_table(table, convention="signed")
    for K, dtype in ((1, torch.int32), (2, torch.int64)):
        x = torch.full((20, K), 127, dtype=torch.int8)
        for path in PATHS:
            y = inexact_product(x, x[:3], multiplier, path)
            assert y.dtype == dtype and y.unique().tolist() == [K * (2**31 - 1)]
    for K, dtype in ((131_071, torch.int32), (131_072, torch.int64)):
        x = torch.full((17, K), -128, dtype=torch.int8)
        for path in ("auto", "gemm", "lookup"):
            y = inexact_product(x, x[:2], "or_pairs", path)
            assert y.dtype == dtype and y.unique().tolist() == [K * 2**14]


@pytest.mark.parametrize("largest", [2**14 - 1, 2**17 - 1, 2**24 + 1, 2**31 - 1])
def test_float_sums_of_the_lookup_path_never_round(largest):
    # Odd products that all add up: float32 would lose the last bit within a thousand of them.
    table = np.outer(np.arange(129), np.arange(129))
    table[127, 127] = largest
    multiplier = Multiplier.from_table(table, convention="sign-magnitude")
    x = torch.full((20, 5001), 127, dtype=torch.int8)
    y = inexact_product(x, -x[:2], multiplier, "lookup")
    assert y.unique().tolist() == [-5001 * largest]


def test_a_large_layer_by_the_compiled_loop():
    compiler_or_skip()
    for name in ("or_pairs", "xor_pairs", "or_fours", "rank 8", "signed", "full rank"):
        multiplier = get(name)
        x, w = operands(multiplier, 70, 33, 2051)
        expected = compiled_lookup_product(x, w, multiplier)
        assert torch.equal(expected[:2], summed_table(x[:2], w, multiplier))
        for path in PATHS:
            assert_equal(inexact_product(x, w, multiplier, path), expected)


def compiler_or_skip() -> None:
    try:
        compiler_command()
    except NotAvailable as reason:
        pytest.skip(str(reason))


def test_the_compiled_loop_sums_large_tables_in_64_bits():
    compiler_or_skip()
    multiplier = get("32 bits")
    x, w = operands(multiplier, 2, 3, 500)
    found = compiled_lookup_product(x, w, multiplier)
    assert torch.equal(found, summed_table(x, w, multiplier))


def test_without_a_compiler_the_loop_is_not_available(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    lookup._loop.cache_clear()
    x, w = operands(get("rank 1"), 2, 2, 2)
    with pytest.raises(NotAvailable, match="needs a C compiler"):
        compiled_lookup_product(x, w, "or_pairs")
    lookup._loop.cache_clear()


def test_the_error_is_a_product_too():
    for name in ("or_pairs", "rank 3", "signed"):
        multiplier = get(name)
        x, w = operands(multiplier, 30, 6, 80)
        error = summed_table(x, w, multiplier) - x.long() @ w.long().T
        assert torch.equal(error_product(x, w, multiplier), error)
        found = output_error(x, w, multiplier)
        assert torch.allclose(found.bias, error.double().mean(0))
        assert torch.allclose(found.spread, error.double().std(0, correction=0))
        assert found.bias.shape == found.spread.shape == found.signal.shape == (6,)
    assert not output_error(x, w, "exact").spread.any()


def test_the_layer_keeps_only_weight_and_table():
    x, w = operands(get("rank 8"), 20, 6, 33)
    layer = InexactLinear(w, get("rank 8"))
    expected = summed_table(x, w, get("rank 8"))
    state = layer.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "weight": torch.int8,
        "table": torch.int32,
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    # Another weight and another table of the same shape: both are those that were loaded.
    other = InexactLinear(torch.zeros_like(w), get("full rank"))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.path == "gemm" or other(x) is not None
    assert_equal(other(x), expected)
    assert other.path == "gemm"
    assert_equal(copy.deepcopy(layer)(x), expected)


def test_a_weight_that_is_written_to_is_prepared_anew():
    x, w = operands(get("rank 8"), 20, 6, 33)
    layer = InexactLinear(w, "or_pairs")
    layer.weight.neg_()
    layer.weight.clamp_(min=-127)
    assert_equal(layer(x), summed_table(x, layer.weight, "or_pairs"))
    layer.weight.fill_(5)
    assert layer.path == "exact" and "path='exact'" in repr(layer)


def test_a_table_that_is_written_to_is_the_one_that_multiplies():
    x, w = operands(get("rank 8"), 20, 6, 33)
    layer = InexactLinear(w, "or_pairs")
    layer.table.zero_()
    assert not layer(x).any() and layer.multiplier.name == "table"
    layer.table.copy_(torch.tensor(find_multiplier("xor_pairs").table))
    assert layer.multiplier is find_multiplier("xor_pairs")
    assert_equal(layer(x), summed_table(x, w, "xor_pairs"))
    layer.table = torch.tensor(find_multiplier("or_fours").table)
    assert_equal(layer(x), summed_table(x, w, "or_fours"))
    layer.table[0, 3] = 1
    for use in (lambda: layer(x), lambda: layer.path, layer.state_dict):
        with pytest.raises(ValueError, match=r"weight 0 and input 3.*must be 0"):
            use()


def test_layers_that_were_made_or_changed_in_inference_mode_can_be_called():
    x, w = operands(get("rank 8"), 20, 6, 33)
    multiplier = get("rank 8")
    expected = summed_table(x, w, multiplier)
    layer = InexactLinear(w, multiplier)
    other = InexactLinear(torch.zeros_like(w), "or_pairs")
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        moved = InexactLinear(w, multiplier)
        moved._apply(torch.clone)  # as a move to another device does
        assigned = InexactLinear(torch.zeros_like(w), multiplier)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        assigned.load_state_dict(state, assign=True)
        assert_equal(copied(x), expected)
    for changed in (copied, moved, assigned):
        assert_equal(changed(x), expected)
        assert changed.path == "gemm"
        changed.weight.fill_(4)
        assert_equal(changed(x), summed_table(x, changed.weight, multiplier))
    assert not other(x).any()


def saved_and_loaded(state: dict) -> dict:
    """A state dict through a file, read as one that is not trusted."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_loaded_table_keeps_its_convention_and_its_name():
    unsigned, signed = get("unsigned"), get("signed")
    x, w = operands(unsigned, 20, 6, 33)
    nested = torch.nn.Sequential(torch.nn.Identity(), InexactLinear(w, unsigned))
    assert list(nested.state_dict()) == ["1.weight", "1.table"]
    other = torch.nn.Sequential(torch.nn.Identity(), InexactLinear(torch.zeros_like(w), signed))
    other.load_state_dict(saved_and_loaded(nested.state_dict()))
    assert other[1].multiplier.convention == "unsigned" and other[1].multiplier.name == "unsigned"
    assert_equal(other(x), summed_table(x, w, unsigned))
    # And back, although a 'signed' table is none that an 'unsigned' layer could have.
    other[1] = InexactLinear(w, signed)
    nested.load_state_dict(saved_and_loaded(other.state_dict()))
    assert_equal(nested(x), summed_table(x, w, signed))
    # A shipped one comes back with its closed form.
    shipped = InexactLinear(w, "or_pairs")
    nested[1].load_state_dict(saved_and_loaded(shipped.state_dict()))
    assert nested[1].multiplier is find_multiplier("or_pairs")
    assert "multiplier='or_pairs', path='gemm' (2 int8 GEMMs)" in repr(nested)


def test_the_path_is_that_of_what_was_loaded():
    _, w = operands(get("rank 8"), 1, 6, 33)
    layer = InexactLinear(torch.zeros_like(w), get("full rank"))
    assert layer.path == "exact"
    layer.load_state_dict(InexactLinear(w, get("full rank")).state_dict())
    assert layer.path == "lookup" and "table look-up" in repr(layer)
    layer.load_state_dict(InexactLinear(w, get("rank 8")).state_dict())
    assert layer.path == "gemm" and "path='gemm'" in repr(layer)
    assert "multiplier='rank 8'" in repr(layer.to("meta"))


def test_a_state_that_does_not_fit_is_refused():
    _, w = operands(get("rank 8"), 1, 6, 33)
    layer = InexactLinear(w, "or_pairs")
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32"):
        layer.load_state_dict({**layer.state_dict(), "weight": w.float()})
    with pytest.raises(RuntimeError, match="256 x 256"):
        layer.load_state_dict({**layer.state_dict(), "table": torch.zeros(3, 3, dtype=torch.int32)})
    lowest = torch.full_like(w, -128)
    narrow = InexactLinear(w.clamp(min=-127), get("no -128"))
    with pytest.raises(RuntimeError, match=r"weight\[0, 0\] is -128"):
        narrow.load_state_dict({**narrow.state_dict(), "weight": lowest})
    # Without the metadata of a state dict the convention is not known, and here not the layer's.
    signed = InexactLinear(w, get("signed"))
    with pytest.raises(RuntimeError, match="looks like an 'unsigned' table"):
        signed.load_state_dict(dict(layer.state_dict()))
    with pytest.raises(RuntimeError, match="size mismatch for table"):
        signed.load_state_dict(InexactLinear(w, get("rank 8")).state_dict())
    assert signed.multiplier is get("signed")
    with pytest.raises(RuntimeError, match="Missing key"):
        signed.load_state_dict({})


def test_the_layer_takes_batches_of_any_shape_and_inference_mode():
    x, w = operands(get("rank 8"), 24, 6, 33)
    expected = summed_table(x, w, "or_pairs").view(2, 3, 4, 6)
    with torch.inference_mode():
        layer = InexactLinear(w, "or_pairs")
        assert_equal(layer(x.view(2, 3, 4, 33)), expected)
    assert_equal(layer(x.view(2, 3, 4, 33)), expected)
    assert layer(x[0]).shape == (6,)
    assert layer(x[:0]).shape == (0, 6)
    empty = InexactLinear(w[:, :0], "or_pairs")
    assert empty(x[:, :0].view(2, 12, 0)).shape == (2, 12, 6)
    assert not empty.straight_through(torch.zeros(2, 3, 0)).any()


def test_results_are_not_scratch_memory():
    x, w = operands(get("rank 8"), 20, 6, 33)
    layer = InexactLinear(w, get("rank 8"))
    first = layer(x)
    kept = first.clone()
    layer(-x.clamp(min=-127))
    assert torch.equal(first, kept)


def test_the_gradient_goes_straight_through():
    multiplier = get("rank 3")
    x8, w8 = operands(multiplier, 20, 6, 33)
    x, w = x8.float().requires_grad_(), w8.float().requires_grad_()
    y = straight_through_product(x, w, multiplier)
    assert torch.equal(y.long(), summed_table(x8, w8, multiplier))
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    assert torch.allclose(x.grad, weights @ w8.float())
    assert torch.allclose(w.grad, weights.T @ x8.float())

    layer = InexactLinear(w8, multiplier)
    again = x8.float().view(4, 5, 33).requires_grad_()
    y = layer.straight_through(again)
    assert torch.equal(y.long().view(20, 6), summed_table(x8, w8, multiplier))
    (y.view(20, 6) * weights).sum().backward()
    assert torch.allclose(again.grad.view(20, 33), x.grad)


def test_a_layer_can_be_trained_through():
    torch.manual_seed(0)
    x = torch.randint(-60, 60, (64, 12)).float()
    target = x @ torch.randint(-20, 20, (3, 12)).float().T
    w = torch.zeros(3, 12, requires_grad=True)
    losses = []
    for _ in range(60):
        rounded = w + (w.round().clamp(-127, 127) - w).detach()
        loss = (straight_through_product(x, rounded, "or_pairs") - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            w -= 2e-4 * w.grad
            w.grad = None
    assert min(losses) < losses[0] / 10


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: inexact_product(x.float(), w, "or_pairs"), TypeError, "float32"),
        (lambda x, w: inexact_product(x.float(), w.float(), "or_pairs"), TypeError, "float32"),
        (lambda x, w: inexact_product(x, w[:, 1:], "or_pairs"), ValueError, "inner"),
        (lambda x, w: inexact_product(x[0], w, "or_pairs"), ValueError, "matrices"),
        (lambda x, w: inexact_product(x, w, "or_pear"), ValueError, "did you mean"),
        (lambda x, w: inexact_product(x, w, "or_pairs", "fast"), ValueError, "paths are"),
        (lambda x, w: InexactLinear(w.int() * 3, "or_pairs"), TypeError, "outside -128..127"),
        (lambda x, w: InexactLinear(w.float(), "or_pairs"), TypeError, "Quantize"),
        (lambda x, w: InexactLinear([[1]], "or_pairs"), TypeError, "list"),
        (lambda x, w: InexactLinear(w[0], "or_pairs"), ValueError, "out_features"),
        (lambda x, w: InexactLinear(w, "or_pairs")(x.float()), TypeError, "straight_through"),
        (lambda x, w: InexactLinear(w, "or_pairs")(x[:, 1:]), ValueError, "in_features=4"),
        (lambda x, w: InexactLinear(w, get("no -128")), ValueError, r"w\[1, 2\] is -128"),
        (lambda x, w: inexact_product(x, w, get("no -128")), ValueError, r"w\[1, 2\] is -128"),
        (
            lambda x, w: inexact_product(x, w, get("no -128 in x")),
            ValueError,
            r"x\[0, 3\] is -128.*it admits no such input.*129 columns",
        ),
        (
            lambda x, w: straight_through_product(x, w, "or_pairs"),
            TypeError,
            "floating",
        ),
        (
            lambda x, w: straight_through_product(x.float() + 0.5, w.float(), "or_pairs"),
            ValueError,
            "whole number",
        ),
        (
            lambda x, w: straight_through_product(x.float(), w.float() * 2, "or_pairs"),
            ValueError,
            "holds",
        ),
        (
            lambda x, w: straight_through_product(x.float()[:, :1], w[:1].float(), "or_pairs"),
            ValueError,
            "inner dimensions",
        ),
        (
            lambda x, w: straight_through_product(x[0].float(), w[:1].float(), "or_pairs"),
            ValueError,
            "matrices",
        ),
        (
            lambda x, w: InexactLinear(w, "or_pairs").straight_through(x.numpy()),
            TypeError,
            "x is ndarray",
        ),
        (
            lambda x, w: InexactLinear(w, "or_pairs").straight_through(x),
            TypeError,
            "x is torch.int8",
        ),
        (
            lambda x, w: InexactLinear(w, "or_pairs").straight_through(x.float()[:, 1:]),
            ValueError,
            "in_features=4",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    x = torch.tensor([[1, 2, 3, -128], [4, 5, 6, 7]], dtype=torch.int8)
    w = torch.tensor([[1, 2, 3, 4], [127, 0, -128, 1]], dtype=torch.int8)
    with pytest.raises(error, match=words):
        call(x, w)


@needs_cuda
@pytest.mark.parametrize("name", EVERY)
def test_cuda_gives_the_same_numbers(name):
    multiplier = get(name)
    for M, N, K in ((1, 1, 1), (3, 5, 7), (40, 9, 301), (256, 128, 1024)):
        x, w = operands(multiplier, M, N, K)
        expected = inexact_product(x, w, multiplier).long()
        for path in PATHS:
            found = inexact_product(x.cuda(), w.cuda(), multiplier, path)
            assert found.device.type == "cuda"
            assert_equal(found, expected)
    layer = InexactLinear(w, multiplier).cuda()
    assert_equal(layer(x.cuda()), expected)
