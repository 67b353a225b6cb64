"""The GEMM forms and the choice between them: exact for every operand, wherever they run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posmat as pm
from posmat.layer import engines, exact, gemm
from posmat.layer.engines import ENGINES
from posmat.layer.proof import BYTES, INT8, MAGNITUDES, prove
from posmat.tests.operands import PREPARED, WAYS, check, constant, is_available, layouts, operands

BY_FLOAT32 = (WAYS["float32_product"], WAYS["prepare_float32"])
every_way = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS.keys())


@st.composite
def problems(draw):
    M, N = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    K = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 64, 65, 130]))
    pair = []
    for drawn in operands(M, N, K, seed=draw(st.integers(0, 2**16))):
        corners = torch.tensor([-128, -127, 0, 127], dtype=torch.int8)[drawn.long() % 4]
        constants = [torch.full_like(drawn, value) for value in (-128, -1, 0, 127)]
        t = draw(st.sampled_from([drawn, corners, *constants]))
        across = (t[:1].expand(t.shape), t[:, :1].expand(t.shape))  # stride 0
        pair.append(draw(st.sampled_from([*layouts(t), *across])))
    return pair


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_way_is_exact(problem):
    for method in WAYS.values():
        if is_available(method):
            check(method, *problem)


@every_way
def test_every_layout_with_an_inner_dimension_of_one_too_and_stride_zero_and_no_numbers(method):
    for M, N, K in ((1, 1, 1), (1, 9, 1), (9, 1, 1), (33, 17, 1), (9, 20, 33)):
        for x, w in zip(*map(layouts, operands(M, N, K)), strict=True):
            # Whatever a fresh result finds in its memory must not be taken for the result.
            torch.full((M, N), 123_456_789, dtype=torch.int32)
            check(method, x, w)
    x, w = operands(40, 24, 300)
    check(method, x[:1].expand(40, 300), w[:, :1].expand(24, 300))
    check(method, constant(1, 1, -128).expand(1, 1), constant(1, 1, -128).expand(24, 1))
    for sizes in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        check(method, *operands(*sizes))


@every_way
def test_all_pairs_of_int8(method):
    values = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    check(method, values, values)  # K = 1
    zeros = torch.zeros_like(values)
    padded = torch.cat([zeros, values, zeros], 1)
    check(method, padded, padded)  # K = 3: the GEMM
    no_lowest = values[1:].expand(255, 2)  # W without a -128: two GEMMs of the positive product
    check(method, values.expand(256, 2), no_lowest)


@every_way
@pytest.mark.parametrize("count", [1, 2])
def test_the_seeds_size_with_one_thread_and_two(method, count, threads):
    threads(count)
    x, w = pm.random_operands(pm.ProblemSize(256, 128, 9216), low=-128)
    if is_available(method):
        assert torch.equal(method(x, w).double(), x.double() @ w.double().T)


@every_way
def test_int32_from_both_sides(method):
    """131,071 products of -128 · -128 are the most that int32 holds; one more is 2**31."""
    for K, a, b in ((131_071, 127, -128), (131_071, -128, -128), (131_072, -128, -128)):
        check(method, constant(2, K, a), constant(3, K, b))
    check(method, *operands(3, 2, 131_079))  # the last blocks are of every length


def test_the_float32_block_from_both_sides():
    """1,024 products reach 2**24; with one more, float32 loses the last bit and the blocks keep it.

    Only from there on does the plain float32 layer go wrong, so the test knows its limit is right.
    """
    x = constant(1, 1025, -128)
    w = x.clone()
    x[0, -1], w[0, -1] = 1, 1
    assert pm.linear_product(x[:, :1024], w[:, :1024]).item() == 2**24
    assert pm.linear_product(x, w).item() != 2**24 + 1
    for method in BY_FLOAT32:
        check(method, x[:, :1024], w[:, :1024])
        check(method, x, w)


def unaligned():
    """Operands whose rows begin where CUDA's int8 GEMM cannot load from."""
    wider_x, wider_w = operands(24, 16, 67)
    yield wider_x[:, 1:65], wider_w[:, 1:65]
    yield operands(24, 8, 65_537)  # its last block begins anywhere
    x, w = operands(24, 16, 64)
    longer = torch.empty(24 * 64 + 3, dtype=torch.int8)
    yield longer[3:].view(24, 64).copy_(x), w


