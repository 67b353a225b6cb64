"""Integer matrices as sums of few products of a column and a row: exact rank and factors.

An error table E of rank r is E = A B with integer factors A (rows, r) and B (r, columns). The
proof is arithmetic and does not trust what found the factors: A B is compared with E cell by cell,
so the rank is at most r; and modulo a prime the rank, which can only fall, is r all the same.

The lattice work is FLINT's (python-flint), imported where it is needed first.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

DIGIT_BASE = 255  # balanced digits then lie in -127..127, and a sign never meets -128
PRIMES = (2**31 - 1, 2**31 - 19, 2**31 - 61)  # products of two residues fit int64


class CertificateError(ValueError):
    """A factorization that is not the table's, or not shown to be of least rank."""


@dataclass(frozen=True, eq=False)
class Factorization:
    """Integer factors of a table: A (rows, r) by the weight, B (r, columns) by the input, int64."""

    weight_factor: np.ndarray
    input_factor: np.ndarray

    @property
    def rank(self) -> int:
        """r, the number of products that are summed."""
        return self.weight_factor.shape[1]

    @property
    def int8_products(self) -> int:
        """How many int8 products it takes: a factor beyond int8 is split in digits base 255."""
        return sum(
            digit_count(a) * digit_count(b)
            for a, b in zip(self.weight_factor.T, self.input_factor, strict=True)
        )

    def verify(self, table: np.ndarray) -> None:
        """Prove that A B is `table`, cell by cell, and that its rank is r and not less.

        Else a CertificateError names a cell that differs, or says that the rank may be less.
        """
        a, b = self.weight_factor.astype(object), self.input_factor.astype(object)
        # Python integers: no product of int64 factors can wrap.
        product = a @ b if self.rank else np.zeros(table.shape, dtype=object)
        wrong = np.argwhere(product != table.astype(object))
        if len(wrong):
            i, j = map(int, wrong[0])
            raise CertificateError(
                f"the factors give {product[i, j]} in cell [{i}, {j}], and the table has "
                f"{table[i, j]}: {len(wrong)} of {table.size} cells differ."
            )
        rank = modular_rank(table)
        if rank != self.rank:
            raise CertificateError(f"{self.rank} factors, and the rank is only shown to be {rank}.")


def modular_rank(table: np.ndarray) -> int:
    """A lower bound of the rank over the rationals, and nearly always the rank itself.

    A minor that is not 0 modulo a prime is not 0. The largest of the ranks modulo three primes.
    """
    best = 0
    for prime in PRIMES:
        if best < min(table.shape):
            best = max(best, len(_pivots(table, prime)))
    return best


