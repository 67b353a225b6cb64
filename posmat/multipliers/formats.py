"""A table of products as others publish it: what a file holds, and what its cells are.

.npy          one array
.csv, .txt    a line for each row, with commas, semicolons, tabs or spaces between; or a line
              `a b product` for each pair of operands, with or without a header
.bin          nothing but the products, 16 bits each, the low byte first (TFApprox)
.h            one C array, its products in braces (AdaPT, TransAxx)
"""

import io
import math
import re
from pathlib import Path

import numpy as np

SIDES = [2**bits for bits in range(4, 9)]  # of a table of n bits
LARGEST_FILE = 8 * 2**20  # bytes; 65,536 lines of three numbers, 25 characters each, are 5 MB
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)  # of C
_INTEGER = re.compile(r"([-+]?(?:0x[0-9a-f]+|[1-9]\d*|0))[ul]*", re.IGNORECASE)


def read_table(path: Path, convention: str) -> np.ndarray:
    """The matrix in a file, whose first index is the file's first operand.

    Its ending says the format; `convention`, as `Multiplier.from_table` takes it, whether the 16
    bits of a .bin file have a sign, and which operands lines of three numbers have to name. A
    ValueError says why it is no table.
    """
    readers = {
        ".npy": lambda content: np.lib.format.read_array(io.BytesIO(content), allow_pickle=False),
        ".csv": lambda content: _lines(content, convention),
        ".txt": lambda content: _lines(content, convention),
        ".bin": lambda content: _binary(content, convention),
        ".h": _braces,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path.name} ends in none of {', '.join(readers)}: save it as one.")
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    try:
        if len(content) > LARGEST_FILE:
            raise ValueError("it is larger than 8 MB, and a table of 8 bits is not")
        return reader(content)
    except (ValueError, EOFError) as problem:
        why = str(problem).partition("\n")[0][:150].rstrip(".")
        raise ValueError(f"{path.name} does not hold a table of numbers ({why}).") from None


def _lines(content: bytes, convention: str) -> np.ndarray:
    text = re.sub(r"[,;\t ]+", " ", content.decode("utf-8-sig"))
    lines = [line for line in map(str.strip, text.splitlines()) if line and line[0] != "#"]
    if lines and re.search(r"[a-z]{2}|\b[a-z]\b", lines[0], re.IGNORECASE):
        lines = lines[1:]  # names of the columns
    if not lines:
        raise ValueError("it has no numbers")
    table = np.loadtxt(lines, ndmin=2)
    if table.shape[1] != 3:
        return table
    side = math.isqrt(len(table))
    first = -(side // 2) if convention == "signed" else 0
    ordered = table[np.lexsort((table[:, 1], table[:, 0]))]
    if not np.array_equal(ordered[:, :2].T, np.indices((side, side)).reshape(2, -1) + first):
        raise ValueError(
            f"{len(table):,} lines `a b product` do not have every pair of {first}.."
            f"{first + side - 1} once, as the convention has its operands"
        )
    return ordered[:, 2].reshape(side, side)


def _binary(content: bytes, convention: str) -> np.ndarray:
    if convention == "sign-magnitude":
        raise ValueError("whether its 16 bits have a sign is not known: give an array")
    return _square(np.frombuffer(content, "<u2" if convention == "unsigned" else "<i2"))


def _braces(content: bytes) -> np.ndarray:
    text = COMMENT.sub(" ", content.decode("utf-8", "replace"))
    found = re.findall(r"=\s*(\{[^;=]*\})\s*;", text)
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} arrays in braces that a semicolon ends, not 1")
    rows = re.findall(r"\{([^{}]*)\}", found[0])
    cells = [[_integer(cell) for cell in row.strip().rstrip(",").split(",")] for row in rows]
    return np.array(cells) if len(rows) > 1 else _square(np.array(cells[0]))


def _integer(cell: str) -> int:
    value = _INTEGER.fullmatch(cell.strip())
    if value is None:
        raise ValueError(f"{cell.strip()[:20]!r} is no whole number as C writes it")
    return int(value[1], 0)


def _square(products: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(products))
    if side not in SIDES or side**2 != len(products):
        raise ValueError(f"{len(products):,} products, and 4 to 8 bits have 256 to 65,536")
    return products.reshape(side, side)
