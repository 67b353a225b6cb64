"""Multipliers side by side, and the rank from which this machine looks up."""

import numpy as np
import torch

import posmat as pm
from posmat.multipliers.compare import lookup_rank, multiplier_table
from posmat.multipliers.table import Multiplier


def test_a_row_for_each_multiplier_has_its_statistics_and_what_it_costs():
    table = np.random.default_rng(0).integers(0, 2**14, (129, 129))
    mine = Multiplier.from_table(table, "mine", "sign-magnitude", "weight, input")
    found = multiplier_table(["truncated", mine, "or_pairs"])
    assert found.index.name == "multiplier" and [*found.index] == ["truncated", "mine", "or_pairs"]
    for multiplier in (mine, pm.find_multiplier("or_pairs")):
        statistics = multiplier.statistics()
        row = found.loc[multiplier.name]
        assert tuple(row[[*statistics._fields]]) == statistics
        assert row["convention"] == multiplier.convention
        assert (row["rank"], row["gemms"]) == (multiplier.rank, multiplier.gemm.count)
    assert found["WCE"].dtype == np.int64 == found["rank"].dtype
    assert found["rank"].tolist() == [2, 129, 1]
    # As a layer is computed: a table of full rank is looked up, whichever engine multiplies here.
    assert found["path"].tolist() == ["gemm", "lookup", "gemm"]
    w = torch.arange(-127, 128, dtype=torch.int8)[None]
    for name, path in found["path"].items():
        multiplier = mine if name == "mine" else name
        assert pm.prepare_inexact(w, multiplier).path == path


def test_the_rank_from_which_a_look_up_is_faster_is_measured():
    found = lookup_rank(pm.ProblemSize(4, 4, 8))
    assert type(found) is int and 1 <= found <= 129
