"""Growth and roofs: rows of many sizes -> rates, exponents, and what limits each. Needs no torch.

A product is at the best as fast as the processor multiplies, or as memory brings the operands.
Both are measured in the same run, as rows with the axis "roof": the "peak" methods are large GEMMs,
the best of which need not be the processor's own peak, "copy" copies `bytes` of memory; the fastest
block counts. "uint8 peak" multiplies magnitudes by int8 weights, which is exact also where int8 by
int8 is not. Rows with the axis "least" are products of one number by one: what a call costs before
it computes anything. The column `engine` says which peak is a method's roof: "int8", "float32", or
another, such as PyTorch's int8 loop, without one.
"""

import numpy as np
import pandas as pd

from posmat.measure.summary import is_control

SIZES = {"M": "batch_size", "N": "out_features", "K": "in_features"}
INT8_PEAK, UINT8_PEAK, FLOAT32_PEAK, COPY = "int8 peak", "uint8 peak", "float32 peak", "copy"
FLOAT32_LAYER = "float32 layer"
_TWO_GEMMS = ("one_sided_product", "positive_matrix_product")  # of bytes
# By these, in rows that do not say it, an engine is int8 where the rows have such a peak.
_BY_BYTES = ("int8_product", *_TWO_GEMMS)
# Of the time: where two limits add up to all of it, the larger is half or more. What explains less
# leaves most of the time to something else, and limits nothing.
LEAST_SHARE = 0.5


