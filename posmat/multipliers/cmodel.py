"""A multiplier's model in C, such as EvoApproxLib's, as a table of all its products.

A model is a program: it is compiled, and run in a process of its own, which ends within
`TIME_LIMIT`. It has the rights of whoever runs it.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import numpy as np

from posmat.layer.problem import NotAvailable
from posmat.multipliers.formats import COMMENT

TIME_LIMIT = 60  # seconds, for the compiler, and for a model with all its pairs

# Compiled behind the model. Writes what the types are, and the products of both ranges of operands.
_TABULATE = r"""
#undef main
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#define POSMAT_TYPE(T) (int64_t)sizeof(T) * 8, (T)-1 < (T)0
int main(int count, char **arguments)
{
    int64_t first = atoi(arguments[2]), last = atoi(arguments[3]);
    int64_t types[] = {POSMAT_TYPE(POSMAT_A), POSMAT_TYPE(POSMAT_B)};
    FILE *file = fopen(arguments[1], "wb");
    fwrite(types, sizeof types, 1, file);
    for (int64_t a = first; a <= last; a++)
        for (int64_t b = first; b <= last; b++) {
            int64_t product = (int64_t)POSMAT_FUNCTION((POSMAT_A)a, (POSMAT_B)b);
            fwrite(&product, sizeof product, 1, file);
        }
    return fclose(file);
}
"""
_SAYS_WHY = re.compile("error|undefined", re.IGNORECASE).search
_NAMED = re.compile(r"(?<![a-z0-9])mul(\d+)(?:x(\d+))?([us]?)(?=_|$)", re.IGNORECASE)
_STATED = re.compile(
    r"(?<![\w%])(MAE|WCE)\s*[=:]\s*(\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(?![\d.e+-]*\s*%)",
    re.IGNORECASE,
)


def c_compiler() -> str:
    """The system's C compiler: $CC, cc, gcc or clang; NotAvailable where there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name) and os.name != "nt":
            return name
    raise NotAvailable("this needs a C compiler, and Linux or macOS: install gcc, or set CC.")


def run_compiler(*arguments: str | Path) -> str:
    """What the system's C compiler prints; an OSError says why it failed."""
    told = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    command = [c_compiler(), *arguments]
    try:
        done = subprocess.run(command, check=False, timeout=TIME_LIMIT, **told)
    except subprocess.TimeoutExpired:
        raise OSError(f"the compiler took more than {TIME_LIMIT} s") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason was given"]
        raise OSError(next(filter(_SAYS_WHY, lines), lines[0])[-150:])
    return done.stdout


def tabulate(
    path: Path, function: str | None, bits: int | None, signed: bool | None
) -> tuple[str, np.ndarray, str]:
    """The function's name, its products [first operand, second operand], and their convention.

    Operands are in order, from 0 or from the lowest on; a product is the low 2 n bits of a result.
    """
    comments = " ".join(COMMENT.findall(path.read_text(encoding="utf-8", errors="replace")))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        program, source = Path(folder, "model"), Path(folder, "tabulate.c")
        source.write_text(_TABULATE, encoding="utf-8")
        try:
            function, a, b = _find_function(path, function)
            renamed = ["-Dmain=posmat_main", f"-DPOSMAT_FUNCTION={function}"]
            renamed += [f"-DPOSMAT_A={a}", f"-DPOSMAT_B={b}", "-include", path.resolve()]
            run_compiler("-w", "-O1", "-fwrapv", *renamed, source, "-lm", "-o", program)
        except OSError as problem:
            raise ValueError(f"{path.name} does not compile: {problem}.") from None
        size_a, signed_a, size_b, signed_b = _run(program, path, 0, -1)
        if word := _NAMED.search(function):
            if word[2] not in (None, word[1]):
                raise ValueError(f"{function} multiplies {word[1]} by {word[2]} bits, not n by n.")
            bits = int(word[1]) if bits is None else bits
            signed = {"s": True, "u": False}.get(word[3].lower()) if signed is None else signed
        bits = 8 if bits is None and size_a == size_b == 8 else bits
        guessed = signed is None and signed_a == signed_b
        signed = bool(signed_a) if guessed else signed
        if bits is None or signed is None:
            raise ValueError(
                f"{function}({a}, {b}) of {path.name} does not say how many bits it multiplies, "
                "or whether they have a sign: give bits= and signed=."
            )
        if bits not in range(4, 9):
            raise ValueError(f"{function} multiplies {bits} bits: 4 to 8 can be simulated.")
        table, MAE, WCE = _products(program, path, bits, signed)
        other = _products(program, path, bits, not signed)[1] if guessed else MAE
    if other < MAE and 4 * other <= MAE:
        raise ValueError(
            f"whether {function} of {path.name} has a sign is not said: by its types its mean "
            f"absolute error is {float(MAE):,.2f}, otherwise {float(other):,.2f}. Give signed=."
        )
    for name, found in (("MAE", MAE), ("WCE", WCE)):
        stated = [printed for what, printed in _STATED.findall(comments) if what.upper() == name]
        said = [Decimal(printed.replace(",", "")) for printed in stated]  # of each of its functions
        if said and all(abs(d - found) > Decimal(10) ** d.as_tuple().exponent / 2 for d in said):
            raise ValueError(
                f"{path.name} states {name} = {stated[0]}, and its table has {found.normalize():f}:"
                f" read as {bits} bits with{'' if signed else 'out'} a sign it is another model."
            )
    return function, table, "signed" if signed else "unsigned"


