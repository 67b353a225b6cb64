"""What an engine is, which one is taken, and the proof of it; the memory that all of them share."""

import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

import posmat as pm
from posmat.layer import engines, exact, gemm, proof
from posmat.layer.engines import ENGINES, by_float32
from posmat.layer.problem import NotAvailable
from posmat.layer.proof import BYTES, INT8, MAGNITUDES, RANGES
from posmat.tests.operands import CPU, WAYS, check, constant, is_available, layouts, operands

LONGEST = {
    "float32": {INT8: 1024, MAGNITUDES: 1024, BYTES: 512},
    "int8": {INT8: 131_064, MAGNITUDES: 131_064, BYTES: 65_792},
}


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_exact_on_both_sides_of_its_longest_block(name, range_, request):
    """Sums of several blocks as int64: more than an engine's own sums may hold. Of all bytes."""
    if name == "direct" and not proof.prove(engines.by_int8, CPU, range_).exact:
        pytest.skip(f"int8 GEMMs of {range_} are not exact on this processor")
    if name == "padded":
        request.getfixturevalue("strict_int8_gemm")
    engine, (dtype, low, high) = ENGINES[name], RANGES[range_]
    largest = max(-low, high)
    longest = engine.longest(largest * 128)
    assert longest == LONGEST[engine.name][range_]
    assert longest * largest * 128 <= engine.largest_sum < (longest + 9) * largest * 128
    for K in (1, longest, longest + 9):
        w = torch.cat([constant(2, K, -128), constant(1, K, 127), operands(1, 2, K)[1]])
        random = torch.randint(low, high + 1, (3, K), generator=torch.Generator().manual_seed(K))
        for a in (torch.full((3, K), high), torch.full((3, K), low), random):
            expected = (a.double() @ w.double().t()).long()
            for weights in (w.t(), engine.prepare(w)):
                term = engines.Term(weights, longest)
                y = engines.sum_of_gemms(a.to(dtype), [term], len(w), engine, torch.int64)
                assert torch.equal(y, expected)


def test_sums_are_right_modulo_what_their_accumulator_holds():
    """Scales beyond 2**31 serve in int32 where the sum fits: 2**32 and a bit is the bit."""
    x, w = operands(20, 7, 40)
    y = pm.integer_product(x, w)
    engine = ENGINES["float32"]
    weights = engine.prepare(torch.cat([w, w]))

    def summed(scales, accumulator):
        terms = [engines.Term(weights, 1024, None, scales)]
        return engines.sum_of_gemms(x, terms, 7, engine, accumulator)

    for scale in (2**31, 2**32 - 3, 255**4, -(2**31) - 7):
        found = summed((scale, 3 - scale), torch.int32)
        assert found.dtype == torch.int32 and torch.equal(found.long(), 3 * y)
        assert torch.equal(summed((scale, 0), torch.int64), scale * y)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_an_engine_takes_every_layout(name, dtype, request):
    """Of small numbers, whose pairs no processor saturates."""
    if name == "padded":
        request.getfixturevalue("strict_int8_gemm")
    engine = ENGINES[name]
    for M, N, K in ((33, 20, 65), (1, 9, 1), (9, 1, 1), (1, 1, 7)):
        a, w = (t % 50 for t in operands(M, N, K))
        a = a.to(dtype)
        pairs = zip(layouts(a), layouts(w), strict=True)
        for left, right in (*pairs, (a[:1].expand(M, K), w[:, :1].expand(N, K))):  # stride 0
            expected = (left.double() @ right.double().t()).int()
            for weights in (right.t(), engine.prepare(right)):
                for out in (None, torch.empty((M, N), dtype=torch.int32)):
                    assert torch.equal(engine.gemm(left, weights, out), expected)


def test_what_can_be_taken_as_it_is_is_not_copied():
    t = torch.arange(192, dtype=torch.int8).view(24, 8)
    assert engines.as_rows(t) is t and engines.in_eights(t, 24) is t
    assert engines.as_rows(t[:, 1:3]).data_ptr() == t[:, 1:3].data_ptr()


def saturating(a, b, out=None):
    """A GEMM by vpmaddubsw: bytes by int8, each two products added up in 16 bits that saturate."""
    y = (a.double() @ b.double()).int()
    if a.dtype == torch.uint8 and a.shape[1] > 1 and a.max() > 128:  # below, no two can saturate
        a, b = (torch.nn.functional.pad(t, (0, t.shape[1] % 2)).int() for t in (a, b.t()))
        y.zero_()
        for k in range(0, a.shape[1], 2):
            pair = a[:, None, k] * b[:, k] + a[:, None, k + 1] * b[:, k + 1]
            y.add_(pair.clamp_(-(2**15), 2**15 - 1))
    return y if out is None else out.copy_(y)


@pytest.fixture
def int8_is_fastest(monkeypatch):
    """As if an int8 GEMM, whatever stands in for it, took half the time of the others.

    What stands in for it takes long at the probe's largest size, which is smaller here.
    """
    monkeypatch.setattr(proof, "LARGE", pm.ProblemSize(64, 32, 1024))
    monkeypatch.setattr(
        proof, "best_seconds", lambda products, *_: {n: 2.0 - ("int8" in n) for n in products}
    )


