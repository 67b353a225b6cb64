"""Multipliers against their hardware definition, bit by bit, and the proofs of their factors."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from posmat.multipliers import factors
from posmat.multipliers.factors import CertificateError, Factorization, factorize, modular_rank
from posmat.multipliers.gemms import CODES, Gemm
from posmat.multipliers.shipped import find_multiplier, multiplier_names
from posmat.multipliers.table import Multiplier


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
    sign, magnitude = np.where(CODES < 0, -1, 1), np.abs(CODES)
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
    return np.ix_(*((low <= CODES) & (high >= CODES) for low, high in multiplier.admitted))


def low_rank(rank: int, size: int = 128, seed: int = 0, spread: int = 12) -> np.ndarray:
    """A table whose error has that rank, not symmetric."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-spread, spread + 1, (size, rank))
    b = rng.integers(-spread, spread + 1, (rank, size))
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
    magnitudes, signs = np.abs(CODES), np.where(CODES < 0, -1, 1)
    expected = np.outer(signs, signs) * multiplier.table[np.ix_(magnitudes, magnitudes)]
    assert np.array_equal(multiplier.operand_table, expected)


def test_the_shipped_need_no_lattice_reduction():
    """In a process of its own, in which python-flint cannot be imported."""
    code = (
        "import sys; sys.modules['flint'] = None\n"
        "from posmat.multipliers.shipped import find_multiplier, multiplier_names\n"
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
        found = Multiplier.from_table(table, None, "sign-magnitude", "weight, input")
        assert found.exact_weights.sum() == count


def test_statistics_are_those_of_a_loop_over_pairs():
    multiplier, definition = find_multiplier("or_fours"), DEFINITIONS["or_fours"]
    weights, inputs = {0: 1, 3: 2, 7: 10**17, 127: 1, 255: 5}, [0, 1, 6, 99, 99]
    pairs = [(w, x) for w, count in weights.items() for x in inputs for _ in range(min(count, 7))]
    weights[7] = 7
    errors = [Fraction(definition(w, x) - w * x) for w, x in pairs]
    relative = [abs(e) / (w * x) for e, (w, x) in zip(errors, pairs, strict=True) if w * x]
    count, MAE, bias = len(pairs), sum(map(abs, errors)) / len(pairs), sum(errors) / len(pairs)
    found = multiplier.statistics(weights, inputs)
    assert (found.pairs, found.WCE) == (count, max(map(abs, errors))) and type(found.WCE) is int
    assert float(Fraction(sum(e != 0 for e in errors), count)) == found.ER
    assert (found.MAE, found.bias) == (float(MAE), float(bias)) and found.bias < 0
    assert pytest.approx(float(MAE / 255**2)) == found.NMED
    assert pytest.approx(float(sum(relative) / len(relative)), rel=1e-15) == found.MRED
    assert found.variance == float(sum(e * e for e in errors) / count - bias**2)
    # Counts beyond what a float holds: a bias of one in 10**17 is not lost.
    assert multiplier.statistics({0: 10**17 - 1, 255: 1}, [255]).bias < 0
    whole = multiplier.statistics()
    assert whole.pairs == 65536 and int(np.abs(multiplier.error).max()) == whole.WCE
    table = np.random.default_rng(5).integers(-100, 100, (256, 256))
    signed = Multiplier.from_table(table, None, "signed", "weight, input")
    assert signed.statistics([-128], [127]).bias == table[0, 255] - (-128 * 127)
    assert pytest.approx(signed.statistics().MAE / 128**2) == signed.statistics().NMED
    assert multiplier.statistics([0], [3])[1:] == (0,) * 7
    for weights, words in (
        ([256], "weight 256"),
        ({3: -1}, "weight 3, -1 times"),
        ([], "no operan"),
    ):
        with pytest.raises(ValueError, match=words):
            multiplier.statistics(weights)


def ranked_tables():
    """(table, convention, rank of its error): by chance, of 32 bits, signed, and truncated."""
    for rank in (0, 1, 2, 7, 31, 63):
        yield low_rank(rank), "sign-magnitude", rank
    rng = np.random.default_rng(2)
    full = rng.integers(-(2**31), 2**31, (128, 128))
    yield full, "sign-magnitude", 128
    error = rng.integers(-9, 9, (256, 3)) @ rng.integers(-999, 999, (3, 256))
    yield np.outer(range(-128, 128), range(-128, 128)) + error, "signed", 3
    yield np.outer(np.arange(128) & ~3, np.arange(128) & ~3), "sign-magnitude", 2


@pytest.mark.parametrize(("table", "convention", "rank"), [*ranked_tables()])
def test_tables_have_their_rank_and_a_proved_factorization(table, convention, rank):
    found = Multiplier.from_table(table, None, convention, "weight, input")
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


C = np.arange(256, dtype=np.uint8).view(np.int8).astype(int)  # two's complement: by bytes
V = np.arange(-128, 128)


def test_a_scalar_function_is_asked_pair_by_pair():
    assert Multiplier.from_function(lambda w, x: int(w) * int(x)).error.any() == 0
    larger = Multiplier.from_function(lambda w, x: w * x if w > x else 0, convention="unsigned")
    assert np.array_equal(larger.table, np.tril(np.outer(range(256), range(256)), -1))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_bytes_are_put_in_the_order_of_numbers(bits):
    v = np.arange(2**bits) - 2 ** (bits - 1)
    c = np.roll(v, 2 ** (bits - 1))
    found = Multiplier.from_table(np.outer(c & ~1, c), "t", "two's complement", "weight, input")
    assert found.convention == "signed" and np.array_equal(found.table, np.outer(v & ~1, v))
    found = Multiplier.from_table(np.outer(c & ~1, c), "t", "two's complement", "input, weight")
    assert np.array_equal(found.table, np.outer(v, v & ~1))
    low, high = int(v[0]), int(v[-1])
    assert found.admitted == ((low, high), (low, high))


V4 = np.arange(-8, 8)
LOW = np.outer(C & ~1, C & ~1)


@pytest.mark.parametrize(
    ("table", "convention", "words"),
    [
        (np.outer(C, C), "signed", 'and as "two\'s complement" of 0.00'),
        (np.outer(V, V), "two's complement", "and as 'signed' of 0.00"),
        (np.outer(V, V), "sign-magnitude", "and as 'signed' of 0.00"),
        (np.outer(range(256), range(256)), "signed", "and as 'unsigned' of 0.00"),
        (np.outer(range(64), range(64)), "signed", "and as 'unsigned' of 0.00"),
        (np.outer(range(256), range(256)).astype(np.int16), "signed", "as uint16 of 0.00"),
        (np.outer(V4, V4) & 0xFF, "signed", "and as 'signed' with its products as int8 of 0.00"),
        (
            np.outer(V4 + 8, V4 + 8).astype(np.int8),
            "signed",
            "'unsigned' with its products as uint8",
        ),
        (LOW & 0xFFFF, "unsigned", 'complement" with its products as int16 of 53.33'),
        (LOW & 0xFFFF, "two's complement", 'complement" with its products as int16 of 53.33'),
        (LOW & 0xFFFF, "signed", 'complement" with its products as int16 of 53.33'),
    ],
)
def test_a_table_of_another_convention_is_refused_with_a_hint(table, convention, words):
    with pytest.raises(ValueError, match=words) as raised:
        Multiplier.from_table(table, "t", convention)
    assert len(str(raised.value)) < 300 and "check=False" in str(raised.value)
    as_it_is = Multiplier.from_table(table, "t", convention, check=False)
    assert sorted(as_it_is.table.flat) == sorted(table.flat)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_bad_multiplier_is_taken_under_its_own_convention(bits):
    """Nothing but zeros, chance, or products that are eight or twice too small."""
    rng, low = np.random.default_rng(3), np.arange(2**bits)
    high = low - 2 ** (bits - 1)
    orders = {"unsigned": low, "signed": high, "two's complement": np.roll(high, 2 ** (bits - 1))}
    for convention, v in (*orders.items(), ("sign-magnitude", low)):
        true = np.outer(v, v)
        for table in (0 * true, true // 8, true // 2, rng.integers(0, 4**bits, true.shape)):
            Multiplier.from_table(table, "t", convention, "weight, input")


def changed(row: int, column: int, value, dtype=np.int64, size: int = 128) -> np.ndarray:
    table = np.outer(np.arange(size), np.arange(size)).astype(dtype)
    table[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "convention", "error", "words"),
    [
        (np.zeros((128, 127)), "sign-magnitude", ValueError, r"shape \(128, 127\)"),
        (np.zeros((100, 100), int), "unsigned", ValueError, "256 x 256"),
        (np.zeros((128, 256), int), "signed", ValueError, "shape"),
        (np.zeros(128, int), "sign-magnitude", ValueError, "shape"),
        (changed(3, 7, 2.5, float), "sign-magnitude", ValueError, "2.5 in row 3, column 7"),
        (changed(3, 7, np.nan, float), "sign-magnitude", ValueError, "nan in row 3"),
        (changed(9, 4, 2**31), "sign-magnitude", ValueError, "row 9, column 4.*32 bits"),
        (changed(9, 4, -(2**31) - 1), "sign-magnitude", ValueError, "row 9, column 4"),
        # The limit of 32 bits, 2**31 - 1, is 2**31 in float32, and beyond float16.
        (changed(9, 4, 2**31, np.float32), "sign-magnitude", ValueError, "column 4.*32 bits"),
        (np.full((128, 128), 0.5, np.float16), "sign-magnitude", ValueError, "0.5 in row 0"),
        (np.ma.masked_equal(changed(3, 7, -5), -5), "sign-magnitude", ValueError, r"cell \[3, 7\]"),
        ([[0, 0], [0]], "sign-magnitude", ValueError, "rows of different lengths"),
        # Which operand is which changes the numbers where a table is not symmetric.
        (
            changed(3, 7, 20),
            "sign-magnitude",
            ValueError,
            "3 by 7 is 20, and 7 by 3 is 21.*operands",
        ),
        (np.outer(V & ~1, V), "signed", ValueError, "-128 by -127 is 16256, and -127 by -128 is"),
        (
            np.outer(range(128), range(129)),
            "sign-magnitude",
            ValueError,
            r"\(128, 129\)\).*operands",
        ),
        (changed(9, 9, -1, size=256), "unsigned", ValueError, "-1 in row 9.*no negative product"),
        (changed(1, 1, 1, bool), "sign-magnitude", TypeError, "bool"),
        (changed(1, 1, 1), "sign-magnitud", ValueError, "did you mean 'sign-magnitude'"),
        (changed(1, 1, 1), None, ValueError, "no convention None. The conventions are sign"),
    ],
)
def test_a_bad_table_is_refused_by_its_first_cell(table, convention, error, words):
    with pytest.raises(error, match=words) as raised:
        Multiplier.from_table(table, convention=convention)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Multiplier.from_function(3), TypeError, "not callable"),
        (lambda: Multiplier.from_function(lambda w, x: None), TypeError, "holds object"),
        (lambda: Multiplier.from_function(np.add, convention="sign"), ValueError, "'signed'"),
        (lambda: find_multiplier("or_pair"), ValueError, "did you mean 'or_pairs'"),
        (lambda: find_multiplier("zzz"), ValueError, "The multipliers are exact, or_pairs"),
        (lambda: find_multiplier(3), TypeError, "int is not a multiplier"),
    ],
)
def test_bad_functions_and_names_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
