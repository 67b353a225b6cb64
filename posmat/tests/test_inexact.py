"""Inexact products against the summed table, number for number, by every path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import posmat as pm
from posmat.layer.engines import ENGINES
from posmat.multipliers import lookup
from posmat.multipliers import product as inexact
from posmat.multipliers import table as multipliers
from posmat.multipliers.product import inexact_product, prepare_inexact
from posmat.multipliers.shipped import find_multiplier, multiplier_names
from posmat.multipliers.table import Multiplier
from posmat.tests import operands as plain

PATHS = ("gemm", "lookup")


def summed_table(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """The definition, from the table as it came in: one product at a time, summed as int64."""
    found = find_multiplier(multiplier)
    table = torch.from_numpy(found.table.astype(np.int64))
    x, w = x.cpu().long(), w.cpu().long()
    y = torch.zeros(len(x), len(w), dtype=torch.int64)
    for m in range(len(x)):
        if found.convention == "signed":
            half = len(table) // 2
            y[m] = table[w + half, x[m] + half].sum(1)
        else:
            signs = torch.where((w < 0) ^ (x[m] < 0), -1, 1)  # the sign of 0 is plus
            y[m] = (signs * table[w.abs(), x[m].abs()]).sum(1)
    return y


def make_tables() -> dict[str, Multiplier]:
    """Multipliers of chosen rank and of every convention; none is symmetric."""
    rng = np.random.default_rng(11)
    made = {}

    def low_rank(size: int, rank: int, spread: int, first: int = 0) -> np.ndarray:
        operands = np.arange(first, first + size)
        a, b = (rng.integers(-spread, spread + 1, shape) for shape in ((size, rank), (rank, size)))
        return np.outer(operands, operands) + a @ b

    def add(name: str, table: np.ndarray, convention: str = "sign-magnitude") -> None:
        assert not np.array_equal(table, table.T)
        made[name] = Multiplier.from_table(table, name, convention, "weight, input")

    for rank in (1, 3, 8, 20):
        add(f"rank {rank}", low_rank(129, rank, 11))
    add("two digits", low_rank(129, 2, 3000))
    add("no -128", low_rank(128, 5, 11))
    add("no -128 in x", low_rank(129, 2, 11)[:, :128])
    add("signed", low_rank(256, 4, 100, first=-128), "signed")
    add("unsigned", np.abs(low_rank(256, 6, 11)), "unsigned")
    add("full rank", rng.integers(0, 2**14, (129, 129)))
    add("signed full rank", rng.integers(-(2**16), 2**16, (256, 256)), "signed")
    add("32 bits", rng.integers(-(2**31), 2**31, (129, 129)))
    for n in (4, 5, 6, 7):
        add(f"{n} bits", low_rank(2**n, 3, 11) % 4**n, "unsigned")
    add("4 bits signed", low_rank(16, 3, 11, first=-8), "signed")
    add("7 bits signed", low_rank(128, 3, 11, first=-64), "signed")
    add("5 bits, magnitudes", low_rank(17, 3, 11))
    return made


TABLES = make_tables()
EVERY = [*multiplier_names(), *TABLES]


def get(name: str) -> Multiplier:
    return TABLES.get(name) or find_multiplier(name)


def operands(multiplier: Multiplier, M: int, N: int, K: int, seed: int = 0):
    pair = zip(plain.operands(M, N, K, seed=seed), reversed(multiplier.admitted), strict=True)
    return tuple(((t.int() - low) % (high - low + 1) + low).to(t.dtype) for t, (low, high) in pair)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype in (torch.int32, torch.int64)
    assert torch.equal(found.cpu().long(), expected)


@pytest.mark.parametrize("name", EVERY)
def test_every_pair_of_operands_by_every_path(name):
    # One product per output: y[m, n] = table[w[n], x[m]], all 65,536 of them.
    multiplier = get(name)
    (low_w, high_w), (low_x, high_x) = multiplier.admitted
    w = torch.arange(low_w, high_w + 1).to(torch.int8)[:, None]
    x = torch.arange(low_x, high_x + 1).to(torch.int8)[:, None]
    expected = summed_table(x, w, multiplier)
    if name in TABLES:
        assert not torch.equal(expected, expected.T)
    for path in ("auto", *PATHS):
        assert_equal(inexact_product(x, w, multiplier, path), expected)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("convention", ["unsigned", "signed", "two's complement"])
def test_both_orders_of_operands_at_every_width(convention, bits):
    rng, side = np.random.default_rng(bits), 2**bits
    v = np.arange(side) - (convention != "unsigned") * side // 2
    v = np.roll(v, side // 2 * (convention == "two's complement"))
    table = np.outer(v, v) + rng.integers(1, 9, (side, 2)) @ rng.integers(1, 9, (2, side))
    by_weight, by_input = (
        Multiplier.from_table(table, order, convention, order)
        for order in ("weight, input", "input, weight")
    )
    x, w = operands(by_weight, 20, 7, 65)
    x[0], w[0] = 0, 0  # whose products are not 0
    expected = summed_table(x, w, by_weight)
    assert expected[0, 0] > 0
    for path in PATHS:
        assert_equal(inexact_product(x, w, by_weight, path), expected)
        assert_equal(inexact_product(w, x, by_input, path), expected.T)


# Every form of a GEMM's operands: bits and their XOR; one column, in pairs and in sixteens; scales.
FORMS = [*multiplier_names(), "rank 3", "rank 20", "two digits", "signed", "32 bits"]
WAYS = [(name, path, None) for name in EVERY for path in PATHS]
WAYS += [(name, "gemm", engine) for name in FORMS for engine in ("float32", "padded")]


@pytest.mark.parametrize(("name", "path", "engine"), WAYS)
def test_paths_by_every_engine_are_the_summed_table(name, path, engine, request):
    if engine:
        request.getfixturevalue("use_engine")(engine)
        calls = request.getfixturevalue("strict_int8_gemm")  # refuses what CUDA's refuses
    multiplier = get(name)
    # Odd and even K, more than one K block of chunks, few rows and more than a row block.
    for M, N, K in ((1, 1, 1), (1, 9, 70), (17, 8, 64), (40, 9, 301), (17, 130, 64)):
        x, w = operands(multiplier, M, N, K, seed=K)
        expected = summed_table(x, w, multiplier)
        prepared = prepare_inexact(w, multiplier, path)
        # What was prepared serves again, for other inputs, and a result is not scratch memory.
        first, other = inexact_product(x, prepared), inexact_product(x.flip(0), prepared)
        assert_equal(first, expected)
        assert_equal(other, expected.flip(0))
    assert not engine or bool(calls) == (engine == "padded")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [*multiplier_names(), "rank 1", "rank 3", "rank 20", "two digits"])
def test_many_blocks_of_rows_and_columns(name, path, use_engine, monkeypatch, threads):
    """Look-ups take columns in pairs: of 13 that fit 12, and only of the last block an odd one."""
    threads(1)
    monkeypatch.setattr(inexact, "EMBED_BYTES", 2**10)
    monkeypatch.setattr(inexact, "INDEX_BYTES", 2**10)
    monkeypatch.setattr(inexact, "COLUMN_BYTES", 13 * 2**10)  # 52 columns, or 13 and 3
    monkeypatch.setitem(ENGINES, "float32", ENGINES["float32"]._replace(largest_sum=2**20 + 2**18))
    use_engine("float32")
    multiplier = get(name)
    for K in (129, 81):
        x, w = operands(multiplier, 300, 6, K)
        assert_equal(inexact_product(x, w, multiplier, path), summed_table(x, w, multiplier))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(EVERY),
    path=st.sampled_from(("auto", *PATHS)),
    sizes=st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 40)),
    seed=st.integers(0, 2**20),
    zero=st.booleans(),
    layouts=st.tuples(*[st.integers(0, 5)] * 2),
)
def test_small_shapes_in_every_layout(name, path, sizes, seed, zero, layouts):
    multiplier = get(name)
    pair = []
    for t, layout in zip(operands(multiplier, *sizes, seed=seed), layouts, strict=True):
        if zero:
            t[::2] = 0
        across = [part.expand(t.shape) for part in (t[:1], t[:, :1]) if t.numel()]  # stride 0
        pair.append([*plain.layouts(t), *(across or [t, t])][layout])
    assert_equal(inexact_product(*pair, multiplier, path), summed_table(*pair, multiplier))


def test_rows_with_odd_strides_and_offsets_are_looked_up_in_pairs():
    # A single row is contiguous whatever its stride, and cannot be read in pairs as it is.
    for name in ("rank 1", "rank 3", "two digits"):
        multiplier = get(name)
        memory, w = operands(multiplier, 10, 3, 7)
        odd_offset = memory.view(-1)[1:61].view(10, 6)
        pairs = [operands(multiplier, M, 3, 16_385) for M in (1, 2)]  # several blocks of an odd K
        for x in (memory[:1, :6], memory[1:2, 1:], memory[:, :6], odd_offset, odd_offset[::3]):
            pairs.append((x, w[:, :6]))
        for x, w in pairs:
            expected = summed_table(x, w, multiplier)
            assert_equal(inexact_product(x, w, multiplier, "gemm"), expected)


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
        for path in PATHS:
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


def test_the_path_is_chosen_by_what_look_ups_take_in_gemms_of_the_engine(use_engine, monkeypatch):
    _, w = operands(get("rank 8"), 1, 4, 9)

    def path_of(name):
        return prepare_inexact(w, get(name)).path

    for engine in ENGINES:
        use_engine(engine)
        assert path_of("or_pairs") == path_of("rank 20") == "gemm"
        assert path_of("full rank") == "lookup"
    # or_fours takes 8, and or_pairs 2.
    monkeypatch.setattr(inexact, "LOOKUP_IN_GEMMS", {"int8": 8, "float32": 7})
    for engine, path in (("direct", "gemm"), ("padded", "gemm"), ("float32", "lookup")):
        use_engine(engine)
        assert path_of("or_fours") == path and path_of("or_pairs") == "gemm"


def test_a_table_of_high_rank_is_not_factorized_to_be_looked_up(monkeypatch):
    def factorize(*arguments):
        raise AssertionError("factorized")

    new = Multiplier.from_table(get("full rank").table, "f", "sign-magnitude", "weight, input")
    monkeypatch.setattr(multipliers, "factorize", factorize)
    x, w = operands(new, 3, 4, 9)
    assert_equal(inexact_product(x, w, new), summed_table(x, w, new))
    with pytest.raises(AssertionError, match="factorized"):
        inexact_product(x, w, new, "gemm")


def test_what_was_prepared_says_how_it_multiplies():
    _, w = operands(get("rank 8"), 1, 6, 33)
    for name, path, gemms, words in (
        ("or_pairs", "gemm", 2, "'or_pairs', path 'gemm' (2 GEMMs)"),
        ("truncated", "gemm", 1, "'truncated', path 'gemm' (1 GEMM)"),
        ("exact", "exact", 1, "'exact', path 'exact' (exact on these weights: one GEMM)"),
        ("full rank", "lookup", 0, "'full rank', path 'lookup' (table look-up)"),
    ):
        found = prepare_inexact(w, get(name))
        assert (found.multiplier, found.path, found.gemms) == (get(name), path, gemms)
        assert repr(found) == f"InexactWeight(6, 33): {words}"


def test_weights_on_which_the_multiplier_is_exact_take_one_gemm(monkeypatch):
    torch.manual_seed(0)
    w = pm.quantize_fibonacci(torch.randn(8, 50)).weight
    x, plain = operands(get("rank 8"), 20, 8, 50)
    prepared = prepare_inexact(w, "or_pairs")
    assert prepared.path == "exact"
    exact = x.long() @ w.long().T
    calls = []
    engine = pm.engine_for(x.device)
    count = engine._replace(gemm=lambda *a: calls.append(1) or engine.gemm(*a))
    monkeypatch.setattr(inexact, "engine_for", lambda *asked: count)
    for weight, gemms in ((prepared, 1), (prepare_inexact(w, "or_pairs", "gemm"), 2)):
        calls.clear()
        assert_equal(inexact_product(x, weight), exact)
        assert len(calls) == gemms
    # It is not exact on plain weights, nor is or_fours on Fibonacci codes.
    assert prepare_inexact(plain, "or_pairs").path == prepare_inexact(w, "or_fours").path == "gemm"
    with pytest.raises(ValueError, match=r"not exact on the weight -?\d+ \(row 0, column \d+\)"):
        prepare_inexact(plain, "or_pairs", path="exact")


@pytest.mark.parametrize("name", ["exact", "or_pairs", "rank 8", "full rank"])
def test_what_was_prepared_is_the_weights_as_they_were(name, use_engine, strict_int8_gemm):
    """Also where an engine lays them out later than the first; made in inference mode or not."""
    use_engine("float32")
    multiplier = get(name)
    x, w = operands(multiplier, 20, 6, 33)
    expected = summed_table(x, w, multiplier)
    prepared = prepare_inexact(w, multiplier)
    with torch.inference_mode():
        other = prepare_inexact(w.clone(), multiplier)
        assert_equal(inexact_product(x, prepared), expected)
    w.zero_()
    for engine in ("float32", "padded"):
        use_engine(engine)
        for weight in (prepared, other):
            assert_equal(inexact_product(x, weight), expected)


def test_a_large_layer_by_the_compiled_loop():
    try:
        pm.compiler_command()
    except pm.NotAvailable as reason:
        pytest.skip(str(reason))
    for name in ("or_pairs", "xor_pairs", "or_fours", "rank 8", "signed", "full rank", "32 bits"):
        multiplier = get(name)
        x, w = operands(multiplier, 70, 33, 2051)
        expected = pm.compiled_lookup_product(x, w, multiplier)
        assert torch.equal(expected[:2], summed_table(x[:2], w, multiplier))
        for path in (*PATHS, "compiled"):
            assert_equal(inexact_product(x, w, multiplier, path), expected)


def test_without_a_compiler_the_loop_is_not_available(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    lookup._loop.cache_clear()
    x, w = operands(get("rank 1"), 2, 2, 2)
    with pytest.raises(pm.NotAvailable, match="needs a C compiler"):
        pm.compiled_lookup_product(x, w, "or_pairs")
    lookup._loop.cache_clear()


def test_the_error_is_a_product_too():
    for name in ("or_pairs", "rank 3", "signed"):
        multiplier = get(name)
        x, w = operands(multiplier, 30, 6, 80)
        exact = x.double() @ w.double().T
        error = summed_table(x, w, multiplier) - exact
        assert torch.equal(pm.error_product(x, w, multiplier).double(), error)
        expected = (error.mean(0), error.std(0, correction=0), exact.std(0, correction=0))
        assert all(map(torch.allclose, pm.output_error(x, w, multiplier), expected))
    assert not pm.output_error(x, w, "exact").spread.any()


NO_LOWEST = r"x\[0, 3\] is -128.*admits no such input, only -127..127.*larger table"


def exact(w: Tensor):
    return prepare_inexact(w, "exact")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: inexact_product(x.float(), w, "or_pairs"), TypeError, "float32"),
        (lambda x, w: inexact_product(x[:, 1:], w, "or_pairs"), ValueError, "inner"),
        (lambda x, w: inexact_product(x, w, "or_pear"), ValueError, "did you mean"),
        (lambda x, w: inexact_product(x, w, "or_pairs", "fast"), ValueError, "paths are"),
        (inexact_product, TypeError, "multiplier is missing"),
        (lambda x, w: inexact_product(x, exact(w), "or_pairs"), TypeError, "'exact': give neither"),
        (lambda x, w: inexact_product(x[:, 1:], exact(w)), ValueError, "inner"),
        (lambda x, w: inexact_product(x.float(), exact(w)), TypeError, "float"),
        (lambda x, w: prepare_inexact(w.int(), "or_pairs"), TypeError, "int32: the weights must"),
        (lambda x, w: prepare_inexact(w[0], "or_pairs"), ValueError, "out_features"),
        (lambda x, w: inexact_product(x, w, get("no -128")), ValueError, r"w\[1, 2\] is -128"),
        (lambda x, w: inexact_product(x, w, get("no -128 in x")), ValueError, NO_LOWEST),
        (lambda x, w: inexact_product(x, w, get("4 bits signed")), ValueError, "only -8..7"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    x = torch.tensor([[1, 2, 3, -128], [4, 5, 6, 7]], dtype=torch.int8)
    w = torch.tensor([[1, 2, 3, 4], [127, 0, -128, 1]], dtype=torch.int8)
    with pytest.raises(error, match=words):
        call(x, w)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
    assert_equal(inexact_product(x.cuda(), prepare_inexact(w.cuda(), multiplier)), expected)