def test_where_pairs_saturate_the_range_decides(monkeypatch, nothing_found, int8_is_fastest):
    """Bytes up to 128 never saturate with int8 weights, bytes up to 255 do."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return saturating(*arguments, **options)

    monkeypatch.setattr(torch, "_int_mm", counted)
    names = {of: pm.engine_for(CPU, of).name for of in RANGES}
    assert names == {INT8: "int8", MAGNITUDES: "int8", BYTES: "float32"}
    x, w = constant(20, 600, 127), constant(9, 600, 127)
    for weights in (w, -w, operands(1, 9, 600)[1]):
        for method, made in ((pm.positive_matrix_product, 0), (pm.one_sided_product, 2)):
            calls.clear()
            check(method, x, weights)
            assert len(calls) == made
    monkeypatch.setattr(gemm, "engine_for", lambda *asked: ENGINES["direct"])
    assert not torch.equal(pm.positive_matrix_product(x, w).long(), pm.integer_product(x, w))


def test_where_int8_saturates_it_is_refused_and_magnitudes_serve(
    monkeypatch, nothing_found, int8_is_fastest
):
    """A processor without VNNI shifts int8 by 128 to have bytes, and corrects the sum."""

    def shifting(a, b, out=None):
        if a.dtype == torch.uint8:
            return saturating(a, b, out)
        y = saturating((a.short() + 128).to(torch.uint8), b).sub_(128 * b.sum(0, dtype=torch.int32))
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(torch, "_int_mm", shifting)
    names = {of: pm.engine_for(CPU, of).name for of in RANGES}
    assert names == {INT8: "float32", MAGNITUDES: "int8", BYTES: "float32"}
    with pytest.raises(NotAvailable, match=r"int8_product is not exact on this cpu: .* wrong for"):
        gemm.int8_product(*operands(3, 4, 5))
    assert exact.chosen_method() == "one_sided_product"
    x, w = operands(40, 20, 1100)
    for method in (exact.exact_product, pm.one_sided_product, pm.positive_matrix_product):
        check(method, x, w)
        check(method, constant(4, 600, 127), constant(5, 600, 127))
    for path in ("exact", "gemm"):
        assert torch.equal(pm.inexact_product(x, w, "exact", path).long(), pm.integer_product(x, w))


def test_a_proof_and_a_choice_are_made_once_in_the_same_circumstances(
    nothing_found, threads, monkeypatch
):
    asked, tried = [], []
    monkeypatch.setattr(
        engines, "choose", lambda *a: asked.append(a[2]) or proof.Choice("float32", {})
    )

    def counted(x, w):
        tried.append(torch.get_num_threads())
        return by_float32(x, w)

    for count in (1, 2, 1, 2):
        threads(count)
        assert proof.prove(counted, CPU).exact
        for of in RANGES:
            assert pm.engine_for(CPU, of) is ENGINES["float32"]
    assert asked == [*RANGES, *RANGES]
    assert tried == sorted(tried) and tried.count(1) == tried.count(2) > 0
    monkeypatch.setattr(engines, "choose", lambda *a: proof.Choice(None, {"int8": "it is wrong"}))
    threads(3)
    with pytest.raises(NotAvailable, match="no GEMM is exact on cpu for bytes to 255: int8: it is"):
        pm.engine_for(CPU, BYTES)


def test_of_a_slow_one_there_is_no_proof_and_a_fast_and_wrong_one_is_not_taken(
    threads, nothing_found
):
    threads(2)

    def loop(x, w):
        rows = [[(a.int() * b.int()).sum(dtype=torch.int32) for b in w] for a in x]
        return torch.stack([torch.stack(row) for row in rows])

    def wrong(x, w):
        return torch.zeros((len(x), len(w)), dtype=torch.int32)

    name, findings = proof.choose({"loop": loop, "float32": by_float32}, CPU)
    assert name == "float32" and "times slower" in findings["loop"]
    assert not any(loop in key for key in proof._proofs)
    assert torch.get_num_threads() == 2
    name, findings = proof.choose({"wrong": wrong, "float32": by_float32}, CPU)
    assert name == "float32" and "exact" in findings["float32"]
    assert "wrong for 127 x 127" in findings["wrong"]


def test_a_wrong_method_is_found_out():
    def wrong_at_large_sizes(x, w):
        return by_float32(x, w) + (x.shape[1] > 1000)

    def wrong_where_operands_differ(x, w):
        return by_float32(x, w) + bool(x.shape[1] > 1000 and x.min() < x.max())

    def wrong_at_one_corner(x, w):
        return by_float32(x, w) - 2 * bool((x == -128).all() and (w == -128).all())

    def missing(x, w):
        raise RuntimeError("not implemented for 'Char'\nand more")

    for product, words in (
        (wrong_at_large_sizes, "wrong for 127 x 127 at M=256, N=128, K=9216"),
        (wrong_where_operands_differ, "wrong for random operands at M=256, N=128, K=9216"),
        (wrong_at_one_corner, "wrong for -128 x -128"),
        (missing, "not implemented for 'Char'"),
    ):
        found = proof.prove(product, CPU)
        assert not found.exact and words in found.finding


@pytest.mark.parametrize("of", RANGES)
def test_the_probe_tries_a_range_to_its_ends(of):
    seen, (dtype, low, high) = set(), RANGES[of]

    def watch(a, w):
        assert a.dtype == dtype and w.dtype == torch.int8
        seen.add((int(a.min()), int(a.max())))
        return by_float32(a, w)

    assert proof.prove(watch, CPU, of).exact
    assert {(low, high), (high, high)} <= seen  # random ones, and a corner


def test_waiting_for_a_processor_is_no_time_of_a_call():
    waiting = {"sleep": lambda x, w: time.sleep(0.1)}
    assert proof.best_seconds(waiting, operands(1, 1, 1))["sleep"] < 0.05


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_ran_out_once_is_no_finding(failure, monkeypatch, nothing_found):
    failures = [failure]

    def product(x, w):
        if failures:
            raise failures.pop()
        return by_float32(x, w)

    with pytest.raises(RuntimeError, match="memory"):
        proof.prove(product, CPU)
    assert proof.prove(product, CPU).exact

    def full(*arguments, **options):
        raise failure

    before = pm.engine_for(CPU, MAGNITUDES).name
    engines._engines.clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_int_mm", full)
        for ask in (lambda: pm.engine_for(CPU, MAGNITUDES), exact.explain):
            with pytest.raises(RuntimeError, match="memory"):
                ask()
    assert pm.engine_for(CPU, MAGNITUDES).name == before
    assert "memory" not in exact.explain()


# --- in processes of their own -------------------------------------------------------------------


def run_fresh(function, *words: str) -> None:
    """Run what a process can do once only in a fork of one that has torch loaded and not used."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context) as process:
        process.submit(function, *words).result(timeout=200)