def least_bytes(rows: pd.DataFrame) -> pd.Series:
    """The bytes that a product has to move: operands read once, results written once.

    int8 operands and a result of 4 bytes; for the float32 layer 4 bytes each.
    """
    M, N, K = (rows[name].astype("Float64") for name in SIZES.values())
    width = np.where(rows["method"] == FLOAT32_LAYER, 4, 1)
    return (width * (M * K + N * K) + 4 * M * N).astype("Int64")


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per method and size: its median time, its rate, and what limits it.

    Returns:
        The axis, the sizes, `work` (M·N·K multiply-accumulates), `seconds` (the median), `gmacs`
        (10⁹ multiply-accumulates per second), `intensity` (operations per byte), the least time by
        each limit (`launch_s`, `memory_s`; `compute_s`, of all GEMMs, blank without a peak),
        `bound` (the one that asks for most: launch, memory or compute; unexplained, where that is
        less than half of the time) and `share`, what it explains of the time.
    """
    timed = rows[(rows["state"] == "timed") & (rows["clock"] == "host")]
    timed = timed[timed["axis"].isin([*SIZES, "centre"]) & ~timed["method"].map(is_control)]
    keys = ["method", "axis", *SIZES.values(), "bytes"]
    table = timed.groupby(keys, sort=False)["seconds"].median().astype(float).reset_index()
    roofs = measured_roofs(rows)
    method, moved = table["method"], table["bytes"].astype(float)
    work = table[list(SIZES.values())].astype(float).prod(axis=1)
    table["work"] = work
    table["gmacs"] = work / table["seconds"] / 1e9
    table["intensity"] = 2 * work / moved
    table["launch_s"] = method.map(roofs.launch_s).astype(float)
    table["memory_s"] = moved / moved.map(roofs.bandwidth)
    peak = pd.to_numeric(method.map(roofs.peak_gmacs))
    table["compute_s"] = method.map(roofs.gemms) * work / peak / 1e9
    limits = table[["launch_s", "memory_s", "compute_s"]]
    table["share"] = limits.max(axis=1) / table["seconds"]
    bound = limits.idxmax(axis=1).str.removesuffix("_s")
    table["bound"] = bound.where(table["share"] >= LEAST_SHARE, "unexplained")
    return table


class Roofs:
    """What a run measured of its machine.

    int8_gmacs, float32_gmacs: 10⁹ multiply-accumulates per second of a large GEMM; int8_gmacs is
        None where the machine has no fast GEMM of 8-bit numbers that is exact, signed or not.
    peaks: the same by engine, without those that are None.
    copies: bytes moved by a copy and bytes per second, from the smallest to the largest.
    launch_s: seconds of a call that computes one number, by method.
    """

    def __init__(self, rows: pd.DataFrame):
        timed = rows[(rows["state"] == "timed") & (rows["clock"] == "host")]
        self.on_cuda = bool((rows["device"] == "cuda").any())
        roof = timed[timed["axis"] == "roof"]
        self.int8_gmacs = _best_rate(roof[roof["method"].isin([INT8_PEAK, UINT8_PEAK])])
        self.float32_gmacs = _best_rate(roof[roof["method"] == FLOAT32_PEAK])
        peaks = {"int8": self.int8_gmacs, "float32": self.float32_gmacs}
        self.peaks = {engine: rate for engine, rate in peaks.items() if rate is not None}
        if "engine" in rows:
            self.engines = rows.dropna(subset="engine").groupby("method")["engine"].first()
        else:
            by_bytes = "int8" if self.int8_gmacs else "float32"
            self.engines = dict.fromkeys(_BY_BYTES, by_bytes) | {FLOAT32_LAYER: "float32"}
        copy = roof[roof["method"] == COPY]
        seconds = copy.groupby("bytes")["seconds"].min().astype(float).sort_index()
        self.copies = [(float(n), float(n) / s) for n, s in seconds.items()]
        least = timed[timed["axis"] == "least"]
        self.launch_s = least.groupby("method")["seconds"].median().astype(float).to_dict()

    def peak_gmacs(self, method: str) -> float | None:
        """The rate of multiplications that a method can hope for, or None: see `engine` above."""
        return self.peaks.get(self.engines.get(method))

    def gemms(self, method: str) -> int:
        """How many GEMMs of the layer's size a method is.

        CUDA's int8 GEMM takes no bytes without a sign: each such byte becomes two int8 numbers.
        """
        if method not in _TWO_GEMMS:
            return 1
        return 4 if self.on_cuda and self.engines.get(method) == "int8" else 2

    def bandwidth(self, moved: float) -> float:
        """Bytes per second of a copy that moves as much: a small one stays in a cache."""
        return next((rate for size, rate in self.copies if size >= moved), self.copies[-1][1])


def measured_roofs(rows: pd.DataFrame) -> Roofs:
    """The roofs among rows, or a ValueError where there is no large float32 GEMM or no copy."""
    roofs = Roofs(rows)
    if roofs.float32_gmacs is None or not roofs.copies:
        raise ValueError(
            f"the rows have no roof: time {FLOAT32_PEAK!r} and {COPY!r} with the axis 'roof'."
        )
    return roofs


def along(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The lines of a table of rates along one axis, the centre among them, the smallest first."""
    return table[table["axis"].isin([axis, "centre"])].sort_values(SIZES[axis], kind="stable")


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """How the time of each method grows along each axis: as the size to the power of what?

    Returns:
        By method and axis: `exponent`, the slope of log time over log size by least squares; `low`,
        `high` and `last`, the smallest, largest and last slope between neighbours; and `decades`,
        how far the sizes reach. Blank where there is one size only.
    """
    lines = []
    for method in table["method"].unique():
        for axis, name in SIZES.items():
            own = along(table[table["method"] == method], axis)
            size, seconds = np.log10(own[[name, "seconds"]].astype(float).to_numpy()).T
            line = {"method": method, "axis": axis, "sizes": len(own)}
            if len(own) > 1:
                slopes = np.diff(seconds) / np.diff(size)
                line |= {"decades": size[-1] - size[0], "exponent": np.polyfit(size, seconds, 1)[0]}
                line |= {"low": slopes.min(), "high": slopes.max(), "last": slopes[-1]}
            lines.append(line)
    columns = ["method", "axis", "sizes", "decades", "exponent", "low", "high", "last"]
    return pd.DataFrame(lines, columns=columns).set_index(["method", "axis"])


def turning_points(table: pd.DataFrame) -> pd.DataFrame:
    """What limits each method, by axis: "launch up to 4, then memory up to 16, then compute"."""
    lines = {}
    for method in table["method"].unique():
        lines[method] = {}
        for axis, name in SIZES.items():
            own = along(table[table["method"] == method], axis)
            ends = own[own["bound"] != own["bound"].shift(-1)]
            words = [f"{one['bound']} up to {one[name]:,}" for _, one in ends.iloc[:-1].iterrows()]
            lines[method][axis] = ", then ".join([*words, *ends["bound"].iloc[-1:]])
    return pd.DataFrame.from_dict(lines, orient="index")


def _best_rate(rows: pd.DataFrame) -> float | None:
    """The best rate over the sizes, in 10⁹ multiply-accumulates per second."""
    work = rows[list(SIZES.values())].astype(float).prod(axis=1)
    return max(work / rows["seconds"].astype(float) / 1e9, default=None)