@every_way
def test_padded_and_aligned_as_cuda_asks(method, use_engine, strict_int8_gemm):
    use_engine("padded")
    for M in (1, 16, 17, 40):
        for N, K in ((1, 1), (1, 70), (8, 8), (9, 7), (9, 1030)):
            check(method, *operands(M, N, K))
    for value in (127, -128):
        check(method, constant(20, 1100, value), constant(20, 1100, value))
    check(method, *operands(0, 3, 8))
    x, w = operands(20, 9, 66)
    check(method, x.t().contiguous().t(), w[:1].expand(9, 66))
    check(method, *operands(2, 3, 131_073))
    for x, w in unaligned():
        check(method, x, w)
    if method is not pm.exact_product:  # which may have found float32 faster
        assert bool(strict_int8_gemm) != (method in BY_FLOAT32)


@every_way
def test_a_device_without_an_int8_gemm_takes_float32(method, monkeypatch, nothing_found):
    def missing(*arguments, **options):
        raise RuntimeError("no int8 GEMM\nfor this device")

    monkeypatch.setattr(torch, "_int_mm", missing)
    if method is pm.int8_product:
        with pytest.raises(pm.NotAvailable, match=r"does not run here \(no int8 .*Use exact_p"):
            method(*operands(3, 3, 3))
        assert exact.chosen_method() == "float32_product"
        assert "int8_product: it does not run here (no int8 GEMM)" in pm.explain()
        return
    for K in (1, 1024, 1025, 4000):
        x, w = operands(33, 20, K)
        check(method, x, w)
        check(method, constant(3, K, -128), constant(3, K, -128))
        # Large ones of one sign: their sum is odd in places, and as large as it can be.
        x, w = x.clamp(min=90), w.clamp(min=90)
        for pair in ((x, w), (-x, w), (x, -w)):
            check(method, *pair)


@every_way
def test_blocks_of_rows_and_columns(method, use_engine, monkeypatch, threads):
    """Blocks that do not divide the sizes, and a last one of a single column."""
    threads(1)
    use_engine("float32")
    x, w = operands(1300, 5, 49)
    forms = {name: getattr(gemm, name) for name in ("MAGNITUDE", "POSITIVE_PART", "SHIFTED")}
    for columns in (1, 6, 8):
        monkeypatch.setattr(engines, "BLOCK_BYTES", 256 * columns)
        for name, form in forms.items():
            cut = form._replace(block_bytes=256 * columns)
            monkeypatch.setattr(gemm, name, cut)
            sizes = engines._block_sizes(x, 5, 10**6, cut, ENGINES["float32"])
            assert sizes == (256, columns)
        check(method, x, w)
        check(method, x.t().contiguous().t(), w.t().contiguous().t())


def test_the_operands_of_the_positive_product_have_no_sign(monkeypatch):
    """And those of the one-sided one have none on the left, where no byte is above 128."""
    seen = []

    def watch(a, b, out=None):
        seen.append((a.dtype, int(a.max()), int(b.min())))
        return ENGINES["float32"].gemm(a, b, out)

    engine = ENGINES["float32"]._replace(gemm=watch)
    monkeypatch.setattr(gemm, "engine_for", lambda *asked: engine)
    for name in ("positive_matrix_product", "prepare_positive", "one_sided_product"):
        seen.clear()
        check(WAYS[name], *operands(64, 64, 1100))
        dtypes, largest, lowest = zip(*seen, strict=True)
        assert set(dtypes) == {torch.uint8}
        assert max(largest) == (128 if "one" in name else 255)
        assert "one" in name or set(lowest) == {0}