def _find_function(path: Path, wanted: str | None) -> tuple[str, str, str]:
    """Name and operand types of the model's one public function of two integers, or of `wanted`."""
    text = run_compiler("-E", "-w", path.resolve())
    parts = re.split(r'^# \d+ "(.*)".*$', text, flags=re.MULTILINE)  # each behind its file's name
    told = str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    of_files = zip(parts[1::2], parts[2::2], strict=True)
    text = "".join(part for file, part in of_files if file == told)
    text = re.sub(r'extern\s*"C"\s*\{|^#.*$|"(?:\\.|[^"\\])*"', "", text, flags=re.MULTILINE)
    while (flat := re.sub(r"\{[^{}]*\}", "\0", text)) != text:
        text = flat
    found = {}
    for part in text.split("\0")[:-1]:  # what stands before a body
        said, _, operands = part.rpartition(";")[2].rpartition(")")[0].rpartition("(")
        types = [operand.strip().rpartition(" ")[0].strip() for operand in operands.split(",")]
        head, words = (re.findall(r"\w+|\*", of) for of in (said, f"{said} {operands}"))
        other = {*words} & {"*", "void", "float", "double", "struct", "union", "__int128"}
        public = head and (head[-1] == wanted or "static" not in head)
        if public and len(types) == 2 and all(types) and not other:
            found[head[-1]] = types
    if wanted is None and len(found) == 1:
        wanted = next(iter(found))
    if wanted not in found:
        which = f"{', '.join(found)[:150]}: say which by function=" if found else "none"
        raise ValueError(f"of public functions of two integers {path.name} has {which}.")
    return wanted, *found[wanted]


def _run(program: Path, path: Path, first: int, last: int) -> np.ndarray:
    """What the program writes, int64: four facts about the types, then the products."""
    written = program.with_name("written")
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command = [program, written, str(first), str(last)]
    own = {"cwd": program.parent, "start_new_session": True}
    with subprocess.Popen(command, **own, **silent) as process:
        try:
            code = process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            why = f"the model in {path.name} ran for more than {TIME_LIMIT} s."
            raise ValueError(why) from None
        finally:  # with whatever it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = np.fromfile(written, np.int64) if written.exists() else ()
    if code or len(found) != 4 + (last + 1 - first) ** 2:
        how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        raise ValueError(f"the model in {path.name} ended before its last product ({how}).")
    return found


def _products(
    program: Path, path: Path, bits: int, signed: bool
) -> tuple[np.ndarray, Decimal, Decimal]:
    """The table of a model of `bits` bits, its MAE and its WCE."""
    side, half = 2**bits, 4**bits // 2 * signed
    operands = np.arange(side) - side // 2 * signed
    written = _run(program, path, operands[0], operands[-1])[4:]
    table = (written.reshape(side, side) + half) % side**2 - half
    error = np.abs(table - np.outer(operands, operands))
    return table, Decimal(int(error.sum())) / error.size, Decimal(int(error.max()))
