"""The GEMM forms, the proof of their exactness, and the choice between them."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posmat import exact, gemm, proof
from posmat.exact import LAYER_METHODS, PositiveLinear, exact_product, explain
from posmat.gemm import (
    ENGINES,
    as_rows,
    float32_product,
    fused_elementwise_product,
    int8_product,
    one_sided_product,
    pad,
    padded_gemm,
    positive_matrix_product,
    prepare_float32,
    prepare_positive,
)
from posmat.problem import NotAvailable, ProblemSize, random_operands
from posmat.products import accumulator_dtype, integer_product, linear_product
from posmat.signmag import to_sign_magnitude

CPU = torch.device("cpu")
INT8_IS_EXACT = proof.prove(gemm.plain_int8, CPU).exact
needs_int8 = pytest.mark.skipif(
    not INT8_IS_EXACT, reason="int8 x int8 is not exact on this processor"
)

METHODS = [float32_product, one_sided_product, positive_matrix_product, exact_product]
if INT8_IS_EXACT:
    METHODS.append(int8_product)
RAW = [gemm.blocked_float32, gemm.one_sided, gemm.positive]
if INT8_IS_EXACT:
    RAW.append(gemm.plain_int8)


def operands(M, N, K, low=-128, seed=0):
    """Random int8 operands; unlike `random_operands` it knows sizes of 0."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(low, 128, (rows, K), dtype=torch.int8, generator=generator) for rows in (M, N)
    )


def check(method, x, w):
    """`method` gives, number for number and in the right dtype, what the reference gives."""
    y = method(x, w)
    assert y.dtype == accumulator_dtype(x.shape[1])
    assert y.shape == (x.shape[0], w.shape[0])
    assert torch.equal(y.long(), integer_product(x, w))


@pytest.fixture
def threads():
    """Set the number of threads in a test, and have the old one back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- exact for every operand ---------------------------------------------------------------------


def lay_out(t, layout):
    """The same numbers in another place of memory."""
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "columns of a wider matrix":
        wider = torch.full((rows, columns + 3), 77, dtype=torch.int8)
        wider[:, 1 : 1 + columns] = t
        return wider[:, 1 : 1 + columns]
    if layout == "every other column":
        wider = torch.full((rows, 2 * columns), 77, dtype=torch.int8)
        wider[:, ::2] = t
        return wider[:, ::2]
    if layout == "every other row":
        longer = torch.full((2 * rows, columns), 77, dtype=torch.int8)
        longer[::2] = t
        return longer[::2]
    return t


LAYOUTS = [
    "plain",
    "transposed",
    "columns of a wider matrix",
    "every other column",
    "every other row",
]


@st.composite
def problems(draw):
    M, N = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    K = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 64, 65, 130]))
    pair = []
    for rows, t in zip((M, N), operands(M, N, K, seed=draw(st.integers(0, 2**16))), strict=True):
        kind = draw(st.sampled_from(["random", "one value", "corners", "one row", "one column"]))
        if kind == "one value":
            t.fill_(draw(st.sampled_from([-128, -127, -1, 0, 1, 127])))
        elif kind == "corners":
            t.copy_(torch.tensor([-128, -127, 0, 127], dtype=torch.int8)[t.long() % 4])
        if kind == "one row" and rows:
            pair.append(t[:1].expand(rows, K))  # stride 0 along the rows
        elif kind == "one column" and K:
            pair.append(t[:, :1].expand(rows, K))  # stride 0 along the columns
        else:
            pair.append(lay_out(t, draw(st.sampled_from(LAYOUTS))))
    return pair


@settings(max_examples=300, deadline=None)
@given(problems())
def test_every_method_is_exact(problem):
    for method in METHODS:
        check(method, *problem)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inner_dimension_of_one_in_every_layout(method, layout):
    for M, N in ((1, 1), (1, 9), (9, 1), (33, 17)):
        x, w = operands(M, N, 1)
        # Whatever a fresh result would find in its memory must not be taken for the result.
        torch.full((M, N), 123_456_789, dtype=torch.int32)
        check(method, lay_out(x, layout), lay_out(w, layout))


@pytest.mark.parametrize("method", METHODS)
def test_stride_zero(method):
    x, w = operands(40, 24, 300)
    check(method, x[:1].expand(40, 300), w)
    check(method, x, w[:, :1].expand(24, 300))
    one = torch.tensor([[-128]], dtype=torch.int8)
    check(method, one.expand(40, 300), one.expand(24, 300))
    check(method, one.expand(1, 1), one.expand(24, 1))


@pytest.mark.parametrize("method", METHODS)
def test_all_pairs_of_int8(method):
    values = torch.arange(-128, 128, dtype=torch.int8)
    zeros = torch.zeros(256, 2, dtype=torch.int8)
    check(method, values[:, None], values[:, None])  # K = 1
    padded = torch.cat([zeros[:, :1], values[:, None], zeros[:, :1]], 1)
    check(method, padded, padded)  # K = 3: the GEMM


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_seeds_size_with_one_thread_and_two(method, count, threads):
    threads(count)
    check(method, *random_operands(ProblemSize(256, 128, 9216), low=-128))


@pytest.mark.parametrize("method", METHODS)
def test_int32_from_both_sides(method):
    """131,071 products of -128 · -128 are the most that int32 holds; one more is 2**31."""
    for K in (131_071, 131_072):
        for a, b in ((-128, -128), (127, -128), (-128, 127), (127, 127)):
            check(
                method,
                torch.full((2, K), a, dtype=torch.int8),
                torch.full((3, K), b, dtype=torch.int8),
            )
    check(method, *operands(3, 2, 200_001))


def test_the_float32_block_from_both_sides():
    """1,024 products reach 2**24; with one more, float32 loses the last bit and the blocks keep it.

    Only from there on does the plain float32 layer go wrong, so the test knows its limit is right.
    """
    x = torch.full((1, 1025), -128, dtype=torch.int8)
    w = x.clone()
    x[0, -1], w[0, -1] = 1, 1
    assert linear_product(x[:, :1024], w[:, :1024]).item() == 2**24
    assert linear_product(x, w).item() != 2**24 + 1
    check(float32_product, x[:, :1024], w[:, :1024])
    check(float32_product, x, w)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_is_exact_whatever_precision_is_asked_of_matrix_products(precision):
    """bfloat16 and TF32 hold every int8 number, so the inputs may be rounded to them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(float32_product, *operands(70, 50, 3000))
        check(float32_product, *(torch.full((40, 2048), -128, dtype=torch.int8),) * 2)
    finally:
        torch.set_float32_matmul_precision(before)


