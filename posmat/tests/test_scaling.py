"""Sizes are refused before they are allocated; growth and roofs come out of rows as they should."""

import math

import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import posmat as pm
from posmat.measure.roofline import COPY, FLOAT32_LAYER, FLOAT32_PEAK, INT8_PEAK, UINT8_PEAK
from posmat.measure.sizes import _container_leaves
from posmat.measure.summary import AGAIN, FLOOR

SEED = pm.ProblemSize(256, 128, 9216)
LAUNCH_S, INT8_RATE, FLOAT32_RATE, BANDWIDTH = 1e-5, 8e11, 1e11, 1e10  # of an invented machine


def row(method, size, seconds, axis, **more):
    sizes = dict(zip(("batch_size", "out_features", "in_features"), size, strict=True))
    common = {"run": 0, "state": "timed", "exact": True, "max_error": None, "round": 0}
    common |= {"number": 1, "cpu_s": seconds, "first_s": seconds, "device": "cpu", "threads": 1}
    common |= {"processor": "A Processor", "torch": "2.0", "dtype": "int8", "clock": "host"}
    return {**common, "method": method, "seconds": seconds, "axis": axis, **sizes, **more}


@pytest.fixture
def rows() -> pd.DataFrame:
    """What a machine would measure that obeys its roofs, with a call's cost added."""
    lines = [
        row(INT8_PEAK, (1024,) * 3, 1024**3 / INT8_RATE, "roof"),
        row(FLOAT32_PEAK, (1024,) * 3, 1024**3 / FLOAT32_RATE, "roof"),
        row(COPY, (None,) * 3, 0.1, "roof", bytes=int(0.1 * BANDWIDTH)),
        row(FLOAT32_LAYER, (1, 1, 1), LAUNCH_S, "least"),
        row("int8_product", (1, 1, 1), LAUNCH_S, "least"),
    ]
    for axis, size in pm.all_sweeps(SEED, limit=2**31, steps=4):
        for method, rate in ((FLOAT32_LAYER, FLOAT32_RATE), ("int8_product", INT8_RATE)):
            sizes = tuple(vars(size).values())
            moved = pm.least_bytes(pd.DataFrame([row(method, sizes, 1, axis)])).item()
            busy = max(size.partial_products / rate, moved / BANDWIDTH)
            lines.append(row(method, sizes, LAUNCH_S + busy, axis))
    sizes = tuple(vars(SEED).values())
    lines.append(row(FLOAT32_LAYER + AGAIN, sizes, 3e-3, "centre"))
    lines.append(row(FLOOR, sizes, 1e-6, "centre"))
    frame = pd.DataFrame(lines)
    frame["bytes"] = frame["bytes"].astype("Int64").fillna(pm.least_bytes(frame))
    return frame.convert_dtypes()


# --- sizes ---------------------------------------------------------------------------------------


def test_a_size_that_does_not_fit_is_refused_with_the_bytes_it_wanted():
    huge = pm.ProblemSize(10**6, 10**6, 10**6)
    with pytest.raises(MemoryError, match=r"batch_size=1,000,000, .*smaller sizes") as caught:
        pm.require_memory(huge)
    assert f"{pm.wanted_bytes(huge):,} bytes" in str(caught.value)
    with pytest.raises(MemoryError):
        pm.all_sweeps(huge)
    wanted = pm.wanted_bytes(SEED)
    pm.require_memory(SEED, free=wanted)
    with pytest.raises(MemoryError, match=f"{wanted - 1:,} are free"):
        pm.require_memory(SEED, free=wanted - 1)


def along_axis(name, **options):
    return [size for axis, size in pm.all_sweeps(SEED, **options) if axis in (name, "centre")]


def test_automatic_sizes_stay_within_the_limit_and_reach_both_ways():
    limit = pm.wanted_bytes(pm.ProblemSize(4096, 128, 9216))
    sizes = along_axis("M", limit=limit)
    assert [size.batch_size for size in sizes] == [1, 4, 16, 64, 256, 1024, 4096]
    assert {(size.out_features, size.in_features) for size in sizes} == {(128, 9216)}
    assert along_axis("M", limit=limit - 1) == sizes[:-1]
    assert along_axis("M", limit=limit, steps=1) == sizes[3:6]
    # The centre was asked for, so it is there also where no larger size may be.
    assert along_axis("K", limit=0)[-1] == SEED


def test_all_sweeps_begin_with_the_least_work_and_share_the_centre():
    sizes = pm.all_sweeps(SEED, limit=2**31)
    work = [size.partial_products for _, size in sizes]
    assert work == sorted(work) and len({size for _, size in sizes}) == len(sizes)
    assert [size for axis, size in sizes if axis == "centre"] == [SEED]
    for axis in "MNK":
        own = [size.partial_products for size in along_axis(axis, limit=2**31)]
        assert max(own) / min(own) >= 1000  # three decades of work