def factorize(table: np.ndarray, progress: bool = True) -> Factorization:
    """Factorize an integer table into as few products as its rank, and prove it.

    Four forms are tried and the one of fewest int8 products is taken: where a table's distinct
    rows are as few as its rank, a choice of the row itself; otherwise a short basis of the lattice
    that the rows span (by LLL, rows taken in by sixteens) with the rows' coordinates; and the same
    two for the columns. Beyond rank 64 the first that is found serves. The table has integers
    within 32 bits; with `progress`, work of more than a second shows a bar.

    Raises:
        CertificateError: no factors within 64 bits were found, or they do not prove themselves.
    """
    table = np.asarray(table, dtype=np.int64)
    rank = modular_rank(table)
    forms: list[Factorization] = []
    steps = sum(-(-size // 16) for size in table.shape)
    with tqdm(total=steps, desc="factorizing", delay=1, leave=False, disable=not progress) as bar:
        for build in (_by_selection, partial(_by_lattice, bar=bar)):
            for flipped in (False, True):
                # Each product is at least one int8 product: nothing is left to gain. And where the
                # rank is high, the second orientation is slow and a table look-up faster anyway.
                if any(f.int8_products == rank for f in forms) or (forms and rank > 64):
                    continue
                form = build(table.T if flipped else table, rank)
                if form is not None:
                    a, b = _balanced(*form)
                    forms.append(Factorization(b.T, a.T) if flipped else Factorization(a, b))
    if not forms:
        raise CertificateError(f"no factors within 64 bits were found for a table of rank {rank}.")
    best = min(forms, key=lambda form: form.int8_products)
    best.verify(table)
    return best


def digit_count(values: np.ndarray) -> int:
    """How many balanced digits base 255 the largest of the values needs; at least 1."""
    largest, count, limit = int(np.abs(values).max(initial=0)), 1, 127
    while largest > limit:
        count, limit = count + 1, limit * DIGIT_BASE + 127
    return count


def digits(values: np.ndarray) -> list[np.ndarray]:
    """Split integers into int8 digits of -127..127: values = sum of digits[i] · 255**i."""
    rest, found = np.asarray(values, dtype=np.int64), []
    for _ in range(digit_count(rest)):
        digit = (rest + 127) % DIGIT_BASE - 127
        found.append(digit.astype(np.int8))
        rest = (rest - digit) // DIGIT_BASE
    return found


def _balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same products, with each one's common factor on the side where it costs fewer digits."""
    a, b = a.copy(), b.copy()
    for j in range(len(b)):
        left, right = int(np.gcd.reduce(a[:, j])), int(np.gcd.reduce(b[j]))
        common = left * right
        if common < 2:
            continue
        column, row = a[:, j] // left, b[j] // right
        shares = [share for share in range(1, min(common, 2**12) + 1) if common % share == 0]
        # As they are come first: of equally many products nothing is moved.
        forms = [(a[:, j], b[j])] + [(column * s, row * (common // s)) for s in shares]
        a[:, j], b[j] = min(forms, key=lambda form: digit_count(form[0]) * digit_count(form[1]))
    return a, b


def _pivots(table: np.ndarray, prime: int) -> list[int]:
    """The columns in which Gaussian elimination modulo a prime finds its pivots."""
    work = np.asarray(table, dtype=np.int64) % prime
    pivots: list[int] = []
    for column in range(work.shape[1]):
        row = len(pivots)
        candidates = np.flatnonzero(work[row:, column])
        if not len(candidates):
            continue
        chosen = row + candidates[0]
        work[[row, chosen]] = work[[chosen, row]]
        work[row] = work[row] * pow(int(work[row, column]), -1, prime) % prime
        below = work[row + 1 :]
        below -= below[:, column, None] * work[row] % prime
        below %= prime
        pivots.append(column)
    return pivots


def _by_selection(table: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Each row chooses one of `rank` distinct rows, if there are no more of them."""
    distinct, which = np.unique(table, axis=0, return_inverse=True)
    used = np.flatnonzero(distinct.any(axis=1))
    if len(used) != rank:
        return None
    return (which.reshape(-1, 1) == used).astype(np.int64), distinct[used]


def _by_lattice(table: np.ndarray, rank: int, bar: tqdm) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows' coordinates in a short basis of the lattice that they span."""
    from flint import fmpz_mat

    rows = table[table.any(axis=1)]
    basis: list[list[int]] = []
    for start in range(0, len(rows), 16):
        stacked = fmpz_mat(basis + rows[start : start + 16].tolist()).lll()
        # LLL turns dependent rows to zero and leaves the others a basis of the same lattice.
        basis = [row for row in stacked.tolist() if any(row)]
        bar.update(1)
    if len(basis) != rank or any(abs(int(value)) >= 2**62 for row in basis for value in row):
        return None
    b = np.array([[int(value) for value in row] for row in basis], dtype=np.int64)
    found = (_pivots(b, prime) for prime in PRIMES)
    pivots = next((columns for columns in found if len(columns) == rank), None)
    if pivots is None:
        return None
    # A B = table has one solution in the pivot columns, and it is whole: rows are in the lattice.
    square = fmpz_mat(b[:, pivots].T.tolist())
    coordinates = square.solve(fmpz_mat(table[:, pivots].T.tolist())).tolist()
    if any(value.q != 1 or abs(int(value.p)) >= 2**62 for row in coordinates for value in row):
        return None
    return np.array([[int(value.p) for value in row] for row in coordinates], np.int64).T, b
