"""Tables as others publish them, read from every format that they publish them in."""

import numpy as np
import pytest
import torch

import posmat as pm
from posmat.multipliers.table import Multiplier


def table_of(bits: int, signed: bool) -> np.ndarray:
    """An inexact table that is not symmetric, [a, b], signed operands by their bytes."""
    v = np.arange(2**bits) - 2 ** (bits - 1) * signed
    v = np.roll(v, len(v) // 2) if signed else v
    return np.outer(v & ~1, v) | (v == 3)


def as_text(between: str, end: str = "\n"):
    def write(path, table):
        rows = [between.join(map(str, row)) for row in table.tolist()]
        path.write_bytes((end.join(rows) + end).encode("utf-8-sig"))

    return write


def as_triples(header: str):
    def write(path, table):
        order = np.random.default_rng(0).permutation(table.size)
        lines = [f"{i // len(table)} {i % len(table)} {table.flat[i]}" for i in order]
        path.write_text("\n".join([header, *lines]), encoding="utf-8")

    return write


def as_braces(path, table):
    rows = ",\n".join("{" + ", ".join(map(str, row)) + "}" for row in table.tolist())
    side = len(table)
    path.write_text(
        f"#include <stdint.h>\n/* by input = {{0}}; */\nconst int16_t lut[{side}][{side}] = "
        f"{{{rows}}};  // {{[input][weight]}}\n",
        encoding="utf-8",
    )


def as_flat_braces(path, table):
    cells = ",".join(f"0x{v:X}u" if v >= 0 else f"{v}L" for v in table.flatten().tolist())
    path.write_text(f"int lut[] = {{ {cells}, }};", encoding="utf-8")


def as_16_bits(path, table):
    path.write_bytes(table.astype("<i2" if table.min() < 0 else "<u2").tobytes())


FORMATS = [
    ("mine.npy", np.save),
    ("mine.csv", as_text(",")),
    ("mine.CSV", as_text(";", "\r\n")),
    ("mine.csv", as_text("\t", "\t\n")),
    ("mine.csv", np.savetxt),
    ("mine.txt", as_text("  ")),
    ("mine.txt", as_triples("a b product")),
    ("mine.txt", as_triples("# operands, and what they give")),
    ("mine.bin", as_16_bits),
    ("mine.h", as_braces),
    ("mine.h", as_flat_braces),
]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("convention", ["unsigned", "two's complement"])
@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_a_table_is_the_same_from_every_format(name, write, convention, bits, tmp_path):
    table = table_of(bits, convention != "unsigned")
    write(tmp_path / name, table)
    read = Multiplier.from_table(tmp_path / name, None, convention, "input, weight")
    expected = table.T
    if convention != "unsigned":
        expected = np.roll(expected, (len(table) // 2,) * 2, (0, 1))
    assert read.name == "mine" and np.array_equal(read.table, expected)
    read = Multiplier.from_table(str(tmp_path / name), "other", convention, "weight, input")
    assert read.name == "other" and np.array_equal(read.table, expected.T)


def test_triples_may_name_signed_operands(tmp_path):
    v = range(-8, 8)
    lines = [f"{a} {b} {a * b - (a == 7)}" for a in v for b in v]
    (tmp_path / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    read = Multiplier.from_table(tmp_path / "t.txt", None, "signed", "input, weight")
    assert read.error[-8 + 8, 7 + 8] == -1 and read.error.sum() == -16
    with pytest.raises(ValueError, match=r"every pair of 0\.\.15 once"):
        Multiplier.from_table(tmp_path / "t.txt", None, "unsigned", "input, weight")


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_a_file_that_was_damaged_is_refused_in_a_sentence(name, write, tmp_path):
    path = tmp_path / name
    write(path, table_of(8, False))
    whole = path.read_bytes()
    rubbish = np.random.default_rng(1).bytes(5000)
    # Cut in the middle, also just behind a line; empty; no table at all; far too large.
    cuts = (len(whole) // 2, whole.find(b"\n", len(whole) // 2) + 1, 7, 0)
    others = (rubbish, b"\0" * 99, whole * 40, b"1\n" * 5 * 2**20)
    for content in (*(whole[:cut] for cut in cuts), *others):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine.* (does not hold a table|has shape)") as raised:
            Multiplier.from_table(path, None, "unsigned", "weight, input")
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("words.csv", "weight,input\n1,two\n", "could not convert"),
        ("latin.csv", b"\xe9,1\n", "codec can't decode"),
        ("lines.txt", "a b product\n" + "0 0 0\n" * 256, "every pair"),
        ("two.h", "int a[] = {1}; int b[] = {2};", "2 arrays"),
        ("octal.h", "int a[] = {1, 010};", "'010' is no whole number"),
        ("ragged.h", "int a[2][2] = {{1, 2}, {3}};", "inhomogeneous"),
        ("odd.bin", b"123", "multiple of element size"),
        ("short.bin", b"1234", "2 products, and 4 to 8 bits have 256"),
        ("mine.xlsx", "", "ends in none of"),
    ],
)
def test_what_is_no_table_is_told_why(name, content, words, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{words}"):
        Multiplier.from_table(tmp_path / name, convention="unsigned")


def test_files_that_numpy_writes_otherwise_are_refused(tmp_path):
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
    (tmp_path / "t.bin").write_bytes(bytes(2**17))
    with pytest.raises(ValueError, match="16 bits have a sign is not known"):
        Multiplier.from_table(tmp_path / "t.bin", convention="sign-magnitude")


def test_the_inputs_that_were_refused_or_misread_have_their_right_values(tmp_path):
    """One to nine of the field's; the sixth and the seventh are the formats above."""
    c = np.arange(256, dtype=np.uint8).view(np.int8).astype(int)
    v = np.arange(-128, 128)

    def product(multiplier, w, x):
        w, x = (torch.tensor([o], dtype=torch.int8) for o in (w, x))
        found = [pm.inexact_product(x, w, multiplier, path).item() for path in ("gemm", "lookup")]
        assert found[0] == found[1]
        return found[0]

    # 1: the exact multiplier by its bytes, taken for one in the order of numbers.
    with pytest.raises(ValueError, match=r"as \"two's complement\" of 0\.00"):
        Multiplier.from_table(np.outer(c, c), "acc", "signed")
    exact = Multiplier.from_table(np.outer(c, c), "acc", "two's complement")
    assert product(exact, [7, -2], [3, -5]) == 31 and exact.statistics().WCE == 0
    # 2: a signed table, taken for an unsigned one.
    signed = (c[:, None] & ~1) * (c & ~1)
    with pytest.raises(ValueError, match="an unsigned circuit has no negative product"):
        Multiplier.from_table(signed, "t", "unsigned")
    signed = Multiplier.from_table(signed, "t", "two's complement")
    assert product(signed, [-3], [-5]) == 24
    # 3: [input, weight], of which the weights alone lose their lowest bit.
    by_input = np.outer(range(256), np.arange(256) & ~1)
    with pytest.raises(ValueError, match=r"\(1 by 2 is 2, and 2 by 1 is 0\): give operands="):
        Multiplier.from_table(by_input, "t", "unsigned")
    by_input = Multiplier.from_table(by_input, "t", "unsigned", "input, weight")
    assert product(by_input, [7], [3]) == 18
    # 4: a signed function whose result is read without a sign.
    with pytest.raises(ValueError, match=r"'signed' with its products as int16 of 53\.33"):
        Multiplier.from_function(lambda w, x: ((w & ~1) * (x & ~1)) & 0xFFFF, "t", "signed")
    low = Multiplier.from_table(np.outer(v & ~1, v & ~1), "t", "signed").statistics()
    assert (low.MAE, low.WCE) == (53.333984375, 255) == signed.statistics()[2:6:3]
    # 5: products with 0 that are not 0; the sign of 0 is plus.
    z = Multiplier.from_function(lambda w, x: (w * x) | 1, "z", "unsigned")
    assert [product(z, [w], [x]) for w, x in ((0, 5), (-5, 0), (0, 0), (2, -3))] == [1, -1, 1, -7]
    assert z.statistics([0]).ER == 1 and not z.exact_when()["power of two"]["both"]
    # 8: of 7 and 6 bits; what is beyond is refused by its name.
    for bits, w in ((7, -128), (6, 64)):
        table = np.outer(range(2**bits), range(2**bits))
        m = Multiplier.from_table(table, f"m{bits}", "unsigned")
        assert product(m, [2**bits - 1], [-3]) == -3 * (2**bits - 1)
        with pytest.raises(ValueError, match=rf"w\[0, 0\] is {w}, and the table of 'm{bits}'"):
            product(m, [w], [1])
    # 9: a function of two numbers.
    assert product(Multiplier.from_function(lambda w, x: int(w) * int(x), "s"), [-7], [9]) == -63