def test_the_wanted_bytes_are_enough_for_every_method():
    size = pm.ProblemSize(512, 256, 2048)
    forms = {"layer": pm.linear_product, "reference": pm.integer_product}
    forms |= {"positive": pm.positive_matrix_product, "element-wise": pm.elementwise_product}
    rows = pm.peak_memory(forms, size, device="cpu")
    assert list(rows["method"]) == list(forms) and (rows["in_features"] == 2048).all()
    if (rows["state"] == "measured").all():
        operands = 512 * 2048 + 256 * 2048
        assert (rows["peak_bytes"] + operands <= pm.wanted_bytes(size)).all()
        peaks = rows.set_index("method")["peak_bytes"]
        assert peaks["layer"] >= 4 * operands  # float32 copies of both
        assert peaks["positive"] >= 3 * 256 * 2048  # the parts of W


def test_free_bytes_heed_the_limit_of_a_container(tmp_path):
    assert pm.free_bytes("cpu") > 2**20
    (tmp_path / "memory.stat").write_text("anon 350\nfile 550\ninactive_file 500\n")
    # What is kept of files does not count as used.
    for limit, used, left in ((1000, 900, 600), (1000, 1900, 0), ("max", 900, math.inf)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert _container_leaves(str(tmp_path)) == left
    assert _container_leaves(str(tmp_path / "none")) == math.inf


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_bytes_of_a_cuda_device():
    before = pm.free_bytes("cuda")
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert pm.free_bytes("cuda") <= before - held.numel()


def test_expected_seconds_go_by_the_next_smaller_size():
    lines = [row("a", (1, 1, 10), 1.0, "K"), row("a", (1, 1, 100), 2.0, "K")]
    timed = pd.DataFrame(lines).convert_dtypes()
    for length, seconds in ((400, 8.0), (50, 5.0), (5, 0)):
        found = pm.expected_seconds(timed, "a", pm.ProblemSize(1, 1, length))
        assert found == pytest.approx(seconds)
    for rows in (timed, pd.DataFrame()):
        assert pm.expected_seconds(rows, "b", pm.ProblemSize(1, 1, 400)) == 0


# --- growth and roofs ----------------------------------------------------------------------------


def test_least_bytes_count_operands_and_results_once():
    frame = pd.DataFrame([row(name, (2, 3, 5), 1, "M") for name in ("int8_product", FLOAT32_LAYER)])
    assert pm.least_bytes(frame).tolist() == [2 * 5 + 3 * 5 + 4 * 6, 4 * (2 * 5 + 3 * 5 + 6)]


def test_the_roofs_are_found_among_the_rows(rows):
    roofs = pm.measured_roofs(rows)
    assert roofs.int8_gmacs * 1e9 == pytest.approx(INT8_RATE)
    assert roofs.float32_gmacs * 1e9 == pytest.approx(FLOAT32_RATE)
    assert roofs.bandwidth(1) == roofs.bandwidth(1e15) == pytest.approx(BANDWIDTH)
    with pytest.raises(ValueError, match="no roof"):
        pm.measured_roofs(rows[rows["method"] != COPY])
    # A small problem meets the bandwidth of a small copy.
    small = pd.DataFrame([row(COPY, (None,) * 3, 1e-6, "roof", bytes=100_000)])
    roofs = pm.measured_roofs(pd.concat([rows, small]).convert_dtypes())
    assert roofs.bandwidth(99_999) == roofs.bandwidth(100_000) == pytest.approx(1e11)
    assert roofs.bandwidth(100_001) == pytest.approx(BANDWIDTH)


def test_no_rate_of_a_machine_that_obeys_its_roofs_is_above_them(rows):
    table = pm.rates(rows)
    assert set(table["method"]) == {FLOAT32_LAYER, "int8_product"}  # no control, no roof
    peak = table["method"].map({FLOAT32_LAYER: FLOAT32_RATE, "int8_product": INT8_RATE}) / 1e9
    slope = table["intensity"] * BANDWIDTH / 2 / 1e9
    assert (table["gmacs"] <= peak).all() and (table["gmacs"] <= slope).all()
    assert (table["share"] <= 1).all() and (table["share"] > 1 / 3).all()
    assert len(pm.along(table[table["method"] == FLOAT32_LAYER], "M")) == 8


def test_what_limits_a_method_changes_where_the_arithmetic_says(rows):
    turns = pm.turning_points(pm.rates(rows))
    # One row of X: 1.2 MB of weights take 0.12 ms, their products 1.5 µs, a call 10 µs.
    assert turns.loc["int8_product", "M"] == "memory up to 64, then compute"
    # K = 36: 13 kB and 0.13 MB of results in 15 µs, 1.2 million products in 1.5 µs.
    assert turns.loc["int8_product", "K"].startswith("memory up to ")
    assert turns.loc[FLOAT32_LAYER, "K"].endswith("compute")


def test_exponents_of_a_power_law_and_of_a_constant(rows):
    table = pm.rates(rows)
    table["seconds"] = table["in_features"].astype(float) ** 1.5
    found = pm.exponents(table)
    line = found.loc[("int8_product", "K")]
    assert line[["exponent", "low", "high", "last"]].tolist() == pytest.approx([1.5] * 4)
    assert line["decades"] == pytest.approx(math.log10(4) * (line["sizes"] - 1))
    assert found.loc[("int8_product", "M"), "exponent"] == pytest.approx(0, abs=1e-9)


def test_a_time_of_which_no_limit_is_half_is_unexplained(rows):
    slow = rows[rows["method"] == "int8_product"].assign(method="slow")
    slow["seconds"] = slow["seconds"] * 2.1
    slow.loc[slow["axis"] == "least", "seconds"] = LAUNCH_S
    table = pm.rates(pd.concat([rows, slow], ignore_index=True))
    assert set(table[table["method"] == "slow"]["bound"]) == {"unexplained"}


@pytest.mark.parametrize("figure_id", ["scaling", "roofline"])
def test_the_figures_name_every_method_and_no_control(rows, figure_id):
    figure = pm.draw_figure(figure_id, rows)
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {FLOAT32_LAYER, "int8_product"} <= texts and FLOAT32_LAYER + AGAIN not in texts
    assert any(text.endswith(", one of the three varied at a time") for text in texts)
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    assert "A Processor" in figure.caption
    if figure_id == "roofline":
        assert {"8-bit\n1,600", "float32\n200", "rate [GOP/s]"} <= texts
        rows = rows[~rows["method"].isin([INT8_PEAK, "int8_product"])]
        assert pm.measured_roofs(rows).int8_gmacs is None
        texts = {text.get_text() for text in pm.draw_figure("roofline", rows).axes[0].texts}
        assert "float32\n200" in texts and not any(text.startswith("8-bit") for text in texts)


def test_the_roof_of_magnitudes_where_int8_by_int8_is_refused(rows):
    """Without VNNI int8_product is not exact, and one_sided_product runs on 8-bit numbers still."""
    rows = rows[rows["method"] != "int8_product"].copy()
    rows.loc[rows["method"] == INT8_PEAK, ["state", "seconds"]] = ["not available", None]
    magnitudes = pd.DataFrame([row(UINT8_PEAK, (1024,) * 3, 1024**3 / INT8_RATE, "roof")])
    roofs = pm.measured_roofs(pd.concat([rows, magnitudes], ignore_index=True).convert_dtypes())
    names = ("one_sided_product", "positive_matrix_product", FLOAT32_LAYER)
    peaks = [1e9 * roofs.peak_gmacs(name) for name in names]
    assert peaks == pytest.approx([INT8_RATE, INT8_RATE, FLOAT32_RATE])
    without = pm.measured_roofs(rows).peak_gmacs("one_sided_product")
    assert 1e9 * without == pytest.approx(FLOAT32_RATE)


def test_a_methods_roof_is_the_peak_of_what_multiplies_in_it(rows):
    """PyTorch's int8 loop and an element-wise form have no peak, and no share of one is said."""
    engines = {FLOAT32_LAYER: "float32", "int8_product": "loop", "two_sided": "float32"}
    layer = rows[rows["method"] == FLOAT32_LAYER]
    rows = pd.concat([rows, *(layer.assign(method=name) for name in ("two_sided", "by hand"))])
    rows = rows.assign(engine=rows["method"].map(engines)).convert_dtypes()
    roofs = pm.measured_roofs(rows)
    peaks = [roofs.peak_gmacs(name) for name in (*engines, "by hand")]
    assert peaks == [roofs.float32_gmacs, None, roofs.float32_gmacs, None]
    table = pm.rates(rows).set_index("method")
    without = table.loc[["int8_product", "by hand"]]
    assert without["compute_s"].isna().all() and "compute" not in set(without["bound"])
    two_gemms = pm.rates(rows.replace({"method": {"two_sided": "positive_matrix_product"}}))
    two_gemms = two_gemms.set_index("method").loc["positive_matrix_product", "compute_s"]
    assert two_gemms.to_numpy() == pytest.approx(2 * table.loc["two_sided", "compute_s"].to_numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda():
    forms = {"layer": pm.linear_product, "gemm": pm.int8_product}
    sizes = [pm.ProblemSize(512, 256, 1024), pm.ProblemSize(64, 32, 512)]
    rows = pm.peak_memory(forms, dict.fromkeys(forms, sizes), device="cuda")
    assert (rows["state"] == "measured").all() and len(rows) == 4
    for line in rows.to_dict("records"):
        M, N, K = line["batch_size"], line["out_features"], line["in_features"]
        assert line["operand_bytes"] == M * K + N * K
        if line["method"] == "layer":
            # float32 copies of both operands, the result, and what cuBLAS may want to work in
            assert line["peak_bytes"] >= 4 * (M * K + N * K + M * N)
        else:
            assert 4 * M * N <= line["peak_bytes"] < 4 * (M * N + M * K)