def check_all(sizes, ranges=((-128, 127),)):
    ways = [*filter(is_available, WAYS.values()), partial(pm.inexact_product, multiplier="exact")]
    for size, (low, high) in itertools.product(sizes, ranges):
        x, w = pm.random_operands(pm.ProblemSize(*size), low=low, high=high)
        expected = (x.double() @ w.double().T).int()
        for way in ways:
            assert torch.equal(way(x, w), expected), (way, size, low, high)


def use_less_of_the_processor(isa):
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    for count in (2, 1) if isa == "AVX512_CORE" else (1,):
        torch.set_num_threads(count)
        check_all([(256, 128, 9216), (300, 77, 1001)])
    small = itertools.product((1, 17), (1, 16), (1, 2, 31))
    check_all([(40, 30, 2000), *small], ((127, 127), (-128, -128), (-128, 127)))


def ask_for_less_precision(setting):
    torch.set_num_threads(1)
    before = proof.circumstances(CPU), proof.circumstances(torch.device("cuda", 0))
    exec(setting)
    assert before != (proof.circumstances(CPU), proof.circumstances(torch.device("cuda", 0)))
    assert proof.prove(by_float32, CPU, BYTES).exact and "exact" in exact.explain()
    check_all([(70, 50, 2100)])


@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2", "SSE41"])
def test_exact_with_less_of_the_processor(isa):
    """oneDNN reads its limit once."""
    run_fresh(use_less_of_the_processor, isa)


SETTINGS = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_whichever_setting_asks_for_less_precision(setting):
    """Some of these settings cannot be taken back."""
    run_fresh(ask_for_less_precision, setting)


def test_scratch_is_kept_for_the_next_call_unless_large_and_given_back_when_asked(monkeypatch):
    engines.release_scratch()
    check(pm.positive_matrix_product, *operands(64, 32, 500))
    kept = {key: buffer.data_ptr() for key, (buffer, _) in engines._kept.buffers.items()}
    assert ("part", torch.int8) in kept
    check(pm.positive_matrix_product, *operands(64, 32, 500))
    check(pm.positive_matrix_product, *operands(3, 2, 50))  # a part of what is there is enough
    assert {key: b.data_ptr() for key, (b, _) in engines._kept.buffers.items()} == kept
    engines.release_scratch()
    assert not engines._kept.buffers
    monkeypatch.setattr(engines, "SCRATCH_LIMIT", 1000)
    check(pm.positive_matrix_product, *operands(64, 32, 500))
    assert ("part", torch.int8) not in engines._kept.buffers


def test_scratch_of_many_shapes_keeps_few_views():
    engines.release_scratch()
    for rows in range(3 * engines.MOST_VIEWS, 0, -1):
        view = engines.scratch("test", (rows, 5), torch.int8, CPU, gap=3)
        assert view.shape == (rows, 5) and view.stride() == (8, 1)
        assert engines.scratch("test", (rows, 5), torch.int8, CPU, gap=3) is view
        assert len(engines._kept.buffers["test", torch.int8][1]) <= engines.MOST_VIEWS
