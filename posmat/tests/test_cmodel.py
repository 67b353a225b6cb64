"""Models in C: what they are taken for, and how those end that are none."""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from posmat.layer.problem import NotAvailable
from posmat.multipliers import cmodel
from posmat.multipliers.table import Multiplier

try:
    cmodel.c_compiler()
except NotAvailable as reason:
    pytestmark = pytest.mark.skip(reason=str(reason))


def write(tmp_path, source: str) -> Path:
    path = tmp_path / "a model.c"
    path.write_text(source, encoding="utf-8")
    return path


TYPES = [  # result, operands, name, bits, signed
    ("uint16_t", "uint8_t", "mul8u_1AB", 8, False),
    ("int16_t", "int8_t", "mul8s_1AB", 8, True),
    ("uint16_t", "uint8_t", "any", 8, False),
    ("int", "signed char", "any", 8, True),
    ("unsigned", "const unsigned char", "any", 8, False),
    ("uint64_t", "uint64_t const", "mul7u_0AB", 7, False),
    ("long long", "unsigned long", "mul8_404", 8, False),
    ("uint64_t", "uint64_t", "mul8s_64", 8, True),
    ("int32_t", "int32_t", "MUL4S", 4, True),
    ("short int const", "long long int", "mul6x6u_x", 6, False),
    ("u16", "u8", "any", 8, False),
]


@pytest.mark.parametrize(("result", "operand", "name", "bits", "signed"), TYPES)
def test_width_and_sign_are_those_of_the_name_or_of_the_types(
    result, operand, name, bits, signed, tmp_path
):
    path = write(
        tmp_path,
        f"""#include <stdint.h>
        typedef uint16_t u16; typedef uint8_t u8;
        static inline int helper(int a, int b) {{ if (a) {{ return b; }} return a; }}
        int one(int a);
        int main(int n, char **words) {{ return 7; }}
        {result} {name}({operand} B, const {operand} A) /* (int a, int b) {{ */
        {{
        #pragma of some compiler
        return B * (A & ~1) + (B == 3); }}""",
    )
    found = Multiplier.from_c(path)
    v = np.arange(2**bits) - signed * 2 ** (bits - 1)
    weight, data = np.meshgrid(v, v, indexing="ij")  # the first parameter is the input
    half = 4**bits // 2 * signed
    expected = (data * (weight & ~1) + (data == 3) + half) % 4**bits - half
    assert found.name == name and found.convention == ("signed" if signed else "unsigned")
    assert np.array_equal(found.table, expected)
    other = Multiplier.from_c(path, "other", operands="weight, input")
    assert other.name == "other" and np.array_equal(other.table, found.table.T)


def test_a_signed_model_may_have_unsigned_types(tmp_path):
    """As six of EvoApproxLib have: bytes come in, and 16 bits go out."""
    source = """#include <stdint.h>
    uint16_t mul8s_1AB(uint8_t A, uint8_t B) { return (uint16_t)((int8_t)A * (int8_t)B & ~3); }"""
    found = Multiplier.from_c(write(tmp_path, source))
    v = np.arange(-128, 128)
    assert np.array_equal(found.table, np.outer(v, v) & ~3) and found.statistics().WCE == 3