PRECISIONS = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]


@pytest.mark.parametrize("setter", PRECISIONS)
def test_exact_whichever_setting_asks_for_less_precision(setter):
    """In a process of its own: some of these settings cannot be taken back."""
    code = f"""
        import torch
        from posmat.exact import exact_product, explain
        from posmat.gemm import blocked_float32, positive_matrix_product
        from posmat.proof import circumstances, prove

        cpu = torch.device("cpu")
        before = circumstances(cpu), circumstances(torch.device("cuda", 0))
        {setter}
        assert before != (circumstances(cpu), circumstances(torch.device("cuda", 0)))
        x, w = (torch.randint(-128, 128, (n, 2100), dtype=torch.int8) for n in (70, 50))
        for method in (exact_product, positive_matrix_product, blocked_float32):
            assert torch.equal(method(x, w).long(), x.long() @ w.long().T)
        assert prove(blocked_float32, cpu).exact and "exact" in explain()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_under_autocast(dtype, monkeypatch):
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(exact, "_choices", {})
    x, w = operands(33, 20, 1500)
    with torch.autocast("cpu", dtype=dtype):
        check(exact_product, x, w)
        check(float32_product, x, w)
        a, b = x[:, :1024].contiguous(), w[:, :1024].t()
        assert torch.equal(gemm.float32_gemm(a, b).long(), a.long() @ b.long())
        monkeypatch.setattr(gemm, "engine_for", lambda device: ENGINES["float32"])
        check(one_sided_product, x, w)
        check(positive_matrix_product, x, w)


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("columns", [1, 7, 8])
def test_blocks_of_rows_and_columns(raw, columns, monkeypatch, threads):
    """Blocks that do not divide the sizes, and a last one of a single column."""
    threads(1)
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 256 * columns)
    monkeypatch.setattr(gemm, "FLOAT32_MAX_IN_FEATURES", columns)
    assert gemm._block_sizes(1300, 5, 50, CPU, 10**6) == (256, columns)
    check(raw, *operands(1300, 5, 50))
    x, w = operands(300, 3, 57)
    check(raw, x.t().contiguous().t(), w.t().contiguous().t())


@pytest.mark.parametrize(
    ("method", "prepare"),
    [(positive_matrix_product, prepare_positive), (float32_product, prepare_float32)],
)
@pytest.mark.parametrize("low", [-127, -128])
def test_weights_prepared_before(method, prepare, low):
    x, w = operands(33, 20, 2100, low=low)
    for layout in LAYOUTS:
        prepared = prepare(lay_out(w, layout))
        assert torch.equal(method(x, prepared).long(), integer_product(x, w))


def test_the_parts_of_the_weights_are_non_negative_and_make_them_up():
    w = torch.arange(-128, 128, dtype=torch.int8).reshape(16, 16)
    parts = prepare_positive(w)
    assert all(part.dtype == torch.int8 and bool((part >= 0).all()) for part in parts)
    assert torch.equal(parts.positive.int() - parts.negative.int() - parts.lowest.int(), w.int())
    assert torch.equal(parts.magnitude.int() + parts.lowest.int(), w.int().abs())
    assert prepare_positive(w.clamp(min=-127)).lowest is None


@pytest.mark.parametrize("raw", [gemm.one_sided, gemm.positive])
def test_the_left_operand_of_every_gemm_is_unsigned(raw, monkeypatch):
    """And in the two-sided form the right one has no negative number either."""
    seen = []

    def watch(a, b, out=None):
        seen.append((a.dtype, int(a.max()), int(b.min())))
        return gemm.direct_gemm(a, b, out)

    monkeypatch.setattr(gemm, "engine_for", lambda device: ENGINES["direct"]._replace(gemm=watch))
    x, w = operands(64, 64, 256)
    check(raw, x, w)
    assert {dtype for dtype, _, _ in seen} == {torch.uint8}
    if raw is gemm.positive:
        assert min(lowest for _, _, lowest in seen) == 0
    else:
        assert max(largest for _, largest, _ in seen) == 128


@pytest.mark.parametrize("method", [*METHODS, fused_elementwise_product])
def test_operands_that_do_not_fit_are_refused(method):
    x, w = operands(4, 3, 8)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        method(x.float(), w.float())
    with pytest.raises(ValueError, match="in_features"):
        method(x, w[:, :5])
    with pytest.raises(ValueError, match="matrices"):
        method(x[0], w)


def test_prepared_weights_that_do_not_fit_are_refused():
    x, w = operands(4, 3, 8)
    for method, prepared in (
        (positive_matrix_product, prepare_positive(w[:, :5])),
        (float32_product, prepare_float32(w[:, :5])),
    ):
        with pytest.raises(ValueError, match="in_features"):
            method(x, prepared)


@pytest.mark.parametrize("prepare", [prepare_positive, prepare_float32])
def test_only_matrices_of_int8_are_prepared(prepare):
    w = operands(1, 3, 8)[1]
    for other in (w.float(), w.view(torch.uint8), w.int()):
        with pytest.raises(TypeError, match=r"the weights must be torch\.int8"):
            prepare(other)
    with pytest.raises(ValueError, match="must be a matrix"):
        prepare(w[0])


def test_weights_prepared_for_another_method_are_refused():
    x, w = operands(4, 3, 8)
    own = {
        float32_product: prepare_float32(w),
        positive_matrix_product: prepare_positive(w),
        fused_elementwise_product: to_sign_magnitude(w),
        one_sided_product: None,
        int8_product: None,
        exact_product: None,
    }
    for method, prepared in own.items():
        for foreign in (*own.values(), w.numpy()):
            if foreign is not None and foreign is not prepared:
                with pytest.raises(TypeError, match=f"w is a .*: {method.__name__} takes an int8"):
                    method(x, foreign)


# --- what other devices need, tried on this one --------------------------------------------------


@pytest.fixture
def strict_int8_gemm(monkeypatch):
    """PyTorch's int8 GEMM with the refusals that it has on CUDA."""
    real = torch._int_mm

    def strict(a, b):
        assert a.dtype == b.dtype == torch.int8
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        for rows in (a, b.t()):
            assert rows.stride(1) == 1 and rows.stride(0) % 8 == 0
            assert rows.data_ptr() % 16 == 0
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)