def test_the_parts_of_the_weights_are_non_negative_and_make_them_up():
    w = torch.arange(-128, 128, dtype=torch.int8).reshape(16, 16)
    weight = pm.prepare_positive(w)
    positive, negative, lowest = weight.parts.int().split(16)
    assert weight.parts.dtype == torch.int8 and weight.parts.min() == 0
    assert torch.equal(positive - negative - lowest, w.int())
    assert not (positive * negative).any()
    # Without a -128 two GEMMs are enough, and of Fibonacci codes both parts are Fibonacci codes.
    codes = pm.quantize_fibonacci(torch.randn(20, 60, generator=torch.Generator().manual_seed(0)))
    parts = pm.prepare_positive(codes.weight).parts
    assert len(parts) == 40 and bool(pm.is_fibonacci(parts).all())


@pytest.mark.parametrize(("total", "length"), [(65_793, 1600), (65_795, 800)])
def test_the_longest_block_of_the_weights_at_hand_from_both_sides(total, length, use_engine):
    """255 times 65,793 is the largest sum of bytes that float32 holds, and 65,794 is even."""
    use_engine("float32")
    engine = ENGINES["float32"]
    w = torch.full((1, 1600), total // 1600, dtype=torch.int8)
    w[0, : total % 1600] += 1
    assert int(w.sum()) == total
    for weight in (w, -w):
        assert pm.prepare_positive(weight).term(engine).longest == length
        check(WAYS["prepare_positive"], constant(300, 1600, 127), weight)
    if length == 800:  # all in one half, which is too much for it too
        halves = torch.cat([w[:, :800] + w[:, 800:], 0 * w[:, 800:]], 1)
        assert gemm.longest_block(halves, 255, engine) == 536
    a = torch.full((1, 1600), 255, dtype=torch.uint8)
    assert (engine.gemm(a, w.t()).item() == 255 * total) == (length == 1600)
    for value, longest in ((127, 512), (-128, 512), (0, 70_000)):
        assert gemm.longest_block(constant(2, 70_000, value), 255, engine) == longest


def test_a_block_does_not_reach_over_the_end_of_the_one_it_was_found_for(use_engine, threads):
    """The weights lie around the middle of K: two blocks are long enough, cut there.

    With one thread 9,216 columns are taken at a time, and the second 9,216 have all the weights.
    """
    threads(1)
    use_engine("float32")
    w = torch.zeros(3, 20_480, dtype=torch.int8)
    w[:, 10_240 - 500 : 10_240 + 499] = 127
    weight = pm.prepare_positive(w)
    assert weight.term(ENGINES["float32"]).longest == 10_240
    x = constant(256, 20_480, 127)
    assert torch.equal(pm.positive_matrix_product(x, weight).long(), pm.integer_product(x, w))
    for K, longest, columns in ((20_480, 10_240, 9216), (100, 40, 16), (7, 3, 2), (9, 9, 9)):
        lengths = torch.tensor(engines._lengths(K, longest, columns))
        ends = lengths.cumsum(0)
        assert ends[-1] == K and lengths.min() > 0 and lengths.max() <= columns
        assert torch.equal((ends - lengths) // longest, (ends - 1) // longest)


@pytest.mark.parametrize(("method", "prepare"), PREPARED)
def test_prepared_weights_serve_again_and_are_the_weights_as_they_were(method, prepare):
    x, w = operands(33, 20, 2100)
    weight, before = prepare(w), pm.integer_product(x, w)
    w.zero_()
    assert all(torch.equal(method(x, weight).long(), before) for _ in range(2))


def test_prepared_weights_serve_when_circumstances_change(threads, use_engine):
    """Other threads, or oneDNN off: another engine may multiply than the one they are laid out for.

    Each is laid out under every engine, and multiplied with by every other.
    """
    x, w = operands(33, 20, 2100)

    def prepare_all():
        inexact = [pm.prepare_inexact(w, multiplier) for multiplier in ("or_pairs", "exact")]
        return [pm.prepare_positive(w), *inexact]

    def check_all(weights):
        for weight, y in zip(weights, expected, strict=True):
            method = pm.inexact_product if weight is not weights[0] else pm.positive_matrix_product
            assert torch.equal(method(x, weight), y)

    weights, y = prepare_all(), pm.integer_product(x, w).int()
    expected = [y, pm.inexact_product(x, w, "or_pairs", "lookup"), y]
    for count in (1, 2):
        threads(count)
        check_all(weights)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            check_all(weights)
            without = prepare_all()
        check_all(without)
    exact_engines = ["float32"]
    if all(prove(engines.by_int8, x.device, of).exact for of in (BYTES, INT8)):
        exact_engines.append("direct")
    for engine in exact_engines:
        use_engine(engine)
        weights = prepare_all()
        for other in exact_engines:
            use_engine(other)
            check_all(weights)


@every_way
def test_operands_that_do_not_fit_are_refused(method):
    x, w = operands(4, 3, 8)
    for unfit in ((x.float(), w.float()), (x.view(torch.uint8), w)):
        with pytest.raises(TypeError, match=r"torch\.int8"):
            method(*unfit)
    for unfit in ((x, w[:, :5]), (x[0], w)):
        with pytest.raises(ValueError, match="matrices with the same inner dimension"):
            method(*unfit)
    with pytest.raises(ValueError, match="is on meta"):
        method(x.to("meta"), w)


def test_only_matrices_of_int8_are_prepared():
    w = operands(1, 3, 8)[1]
    for _, prepare in PREPARED:
        for other in (w.float(), w.view(torch.uint8), w.int(), w.numpy(), prepare(w)):
            with pytest.raises(TypeError, match=r"the weights must be torch\.int8"):
                prepare(other)
        with pytest.raises(ValueError, match="must be a matrix"):
            prepare(w[0])


def test_weights_prepared_for_another_method_are_refused():
    x, w = operands(4, 3, 8)
    own = {
        pm.float32_product: pm.prepare_float32(w),
        pm.positive_matrix_product: pm.prepare_positive(w),
        pm.inexact_product: pm.prepare_inexact(w, "exact"),
    }
    for method in (pm.exact_product, pm.int8_product, pm.one_sided_product, *own):
        for foreign in (*own.values(), w.numpy()):
            if foreign is not own.get(method):
                with pytest.raises(TypeError, match=f"w is a .*: {method.__name__} takes an int8"):
                    method(x, foreign)


def test_explain_names_the_choice_and_every_candidate():
    text = pm.explain("cpu")
    assert text.startswith("exact_product on cpu")
    assert all(f"  {name}: " in text for name in exact.CANDIDATES)
    assert text.splitlines()[0].endswith(f": {exact.chosen_method()}")
    assert exact.chosen_method(torch.device("cpu")) == exact.chosen_method("cpu")


@pytest.mark.parametrize("device", ["xpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    for ask in (pm.explain, exact.chosen_method):
        with pytest.raises(ValueError, match=device):
            ask(device)


def test_without_a_proved_method_the_choice_is_integers(monkeypatch, nothing_found):
    wrong = {"off by one": lambda x, w: pm.float32_product(x, w) + 1}
    monkeypatch.setattr(exact, "CANDIDATES", wrong)
    assert exact.chosen_method() == "elementwise_product"
    check(pm.exact_product, *operands(9, 8, 7))
    assert "off by one: 100% of its numbers are wrong" in pm.explain()


def test_without_onednn_nothing_but_int8_product_takes_the_loop(monkeypatch, threads):
    """Then PyTorch's int8 GEMM is a loop, exact and very slow."""
    threads(1)
    x, w = operands(20, 9, 1100)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        for operands_range in (INT8, MAGNITUDES, BYTES):
            assert pm.engine_for(x.device, operands_range).name == "float32"
        assert exact.chosen_method() == "float32_product"
        assert pm.explain().count("times slower than the fastest") == 2
        check(pm.int8_product, x, w)

        def loop(*arguments, **options):
            raise AssertionError("the loop was called")

        monkeypatch.setattr(torch, "_int_mm", loop)
        for method in WAYS.values():
            if method is not pm.int8_product:
                check(method, x, w)
                check(method, *operands(5, 4, 1))
        for multiplier in ("exact", "or_pairs", "or_fours"):
            pm.inexact_product(x, w, multiplier, "gemm")
        with pytest.raises(AssertionError, match="the loop was called"):
            pm.int8_product(x, w)


def test_the_default_device_does_not_matter(nothing_found):
    x, w = operands(20, 8, 1100)
    with torch.device("meta"):
        results = [method(x, w) for method in WAYS.values() if method is not pm.int8_product]
    assert all(torch.equal(y.long(), pm.integer_product(x, w)) for y in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_under_autocast(dtype, nothing_found, use_engine):
    x, w = operands(33, 20, 1500)
    with torch.autocast("cpu", dtype=dtype):
        check(pm.exact_product, x, w)
        use_engine("float32")
        for method in WAYS.values():
            if is_available(method):
                check(method, x, w)


@every_way
def test_a_result_is_not_overwritten_by_the_next_call(method):
    for K in (500, 1) if is_available(method) else ():
        pairs = [operands(64, 32, K, seed=seed) for seed in range(3)]
        for result, pair in [(method(*pair), pair) for pair in pairs]:
            assert torch.equal(result.long(), pm.integer_product(*pair))


@every_way
def test_many_threads_at_once(method):
    def is_right(seed):
        x, w = operands(40 + seed, 16, 700, seed=seed)
        expected = pm.integer_product(x, w)
        return all(torch.equal(method(x, w).long(), expected) for _ in range(10))

    if is_available(method):
        with ThreadPoolExecutor(4) as workers:
            assert all(workers.map(is_right, range(4)))


@every_way
def test_what_was_made_in_inference_mode_serves_outside_of_it(method):
    engines.release_scratch()
    x, w = operands(64, 32, 500)
    with torch.inference_mode():
        check(method, x, w)
        weights = [(make, prepare(w)) for make, prepare in PREPARED]
    check(method, x, w)
    for product, weight in weights:
        assert torch.equal(product(x, weight).long(), pm.integer_product(x, w))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_way
def test_cuda(method):
    for M, N, K in ((0, 3, 8), (1, 1, 1), (16, 7, 9), (17, 8, 64), (256, 128, 9216)):
        x, w = operands(M, N, K)
        expected = pm.integer_product(x, w)
        try:
            assert torch.equal(method(x.cuda(), w.cuda()).cpu().long(), expected)
            y = method(x.cuda().t().contiguous().t(), w[:1].cuda().expand(N, K))
        except pm.NotAvailable as error:
            pytest.skip(str(error))
        assert torch.equal(y.cpu().long(), pm.integer_product(x, w[:1].expand(N, K)))
    on_cuda = torch.empty(24 * 67 + 3, dtype=torch.int8, device="cuda")
    for x, w in unaligned():
        offset = on_cuda[3 : 3 + x.numel()].view(x.shape).copy_(x) if x.numel() < 1600 else x.cuda()
        wider = torch.zeros((w.shape[0], w.shape[1] + 3), dtype=torch.int8, device="cuda")
        wider[:, 1:-2] = w
        y = method(offset, wider[:, 1:-2])
        assert torch.equal(y.cpu().long(), pm.integer_product(x, w))
    assert "exact_product on cuda" in pm.explain("cuda")
