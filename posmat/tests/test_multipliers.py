"""Multipliers against their hardware definition, bit by bit, and the proofs of their factors."""

import subprocess
import sys

import numpy as np
import pytest

from posmat.multipliers import factors
from posmat.multipliers.factors import CertificateError, Factorization, factorize, modular_rank
from posmat.multipliers.gemms import CODES, Gemm
from posmat.multipliers.table import Multiplier, find_multiplier, multiplier_names


def by_rows(weight: int, data: int, group: int, merge) -> int:
    """A multiplier that merges its rows in groups, in plain Python."""
    total = 0
    for start in range(0, 8, group):
        merged = 0
        for i in range(start, start + group):
            merged = merge(merged, data << i if weight >> i & 1 else 0)
        total += merged
    return total


def kulkarni(weight: int, data: int, bits: int = 8) -> int:
    """Kulkarni's multiplier by halves, down to blocks of 2 x 2 bits."""
    if bits == 2:
        return 7 if weight == data == 3 else weight * data
    half = bits // 2
    low = (1 << half) - 1
    a, b, c, d = weight >> half, weight & low, data >> half, data & low
    cross = kulkarni(a, d, half) + kulkarni(b, c, half)
    return (kulkarni(a, c, half) << bits) + (cross << half) + kulkarni(b, d, half)