@needs_int8
@pytest.mark.parametrize("raw", RAW)
def test_padding_and_splitting_for_cuda(raw, strict_int8_gemm, monkeypatch):
    monkeypatch.setattr(gemm, "engine_for", lambda device: ENGINES["padded"])
    for M in (1, 16, 17, 40):
        for N in (1, 8, 9):
            for K in (1, 7, 8, 70):
                check(raw, *operands(M, N, K))
    check(raw, *(torch.full((20, 64), -128, dtype=torch.int8),) * 2)
    check(raw, *operands(0, 3, 8))
    x, w = operands(20, 9, 66)
    check(raw, x.t().contiguous().t(), w[:1].expand(9, 66))
    check(raw, *operands(2, 3, 131_073))
    for x, w in unaligned():
        check(raw, x, w)


def unaligned():
    """Operands whose rows begin where CUDA's int8 GEMM cannot load from."""
    wider_x, wider_w = operands(24, 16, 67)
    yield wider_x[:, 1:65], wider_w[:, 1:65]
    yield operands(24, 8, 65_537)  # its last block begins anywhere
    x, w = operands(24, 16, 64)
    longer = torch.empty(24 * 64 + 3, dtype=torch.int8)
    yield longer[3:].view(24, 64).copy_(x), w


@needs_int8
def test_a_padded_gemm_takes_every_byte(strict_int8_gemm):
    """The split into seven bits and one is right for all 256 values, not for magnitudes only."""
    a = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 9).contiguous()
    b = operands(1, 5, 9)[1].t()
    assert torch.equal(padded_gemm(a, b), a.int() @ b.int())