def test_what_is_not_said_is_asked_for(tmp_path):
    path = write(tmp_path, "int f(int a, int b) { return (a & 255) * (b & 255); }")
    # Its types have a sign, and its products have none.
    with pytest.raises(ValueError, match=r"otherwise 0\.00\. Give signed="):
        Multiplier.from_c(path, bits=8)
    for bits in (8, 5):
        assert not Multiplier.from_c(path, bits=bits, signed=False).error.any()
    for source, bits, words in (
        ("int f(int a, int b)", None, r"f\(int, int\) of a model.c does not say how many bits"),
        ("int f(signed char a, unsigned char b)", None, "or whether they have a sign"),
        ("int f(int a, int b)", 0, "f multiplies 0 bits: 4 to 8"),
        ("int f(int a, int b)", 9, "f multiplies 9 bits: 4 to 8"),
        ("int mul12u_1(int a, int b)", None, "mul12u_1 multiplies 12 bits: 4 to 8"),
        ("int mul8x3u_1(int a, int b)", None, "mul8x3u_1 multiplies 8 by 3 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            Multiplier.from_c(write(tmp_path, source + "{ return a * b; }"), bits=bits)


def test_of_several_functions_one_is_asked_for(tmp_path):
    path = write(
        tmp_path,
        """extern int other(int a, int b);
        unsigned mul4u_1(unsigned a, unsigned b) { return a * b; }
        static unsigned inner(unsigned a, unsigned b) { return a * b; }
        double half(double a, int b) { return b; }
        int *place(int a, int b) { return 0; }
        unsigned long mul4u_2(unsigned a, unsigned b) { return inner(a, b) & ~1; }""",
    )
    with pytest.raises(ValueError, match=r"a model.c has mul4u_1, mul4u_2: say which by function="):
        Multiplier.from_c(path)
    with pytest.raises(ValueError, match="mul4u_1, mul4u_2"):
        Multiplier.from_c(path, function="mul4u_3")
    assert Multiplier.from_c(path, function="mul4u_2").statistics().WCE == 1
    assert Multiplier.from_c(path, function="inner", bits=4).table.shape == (16, 16)
    for source in ("", "int f(int a) { return a; }", "\x00\x01rubbish {", "\xe9" * 10**6):
        with pytest.raises(ValueError, match=r"a model\.c (has none|does not compile)"):
            Multiplier.from_c(write(tmp_path, source))


STATED = """// MAE%% = 0.0019 %%
/* MAE = %s
 * WCE%% = 0.0046 %% */
// WCE = %s
int mul8u_T(unsigned char a, unsigned char b) { return a * b + (a %% 3 == 0); }"""


def test_one_of_several_functions_states_its_own(tmp_path):
    source = """// MAE = 0.0
    int mul8u_f(unsigned char a, unsigned char b) { return a * b; }
    // MAE = 1.00.
    int approx_mul4u_g(int a, int b) { return a * b ^ 1; }"""
    path = write(tmp_path, source)
    assert Multiplier.from_c(path, function="mul8u_f").statistics().MAE == 0
    assert Multiplier.from_c(path, function="approx_mul4u_g").statistics().MAE == 1


@pytest.mark.parametrize(
    ("MAE", "WCE", "refused"),
    [
        ("0.3", "1", ""),  # MAE is 86 / 256 = 0.3359375
        ("0.34", "1.0", ""),
        ("0.3359375", "1", ""),
        ("34e-2", "0.1e1", ""),
        ("0.4", "1", "states MAE = 0.4, and its table has 0.3359375"),
        ("0.33593", "1", "states MAE = 0.33593, and"),
        ("0.3", "2", "states WCE = 2, and its table has 1:"),
        ("12.5 %", "99%", ""),  # shares, which say neither
    ],
)
def test_what_a_model_states_of_itself_is_held_against_its_table(MAE, WCE, refused, tmp_path):
    path = write(tmp_path, STATED % (MAE, WCE))
    if not refused:
        assert Multiplier.from_c(path).statistics().MAE == 0.3359375
        return
    with pytest.raises(ValueError, match=refused) as raised:
        Multiplier.from_c(path)
    assert len(str(raised.value)) < 300


HEAD = """#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int mul8u_X(unsigned char a, unsigned char b) """


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (HEAD + "{ return a * b }", "does not compile: .*expected"),
        (HEAD + "{ return missing(a, b); }", "does not compile: .*missing"),
        ('#include "none.h"\n' + HEAD + "{ return a * b; }", "does not compile: .*none.h"),
        (HEAD + "{ for (;;) if (a == 256) return 1; }", "ran for more than 2 s"),
        (HEAD + "{ return *(volatile int *)0; }", "before its last product .Segmentation fault"),
        (HEAD + "{ if (a == 9) exit(0); return a * b; }", "before its last product .exit code 0"),
        (HEAD + "{ if (a == 9) exit(3); return a * b; }", "before its last product .exit code 3"),
        (HEAD + "{ if (!fork()) pause(); abort(); }", "before its last product .Aborted"),
    ],
)
def test_a_model_that_fails_is_told_in_a_sentence(source, words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cmodel, "TIME_LIMIT", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write(tmp_path, source)
    with pytest.raises(ValueError, match=f"a model.c.*{words}") as raised:
        Multiplier.from_c(path)
    assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == [path.name]
    assert capfd.readouterr() == ("", "")
    running = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE, check=True, text=True)
    assert str(tmp_path) not in running.stdout


def test_a_model_that_prints_and_writes_is_taken_in_silence(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path,
        HEAD + '{ puts("here"); fputs("there", stderr); fclose(fopen("log", "w")); return a * b; }',
    )
    assert not Multiplier.from_c(path).error.any()
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == [path.name]


def test_a_model_may_include_what_lies_beside_it(tmp_path):
    cell = "static int cell(int a, int b) { return a * b; }\n"
    (tmp_path / "cell.h").write_text(cell, encoding="utf-8")
    path = write(tmp_path, '#include "cell.h"\n' + HEAD + "{ return cell(a, b); }")
    assert not Multiplier.from_c(path).error.any()


def test_without_a_compiler_or_a_file_it_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"none\.c"):
        Multiplier.from_c(tmp_path / "none.c")
    with pytest.raises(ValueError, match="order of operands"):
        Multiplier.from_c(tmp_path / "none.c", operands="a, b")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NotAvailable, match="needs a C compiler"):
        Multiplier.from_c(write(tmp_path, HEAD + "{ return a * b; }"))