DEFINITIONS = {
    "exact": lambda w, x: w * x,
    "or_pairs": lambda w, x: by_rows(w, x, 2, int.__or__),
    "xor_pairs": lambda w, x: by_rows(w, x, 2, int.__xor__),
    "or_fours": lambda w, x: by_rows(w, x, 4, int.__or__),
    "kulkarni": kulkarni,
    "truncated": lambda w, x: (w // 4 * 4) * (x // 4 * 4),
}


def gemm_table(gemm: Gemm) -> np.ndarray:
    """What the int8 GEMMs multiply a weight and an input to, by their bytes."""
    sign, magnitude = np.sign(CODES), np.abs(CODES)
    table = np.zeros((256, 256), dtype=np.int64)
    if gemm.linear is not None:
        table += np.outer(gemm.linear.astype(int), CODES)
    for weights, term, xor in gemm.bit_terms:
        value = CODES ^ term.values(magnitude) if xor else sign * term.values(magnitude)
        assert value.min() >= -128 and value.max() <= 127
        table += np.outer(weights.astype(int), value)
    for scale, (weights, inputs) in gemm.columns.items():
        assert weights.dtype == inputs.dtype == np.int8
        table += scale * (weights.astype(int) @ inputs.astype(int).T)
    return table


def admitted(multiplier: Multiplier):
    return np.ix_(*((CODES > -128) | admits for admits in multiplier.admits))


def low_rank(rank: int, size: int = 128, seed: int = 0, spread: int = 12) -> np.ndarray:
    """A table whose error has that rank, zero where the convention asks, not symmetric."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-spread, spread + 1, (size, rank))
    b = rng.integers(-spread, spread + 1, (rank, size))
    a[0], b[:, 0] = 0, 0
    return np.outer(np.arange(size), np.arange(size)) + a @ b


def test_every_shipped_multiplier_is_its_definition_for_all_65536_pairs():
    assert set(multiplier_names()) == set(DEFINITIONS)
    for name, definition in DEFINITIONS.items():
        expected = [[definition(w, x) for x in range(256)] for w in range(256)]
        assert find_multiplier(name).table.tolist() == expected, name


RANKS = dict(zip(DEFINITIONS, (0, 1, 1, 7, 1, 2), strict=True))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_shipped_factors_and_gemms_are_the_table(name):
    multiplier = find_multiplier(name)
    multiplier.factorization.verify(multiplier.error[:129, :129])
    assert multiplier.rank == RANKS[name]
    assert multiplier.gemm.count == (1 if name == "truncated" else 1 + RANKS[name])
    assert np.array_equal(gemm_table(multiplier.gemm), multiplier.operand_table)
    magnitudes, signs = np.abs(CODES), np.sign(CODES)
    expected = np.outer(signs, signs) * multiplier.table[np.ix_(magnitudes, magnitudes)]
    assert np.array_equal(multiplier.operand_table, expected)


def test_the_shipped_need_no_lattice_reduction():
    """In a process of its own, in which python-flint cannot be imported."""
    code = (
        "import sys; sys.modules['flint'] = None\n"
        "from posmat.multipliers.table import find_multiplier, multiplier_names\n"
        "for name in multiplier_names():\n"
        "    found = find_multiplier(name); found.rank, found.gemm, found.exact_when()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_exact_when():
    def kinds(name):
        return find_multiplier(name).exact_when()

    everywhere = dict.fromkeys(("weight", "input", "either", "both"), True)
    nowhere = dict.fromkeys(everywhere, False)
    for name in ("exact", "or_pairs", "xor_pairs", "kulkarni"):
        assert kinds(name) == {"Fibonacci code": everywhere, "power of two": everywhere}
    assert kinds("or_fours") == {"Fibonacci code": nowhere, "power of two": everywhere}
    assert kinds("truncated") == {"Fibonacci code": nowhere, "power of two": nowhere}
    # Exact by one operand only, and by both together only.
    fib = np.array(["11" not in f"{v:b}" for v in range(129)])
    by_weight = Multiplier.from_function(lambda w, x: w * x + (~fib[w]) * (x > 0))
    assert by_weight.exact_when()["Fibonacci code"] == nowhere | {"weight": True, "both": True}
    by_both = Multiplier.from_function(lambda w, x: w * x + (~fib[w] | ~fib[x]) * (x > 0) * (w > 0))
    assert by_both.exact_when()["Fibonacci code"] == nowhere | {"both": True}


def test_exact_weights_are_those_without_an_aligned_pair_of_ones():
    expected = [abs(v) & abs(v) >> 1 & 0x55 == 0 for v in CODES.tolist()]
    assert find_multiplier("or_pairs").exact_weights.tolist() == expected
    # A weight of -128 is not known to be exact where the table does not hold it.
    true = np.outer(np.arange(129), np.arange(129))
    for table, count in ((true[:128, :128], 255), (true[:128], 255), (true[:, :128], 256)):
        found = Multiplier.from_table(table, convention="sign-magnitude")
        assert found.exact_weights.sum() == count


def test_statistics_are_those_of_a_loop_over_pairs():
    multiplier = find_multiplier("or_fours")
    weights, inputs = [0, 3, 7, 127, 255], [0, 1, 6, 99]
    definition = DEFINITIONS["or_fours"]
    errors = [definition(w, x) - w * x for w in weights for x in inputs]
    relative = [abs(definition(w, x) - w * x) / (w * x) for w in weights for x in inputs if w * x]
    sizes = [abs(error) for error in errors]
    found = multiplier.statistics(weights, inputs)
    wrong, bias = sum(size > 0 for size in sizes) / 20, sum(errors) / 20
    means = (sum(sizes) / 20, max(sizes), bias, sum(relative) / len(relative))
    assert found == pytest.approx((20, wrong, *means)) and found.bias < 0
    whole = multiplier.statistics()
    assert whole.pairs == 65536 and whole.max == int(np.abs(multiplier.error).max())
    table = np.random.default_rng(5).integers(-100, 100, (256, 256))
    signed = Multiplier.from_table(table, convention="signed")
    assert signed.statistics([-128], [127]).bias == table[0, 255] - (-128 * 127)
    with pytest.raises(ValueError, match="weight 256 is not in the table"):
        multiplier.statistics([256])
    with pytest.raises(ValueError, match="no operand pairs"):
        multiplier.statistics([])


def ranked_tables():
    """(table, convention, rank of its error): by chance, of 32 bits, signed, and truncated."""
    for rank in (0, 1, 2, 7, 31, 63):
        yield low_rank(rank), "sign-magnitude", rank
    rng = np.random.default_rng(2)
    full = rng.integers(-(2**31), 2**31, (128, 128))
    full[0], full[:, 0] = 0, 0
    yield full, "sign-magnitude", 127
    error = rng.integers(-9, 9, (256, 3)) @ rng.integers(-999, 999, (3, 256))
    yield np.outer(range(-128, 128), range(-128, 128)) + error, "signed", 3
    yield np.outer(np.arange(128) & ~3, np.arange(128) & ~3), "sign-magnitude", 2


@pytest.mark.parametrize(("table", "convention", "rank"), [*ranked_tables()])
def test_tables_have_their_rank_and_a_proved_factorization(table, convention, rank):
    found = Multiplier.from_table(table, convention=convention)
    assert found.rank == found.rank_bound == rank
    found.factorization.verify(found.error)
    cells = admitted(found)
    assert np.array_equal(gemm_table(found.gemm)[cells], found.operand_table[cells])


def test_the_cheaper_of_error_and_product_is_factorized_and_a_high_rank_too():
    *_, (truncated, convention, rank) = ranked_tables()
    assert Multiplier.from_table(truncated, convention=convention).gemm.count == 1 < 1 + rank
    eighty = factorize(low_rank(80, 96, spread=3) - np.outer(range(96), range(96)), False)
    assert eighty.rank == 80


def test_the_certificate_fails_when_one_cell_is_changed_and_when_a_factor_is_superfluous():
    error = low_rank(6) - np.outer(range(128), range(128))
    found = factorize(error)
    found.verify(error)
    split = Factorization(
        np.concatenate([found.weight_factor, found.weight_factor[:, :1]], axis=1),
        np.concatenate([found.input_factor, 0 * found.input_factor[:1]]),
    )
    with pytest.raises(CertificateError, match="7 factors"):
        split.verify(error)
    for i, j in ((0, 0), (5, 100), (127, 127)):
        changed = error.copy()
        changed[i, j] += 1
        with pytest.raises(CertificateError, match=rf"cell \[{i}, {j}\]"):
            found.verify(changed)


def test_rank_is_not_that_of_floats():
    # Numerically of rank 1, exactly of rank 2.
    table = np.full((3, 3), 2**31 - 1, dtype=np.int64)
    table[2, 2] -= 1
    assert modular_rank(table) == 2
    # A multiple of the first prime vanishes modulo it, and not modulo the next.
    assert modular_rank(np.eye(2, dtype=np.int64) * (2**31 - 1)) == 2


def test_digits_are_balanced_and_as_few_as_they_can_be():
    for limit, count in ((127, 1), (128, 2), (127 * 256, 2), (127 * 256 + 1, 3)):
        assert [factors.digit_count(np.array([v])) for v in (limit, -limit)] == [count, count]
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.integers(-(2**40), 2**40, 1000), np.arange(-70000, 70000)])
    parts = factors.digits(values)
    assert all(part.dtype == np.int8 and part.min() >= -127 for part in parts)
    assert np.array_equal(sum(p.astype(np.int64) * 255**i for i, p in enumerate(parts)), values)


def test_from_function_is_called_as_weight_and_input():
    multiplier = Multiplier.from_function(lambda weight, data: weight * (data & ~1), "odd")
    assert multiplier.name == "odd" and multiplier.table.shape == (129, 129)
    assert multiplier.table[3, 7] == 18 and multiplier.table[7, 3] == 14
    signed = Multiplier.from_function(lambda w, x: w - 2 * x, convention="signed")
    assert signed.table[0, 0] == -128 + 256 and signed.operand_table[1, 255] == 1 + 2


def test_from_table_reads_files(tmp_path):
    table = low_rank(3)
    np.save(tmp_path / "mine.npy", table)
    np.savetxt(tmp_path / "mine.csv", table, delimiter=",", fmt="%d")
    text = "\r\n".join(",".join(map(str, row)) for row in table)  # as a spreadsheet saves it
    (tmp_path / "mine.CSV").write_text(text, encoding="utf-8-sig")
    for path in (*tmp_path.iterdir(), str(tmp_path / "mine.npy")):
        read = Multiplier.from_table(path, convention="sign-magnitude")
        assert read.name == "mine" and np.array_equal(read.table, table)


def test_whole_numbers_of_any_dtype_are_taken_as_a_read_only_copy():
    table = np.outer(np.arange(128), np.arange(128)) & ~15  # which float16 holds
    for dtype in (np.int32, np.float16, np.float32, np.float64, np.longdouble, np.uint64):
        given = table.astype(dtype)
        found = Multiplier.from_table(given, convention="sign-magnitude").table
        given[5, 5] += 1
        assert found.dtype == np.int32 and np.array_equal(found, table)
        with pytest.raises(ValueError, match="read-only"):
            found[5, 5] = 0
    lowest = changed(1, 1, -(2**31), np.float32)
    assert Multiplier.from_table(lowest, convention="sign-magnitude").table[1, 1] == -(2**31)


def changed(row: int, column: int, value, dtype=np.int64, size: int = 128) -> np.ndarray:
    table = np.outer(np.arange(size), np.arange(size)).astype(dtype)
    table[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "convention", "error", "words"),
    [
        (np.zeros((128, 127)), "sign-magnitude", ValueError, r"shape \(128, 127\)"),
        (np.zeros((128, 128), int), "unsigned", ValueError, "256 x 256"),
        (np.zeros(128, int), "sign-magnitude", ValueError, "shape"),
        (changed(3, 7, 2.5, float), "sign-magnitude", ValueError, "2.5 for weight 3 and input 7"),
        (changed(3, 7, np.nan, float), "sign-magnitude", ValueError, "nan for weight 3"),
        (changed(9, 4, 2**31), "sign-magnitude", ValueError, "weight 9 and input 4.*32 bits"),
        (changed(9, 4, -(2**31) - 1), "sign-magnitude", ValueError, "weight 9 and input 4"),
        # The limit of 32 bits, 2**31 - 1, is 2**31 in float32, and beyond float16.
        (changed(9, 4, 2**31, np.float32), "sign-magnitude", ValueError, "input 4.*32 bits"),
        (np.full((128, 128), 0.5, np.float16), "sign-magnitude", ValueError, "0.5 for weight 0"),
        (np.ma.masked_equal(changed(3, 7, -5), -5), "sign-magnitude", ValueError, r"cell \[3, 7\]"),
        ([[0, 0], [0]], "sign-magnitude", ValueError, "rows of different lengths"),
        (changed(0, 4, 1), "sign-magnitude", ValueError, "weight 0 and input 4.*must be 0"),
        (changed(8, 0, 1, size=256), "unsigned", ValueError, "weight 8 and input 0.*must be 0"),
        (changed(8, 0, 2**40, size=256), "signed", ValueError, "weight -120 and input -128"),
        (changed(1, 1, 1, bool), "sign-magnitude", TypeError, "bool"),
        (changed(1, 1, 1), "sign-magnitud", ValueError, "did you mean 'sign-magnitude'"),
        (changed(1, 1, 1), None, ValueError, "no convention None. The conventions are sign"),
    ],
)
def test_a_bad_table_is_refused_by_its_first_cell(table, convention, error, words):
    with pytest.raises(error, match=words):
        Multiplier.from_table(table, convention=convention)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "words.csv").write_text("weight,input\n1,two\n")
    (tmp_path / "latin.csv").write_bytes(b"\xe9,1\n")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.savez(tmp_path / "archive", table=np.zeros((256, 256)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "objects.npy", np.full((256, 256), None))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name} does not hold a table of numbers"):
            Multiplier.from_table(path, convention="unsigned")
    (tmp_path / "folder.npy").mkdir()
    for path in (tmp_path / "none.csv", tmp_path / "folder.npy"):
        with pytest.raises(OSError, match=path.name):
            Multiplier.from_table(path, convention="unsigned")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Multiplier.from_function(3), TypeError, "not callable"),
        (lambda: Multiplier.from_function(lambda w, x: 0), ValueError, "product for each pair"),
        (lambda: find_multiplier("or_pair"), ValueError, "did you mean 'or_pairs'"),
        (lambda: find_multiplier("zzz"), ValueError, "The multipliers are exact, or_pairs"),
        (lambda: find_multiplier(3), TypeError, "int is not a multiplier"),
    ],
)
def test_bad_functions_and_names_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