def test_pad():
    t = torch.ones((3, 5), dtype=torch.int8)
    assert pad(t, 8).shape == (8, 8) and int(pad(t, 8).sum()) == 15
    assert pad(t, 8, at_least=24).shape == (24, 8)
    whole = torch.ones((24, 8), dtype=torch.int8)
    assert pad(whole, 8, at_least=24) is whole


def test_as_rows_copies_only_what_it_must():
    t = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    assert as_rows(t) is t
    assert as_rows(t[:, 1:3]).data_ptr() == t[:, 1:3].data_ptr()
    assert as_rows(t[:1].expand(3, 4)).stride() == (4, 1)
    assert as_rows(t.t()).stride() == (3, 1)
    assert as_rows(t[0].expand(1, 4)).stride() == (4, 1)
    assert as_rows(t[:, :1]).stride() == (1, 1)


@pytest.mark.parametrize("raw", [gemm.one_sided, gemm.positive])
def test_a_device_without_int8_arithmetic_takes_float32(raw, monkeypatch):
    monkeypatch.setattr(gemm, "engine_for", lambda device: ENGINES["float32"])

    def missing(*arguments, **options):
        raise RuntimeError("no int8 GEMM")

    monkeypatch.setattr(torch, "_int_mm", missing)
    for K in (1, 1024, 1025, 4000):
        check(raw, *operands(33, 20, K))
        check(raw, *(torch.full((3, K), -128, dtype=torch.int8),) * 2)
    with pytest.raises(NotAvailable, match="no int8 GEMM"):
        gemm.plain_int8(*operands(3, 3, 3))
    monkeypatch.setattr(proof, "_proofs", {})
    choice = exact._choose(CPU)
    assert choice.name in ("float32_product", "one_sided_product")  # a timing's to say
    assert "no int8 GEMM" in choice.findings["int8_product"]
    check(choice.product, *operands(33, 20, 4000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda(method):
    for M, N, K in ((0, 3, 8), (1, 1, 1), (16, 7, 9), (17, 8, 64), (256, 128, 9216)):
        x, w = operands(M, N, K)
        expected = integer_product(x, w)
        try:
            assert torch.equal(method(x.cuda(), w.cuda()).cpu().long(), expected)
            y = method(x.cuda().t().contiguous().t(), w[:1].cuda().expand(N, K))
        except NotAvailable as error:
            pytest.skip(str(error))
        assert torch.equal(y.cpu().long(), integer_product(x, w[:1].expand(N, K)))
    on_cuda = torch.empty(24 * 67 + 3, dtype=torch.int8, device="cuda")
    for x, w in unaligned():
        offset = on_cuda[3 : 3 + x.numel()].view(x.shape).copy_(x) if x.numel() < 1600 else x.cuda()
        wider = torch.zeros((w.shape[0], w.shape[1] + 3), dtype=torch.int8, device="cuda")
        wider[:, 1:-2] = w
        y = method(offset, wider[:, 1:-2])
        assert torch.equal(y.cpu().long(), integer_product(x, w))
    assert "exact_product on cuda" in explain("cuda")


# --- proof and choice ----------------------------------------------------------------------------


def test_a_wrong_method_is_found_out_and_refused():
    def saturating(x, w):
        """What a processor without VNNI does: right but for large sums of two products."""
        pairs = (x.int().unsqueeze(1) * w.int()).clamp(-(2**14), 2**14 - 300)
        return pairs.sum(2, dtype=torch.int32)

    def off_by_one_at_large_sizes(x, w):
        y = gemm.blocked_float32(x, w)
        return y + 1 if x.shape[1] > 1000 else y

    def missing(x, w):
        raise RuntimeError("not implemented for 'Char'\nand more")

    for product, words in (
        (off_by_one_at_large_sizes, "wrong for 127 x 127 at M=256, N=128, K=9216"),
        (missing, "not implemented for 'Char'"),
    ):
        found = proof.prove(product, CPU)
        assert not found.exact and words in found.finding
        with pytest.raises(NotAvailable, match="exact_product"):
            proof.require_exact("it", product, CPU)
    small = ProblemSize(8, 8, 16)
    x, w = proof.probe_operands(small, CPU)
    assert not torch.equal(saturating(x.fill_(-128), w.fill_(-128)), integer_product(x, w).int())


def test_a_proof_is_made_once_for_each_number_of_threads(threads):
    calls = []

    def counted(x, w):
        calls.append(torch.get_num_threads())
        return gemm.blocked_float32(x, w)

    threads(1)
    assert proof.prove(counted, CPU).exact
    once = len(calls)
    assert proof.prove(counted, CPU).exact and len(calls) == once
    threads(2)
    assert proof.prove(counted, CPU).exact and len(calls) == 2 * once


def test_without_a_proved_method_the_choice_is_integers(monkeypatch):
    monkeypatch.setattr(
        exact, "CANDIDATES", {"off by one": lambda x, w: gemm.blocked_float32(x, w) + 1}
    )
    choice = exact._choose(CPU)
    assert choice.name == "elementwise_product"
    check(choice.product, *operands(9, 8, 7))
    assert "wrong" in choice.findings["off by one"]


@pytest.fixture
def busy_machine():
    """Twice as many processes as there are processors, each computing all the time."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    yield
    for process in busy:
        process.kill()
        process.wait()


def test_the_loop_is_not_chosen_on_a_busy_machine(busy_machine, threads, monkeypatch):
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(exact, "_choices", {})
    threads(2)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        text = explain()
    assert text.startswith("exact_product on cpu, 2 threads: float32_product\n")
    assert text.count("a loop") == 2 and torch.get_num_threads() == 2


@needs_int8
def test_a_kernel_is_not_taken_for_a_loop_on_a_busy_machine(busy_machine, threads):
    threads(2)
    for _ in range(5):
        assert not exact._why_slow(gemm.plain_int8, CPU)
        assert not exact._why_slow(gemm.one_sided, CPU)


def test_a_slow_loop_is_not_chosen(monkeypatch, threads):
    threads(2)

    def loop(x, w):
        rows = [[(a.int() * b.int()).sum(dtype=torch.int32) for b in w] for a in x]
        return torch.stack([torch.stack(row) for row in rows])

    x, w = operands(9, 8, 7)
    check(loop, x, w)
    monkeypatch.setattr(
        exact, "CANDIDATES", {"loop": loop, "float32_product": gemm.blocked_float32}
    )
    choice = exact._choose(CPU)
    assert choice.name == "float32_product" and "slower" in choice.findings["loop"]


def test_without_onednn(threads):
    """Then PyTorch's int8 GEMM is a loop, exact and very slow."""
    threads(1)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert "exact_product on cpu" in explain() and ": float32_product\n" in explain()
        for method in (exact_product, one_sided_product, positive_matrix_product, int8_product):
            check(method, *operands(20, 9, 65))
            check(method, *operands(5, 4, 1))
    check(exact_product, *operands(20, 9, 65))


@pytest.mark.parametrize("ask", [explain, exact.chosen_method])
@pytest.mark.parametrize("device", ["xpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(ask, device):
    with pytest.raises(ValueError, match=device):
        ask(device)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_ran_out_once_is_no_finding(failure, monkeypatch):
    failures = [failure]

    def product(x, w):
        if failures:
            raise failures.pop()
        return gemm.blocked_float32(x, w)

    with pytest.raises(RuntimeError, match="memory"):
        proof.prove(product, CPU)
    assert proof.prove(product, CPU).exact

    def missing(a, b):
        raise failure

    gemm._has_int8_gemm.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_int_mm", missing)
        with pytest.raises(RuntimeError, match="memory"):
            gemm._has_int8_gemm(CPU)
    assert gemm._has_int8_gemm(CPU)
    gemm._has_int8_gemm.cache_clear()


def test_explain_names_the_choice_and_every_candidate():
    text = explain("cpu")
    assert text.startswith("exact_product on cpu")
    assert all(f"  {name}: " in text for name in exact.CANDIDATES)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        proof._proofs.clear()
        exact._choices.clear()
        x, w = (t.to("cpu") for t in _on_cpu(20, 8, 30))
        y = exact_product(x, w)
    assert torch.equal(y.long(), integer_product(x, w))


def _on_cpu(M, N, K):
    with torch.device("cpu"):
        return operands(M, N, K)


CAPPED = """
    import torch

    from posmat.exact import PositiveLinear, exact_product, explain
    from posmat.gemm import (
        float32_product, fused_elementwise_product, int8_product, one_sided_product,
        positive_matrix_product,
    )
    from posmat.problem import NotAvailable, ProblemSize, random_operands
    from posmat.products import integer_product

    SIZES = [(256, 128, 9216), (300, 77, 1001)] + [
        (m, n, k) for m in (1, 2, 17) for n in (1, 5, 16) for k in (1, 2, 4, 31, 64, 300)
    ]

    def check():
        chosen = explain().splitlines()[0].rsplit(" ", 1)[1]
        for size in SIZES:
            size = ProblemSize(*size)
            for low, high in ((127, 127), (-128, -128), (-128, 127)):
                x, w = random_operands(size, low=low, high=high)
                expected = (x.double() @ w.double().T).int()
                layer = PositiveLinear(w)
                for method in (
                    exact_product, float32_product, one_sided_product, positive_matrix_product,
                    lambda x, w: layer(x),
                ):
                    assert torch.equal(method(x, w), expected), (method, size, low, high)
                try:
                    assert torch.equal(int8_product(x, w), expected), (size, low, high)
                except NotAvailable as error:
                    assert "wrong" in str(error)
                    assert chosen != "int8_product"
        return chosen

    for threads in (2, 1):
        torch.set_num_threads(threads)
        chosen = check()
    SIZES = SIZES[2:]
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert check() == "float32_product"
    try:
        fused_elementwise_product(*random_operands(ProblemSize(2, 2, 2)))
    except NotAvailable as error:
        assert "Install a C++ compiler" in str(error), error
    else:
        raise AssertionError("compiled without a compiler")
    print(chosen)
"""


@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2", "SSE41"])
def test_exact_with_less_of_the_processor(isa, tmp_path):
    """A process of its own, because oneDNN reads its limit once; it has no C++ compiler either."""
    environment = os.environ | {
        "ONEDNN_MAX_CPU_ISA": isa,
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CAPPED)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


# --- scratch memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_result_is_not_overwritten_by_the_next_call(method):
    problems = [operands(64, 32, 500, seed=seed) for seed in range(3)]
    results = [method(*problem) for problem in problems]
    for result, problem in zip(results, problems, strict=True):
        assert torch.equal(result.long(), integer_product(*problem))


@pytest.mark.parametrize("method", METHODS)
def test_many_threads_at_once(method):
    failures = []

    def work(seed):
        x, w = operands(40 + seed, 16, 700, seed=seed)
        expected = integer_product(x, w)
        for _ in range(20):
            if not torch.equal(method(x, w).long(), expected):
                failures.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("method", METHODS)
def test_scratch_made_in_inference_mode_serves_outside_of_it(method):
    gemm._scratch.kept.clear()
    x, w = operands(64, 32, 500)
    with torch.inference_mode():
        check(method, x, w)
    check(method, x, w)


def test_large_scratch_is_not_kept(monkeypatch):
    monkeypatch.setattr(gemm, "SCRATCH_LIMIT", 1000)
    gemm._scratch.kept.clear()
    check(positive_matrix_product, *operands(64, 32, 500))
    assert not gemm._scratch.kept


def test_scratch_is_given_back_when_asked():
    check(positive_matrix_product, *operands(64, 32, 500))
    assert gemm._scratch.kept
    gemm.release_scratch()
    assert not gemm._scratch.kept
    check(positive_matrix_product, *operands(64, 32, 500))


# --- the layer -----------------------------------------------------------------------------------

LAYERS = [name for name in LAYER_METHODS if name != "int8" or INT8_IS_EXACT] + ["exact"]
GEMM_LAYERS = [name for name in LAYERS if name != "fused_elementwise"]


@pytest.mark.parametrize("method", GEMM_LAYERS)
def test_a_layer_is_exact_and_saves_its_weight_only(method):
    x, w = operands(5, 7, 33)
    layer = PositiveLinear(w.t().contiguous().t(), method)
    assert torch.equal(layer(x).long(), integer_product(x, w))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.state_dict()["weight"].dtype == torch.int8
    assert method in repr(layer) and "in_features=33" in repr(layer)
    assert layer(x.reshape(5, 1, 33)).shape == (5, 1, 7)
    assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("saved", GEMM_LAYERS)
def test_saved_under_one_method_and_loaded_under_every_other(saved):
    x, w = operands(5, 7, 33)
    file = io.BytesIO()
    torch.save(PositiveLinear(w, saved).state_dict(), file)
    for loaded in GEMM_LAYERS:
        for assign in (False, True):
            file.seek(0)
            layer = PositiveLinear(torch.zeros_like(w), loaded)
            assert not layer(x).any()
            layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
            assert torch.equal(layer(x).long(), integer_product(x, w))


@pytest.mark.parametrize("method", GEMM_LAYERS)
def test_a_layer_follows_its_weight(method):
    x, w = operands(5, 7, 33)
    layer = PositiveLinear(w, method)
    w[0, 0] += 1  # the caller's own: the layer has a copy
    layer.weight.neg_()
    assert torch.equal(layer(x).long(), integer_product(x, layer.weight))
    layer.weight = layer.weight.clamp(-3, 3)
    assert torch.equal(layer(x).long(), integer_product(x, layer.weight))
    for other in (layer.half(), layer.to("cpu"), copy.deepcopy(layer)):
        assert torch.equal(other(x).long(), integer_product(x, layer.weight))
    assert layer._prepared is not None and layer.__getstate__()["_prepared"] is None
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    with torch.inference_mode():
        made = PositiveLinear(w, method)
        assert torch.equal(made(x).long(), integer_product(x, w))
    made.weight.zero_()
    assert not made(x).any()
    with torch.inference_mode():
        made.weight = w.clone()  # a tensor that does not count its changes
        assert torch.equal(made(x).long(), integer_product(x, w))
        made.weight.zero_()
        assert not made(x).any()


@pytest.mark.parametrize("method", GEMM_LAYERS)
def test_a_layer_follows_a_weight_that_was_replaced_behind_its_back(method):
    x, w = operands(5, 7, 33)
    layer = PositiveLinear(w, method)

    def follows():
        return torch.equal(
            layer(x[:, : layer.weight.shape[1]]).long(),
            integer_product(x[:, : layer.weight.shape[1]], layer.weight),
        )

    layer.weight.data = w.clamp(-5, 5)
    assert follows()
    for seed in range(5):  # the memory of an old weight must not serve for a new one
        layer.weight.data = operands(5, 7, 33, seed=seed)[1]
        layer.weight.data = operands(5, 7, 33, seed=seed + 9)[1]
        assert follows()
    torch.utils.swap_tensors(layer.weight, w.clamp(-9, 9))
    assert follows()
    layer.weight.data = layer.weight.data[:, :20]
    assert follows()
    layer.weight.data.copy_(-layer.weight)
    layer.refresh()
    assert follows()
    layer.weight.numpy()[:] = 3
    layer.refresh()
    assert follows()


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_refuses_a_weight_that_is_no_longer_int8(method):
    x, w = operands(5, 7, 33)
    layer = PositiveLinear(w, method).type(torch.uint8)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        layer(x)
    layer = PositiveLinear(w, method)
    layer.weight = w.float() * 0.5
    with pytest.raises(TypeError, match=r"torch\.int8"):
        layer(x)


@pytest.mark.parametrize("method", GEMM_LAYERS)
def test_a_layer_of_any_number_of_dimensions_and_none_of_inputs(method):
    layer = PositiveLinear(operands(1, 7, 0)[1], method)
    y = layer(torch.zeros(2, 3, 0, dtype=torch.int8))
    assert y.shape == (2, 3, 7) and not y.any()
    assert PositiveLinear(operands(1, 7, 4)[1], method)(y.to(torch.int8)[:0, :, :4]).shape[0] == 0
    with pytest.raises(ValueError, match="no dimension"):
        layer(torch.tensor(3, dtype=torch.int8))


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_without_data_waits_for_them(method):
    x, w = operands(5, 7, 33)
    layer = PositiveLinear(torch.empty_like(w, device="meta"), method)
    with pytest.raises(RuntimeError, match="the weight has no data"):
        layer(x)
    if method != "fused_elementwise":
        layer.load_state_dict({"weight": w}, assign=True)
        assert torch.equal(layer(x).long(), integer_product(x, w))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", GEMM_LAYERS)
def test_a_layer_moves(method):
    x, w = operands(20, 7, 33)
    try:
        y = PositiveLinear(w, method).to("cuda")(x.cuda())
    except NotAvailable as error:
        pytest.skip(str(error))
    assert torch.equal(y.cpu().long(), integer_product(x, w))


def test_a_layer_refuses_what_is_not_its_own():
    w = operands(1, 3, 5)[1]
    with pytest.raises(ValueError, match="'positve'"):
        PositiveLinear(w, "positve")
    with pytest.raises(TypeError, match=r"torch\.int8"):
        PositiveLinear(w.float())
    with pytest.raises(ValueError, match="matrix"):
        PositiveLinear(w[0])
    with pytest.raises(RuntimeError, match=r"loads torch\.int8 only"):
        PositiveLinear(w).load_state_dict({"weight": w.float()})


# --- the seed's pipeline, compiled ---------------------------------------------------------------


def test_the_compiled_pipeline():
    problems = [operands(*sizes) for sizes in ((3, 5, 70), (1, 9, 1), (8, 8, 8), (0, 3, 4))]
    problems.append(operands(64, 32, 2000))
    problems.append((torch.full((2, 1025), -128, dtype=torch.int8),) * 2)
    try:
        for problem in problems:
            check(fused_elementwise_product, *problem)
    except NotAvailable as error:
        pytest.skip(str(error))
    x, w = problems[0]
    assert torch.equal(PositiveLinear(w, "fused_elementwise")(x).long(), integer_product(x, w))


def test_one_program_for_all_sizes_and_one_more_for_each_number_of_threads(threads):
    """PyTorch gives up after eight programs; sizes, equal or not, must not take any."""
    import torch._dynamo.utils as dynamo

    def programs():
        return dynamo.counters["stats"]["unique_graphs"]

    try:
        check(fused_elementwise_product, *operands(3, 5, 70))
    except NotAvailable as error:
        pytest.skip(str(error))
    before = programs()
    for sizes in ((8, 8, 8), (8, 8, 70), (8, 70, 8), (70, 8, 8), (1, 1, 1), (2, 1, 2)):
        check(fused_elementwise_product, *operands(*sizes))
    assert programs() == before
    for count in range(1, 11):
        threads(count)
        check(fused_elementwise_product, *operands(3, 5, 70))
    assert programs() > 8


def test_what_stops_the_compiled_pipeline_is_told_apart(monkeypatch):
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def raising(error):
        def program(*arguments):
            raise error

        monkeypatch.setattr(gemm, "_compiled", lambda: program)

    x, w = operands(3, 5, 70)
    raising(FailOnRecompileLimitHit("too many"))
    with pytest.raises(NotAvailable, match="gave up"):
        fused_elementwise_product(x, w)
    raising(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="allocate") as caught:
        fused_elementwise_product(x, w)
    assert not isinstance(caught.value, NotAvailable)
    raising(RuntimeError("no compiler"))
    with pytest.raises(NotAvailable, match="Install a C"):
        fused_elementwise_product(x, w)
