"""Multipliers side by side, and where this machine stops multiplying and starts to look up."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from posmat.layer.problem import ProblemSize, random_operands
from posmat.layer.proof import best_seconds
from posmat.machine import require_device
from posmat.multipliers.product import prepare_inexact, way_of
from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier


def multiplier_table(
    multipliers: Iterable[str | Multiplier], device: str | torch.device = "cpu"
) -> pd.DataFrame:
    """A row for each multiplier, by its name: its error over all pairs, and what it costs.

    Columns: `convention`, those of `Multiplier.statistics`, `rank` (of the error over the operands
    of int8), `gemms` (int8 products that simulate it), `path` (on `device`, for inexact weights).
    """
    device = require_device(device)
    rows = [
        {"multiplier": m.name, "convention": m.convention, **m.statistics()._asdict()}
        | {"rank": m.rank, "gemms": m.gemm.count, "path": way_of(m, device)}
        for m in map(find_multiplier, multipliers)
    ]
    return pd.DataFrame(rows).set_index("multiplier")


def lookup_rank(size: ProblemSize | None = None, device: str | torch.device = "cpu") -> int:
    """The least rank of an error from which a table look-up is faster than GEMMs, on this machine.

    Found by bisection among random tables of 128 x 128, each simulated both ways and timed in
    turn, on one thread of a CPU. It takes half a minute, and is as steady as the machine is; 129 if
    GEMMs are faster at every rank. The layer is of `size`, by default the seed's, on `device`.
    """
    x, w = random_operands(size or ProblemSize(256, 128, 9216), device=device)
    rng, magnitudes = np.random.default_rng(0), np.arange(128)
    looked_up, multiplied = 129, 0  # the least rank known to be, and the largest
    while looked_up - multiplied > 1:
        rank = (looked_up + multiplied) // 2
        error = rng.integers(-99, 100, (rank, 128))[magnitudes % rank]  # few distinct rows
        table = np.outer(magnitudes, magnitudes) + error
        m = Multiplier.from_table(table, "random", "sign-magnitude", "weight, input", check=False)
        ways = {path: prepare_inexact(w, m, path).product for path in ("gemm", "lookup")}
        took = best_seconds(ways, (x,))
        slower = took["lookup"] < took["gemm"]
        looked_up, multiplied = (rank, multiplied) if slower else (looked_up, rank)
    return looked_up
