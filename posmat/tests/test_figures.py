import hashlib
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from posmat.charts.catalogue import FIGURES, draw_figure, figure_number, find_figure
from posmat.charts.sizes import _label_slopes
from posmat.charts.style import (
    ALT_LENGTH,
    COLOURS,
    Chart,
    as_text,
    contrast,
    in_words,
    medians,
)
from posmat.measure.files import project_root
from posmat.measure.summary import AGAIN, FLOOR
from posmat.report.store import OWN, find_drawings, find_results


@pytest.fixture
def rows() -> pd.DataFrame:
    times = {"layer": 4e-3, "by hand": 0.17, "layer" + AGAIN: 4e-3, FLOOR: 7e-7}
    lines = [
        {"run": 0, "method": method, "state": "timed", "exact": True, "max_error": None}
        | {"round": index, "number": 2, "seconds": base * (1 + index / 100), "cpu_s": base}
        | {"first_s": base, "device": "cpu", "processor": "A Processor", "torch": "2.0"}
        | {"dtype": "int8", "batch_size": 8, "out_features": 4, "in_features": 2, "threads": 1}
        | {"clock": "host"}
        for method, base in times.items()
        for index in range(9)
    ]
    lines.append(lines[0] | {"method": "gone", "state": "not supported", "seconds": None})
    return pd.DataFrame(lines).convert_dtypes()


def test_ids_are_unique_and_without_numbers():
    ids = [spec.id for spec in FIGURES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in ids)
    assert figure_number("matvec-vs-elementwise") == 1  # the list is only appended to
    assert figure_number("positive-matrix-product") == 2


def test_an_unknown_id_is_refused_with_a_near_one():
    with pytest.raises(KeyError, match="positive-matrix-product"):
        find_figure("positive-matrix")


def test_the_same_rows_give_the_same_bytes(rows, tmp_path):
    digests = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        figure = draw_figure("positive-matrix-product", rows)
        figure.write("positive-matrix-product", "ab12", folder, "-m-cpu")
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
        )
    assert digests[0] == digests[1] and len(digests[0]) == 3


def test_id_caption_and_hash_are_inside(rows, tmp_path):
    figure = draw_figure("positive-matrix-product", rows)
    figure.write("positive-matrix-product", "ab12", tmp_path, "")
    caption = find_figure("positive-matrix-product").caption(rows)
    svg = (tmp_path / "positive-matrix-product.svg").read_text()
    assert "rows sha256 ab12" in svg and "positive-matrix-product" in svg and caption in svg
    png = (tmp_path / "positive-matrix-product.png").read_bytes()
    assert b"rows sha256 ab12" in png and b"A Processor" in png
    pdf = (tmp_path / "positive-matrix-product.pdf").read_bytes()
    assert b"rows sha256 ab12" in pdf


def test_the_chart_names_every_method_and_its_state(rows):
    axes = draw_figure("positive-matrix-product", rows).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"layer", "by hand", "gone", "not supported", "layer" + AGAIN} <= set(texts)
    assert FLOOR not in texts  # 6,000 times below the rest: the axis would show little else
    assert axes.get_xscale() == "log" and "[ms]" in axes.get_xlabel()
    assert not axes.patches  # dots, no bars


def test_a_baseline_without_a_time_leaves_times_without_ratios(rows):
    rows = rows.assign(method=rows["method"].replace({"layer": "W @ x", "by hand": "W * x"}))
    rows["method"] = rows["method"].replace({"layer" + AGAIN: "W @ x" + AGAIN})
    gone = rows["method"].isin(["W @ x", "W @ x" + AGAIN])
    rows.loc[gone, ["state", "seconds"]] = ["not supported", None]
    axes = draw_figure("matvec-vs-elementwise", rows).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert "177 ms" in texts and "not supported" in texts and not any("×" in t for t in texts)
    said = draw_figure("matvec-vs-elementwise", rows).alt
    assert "W @ x: not supported; W * x 177 ms; W @ x (again): not supported; gone" in said


def test_a_baseline_without_a_time_leaves_the_others_theirs(rows):
    untimed = rows["method"].isin(["layer", "layer" + AGAIN])
    rows.loc[untimed, ["state", "seconds"]] = ["not supported", pd.NA]
    texts = [text.get_text() for text in draw_figure("positive-matrix-product", rows).axes[0].texts]
    assert texts.count("not supported") == 3 and any(text.endswith(" ms") for text in texts)


def test_charts_of_ratios_show_what_was_measured_and_the_noise(rows):
    axes = draw_figure("gemm-speedup", rows.assign(part="formulations")).axes[0]
    texts = [text.get_text() for text in axes.texts]  # 4 ms over 170 ms; the control's line
    assert texts[::2] == ["by hand", "layer" + AGAIN]
    assert texts[1].startswith("0.0235× (") and texts[3] == "1.000× (1.000 to 1.000)"


def test_a_method_whose_numbers_are_wrong_is_marked_so(rows):
    whole = rows.assign(part="formulations", error_bound=pd.NA)
    inexact, far, nan = whole.copy(), whole.copy(), whole.copy()
    by_hand = rows["method"] == "by hand"
    inexact.loc[by_hand, "exact"] = False
    far.loc[by_hand, ["exact", "max_error", "error_bound"]] = [pd.NA, 550.0, 6.75]
    nan.loc[by_hand, ["exact", "max_error", "error_bound"]] = [pd.NA, pd.NA, 6.75]
    for wrong in (inexact, far, nan):
        for figure_id in ("linear-vs-manual", "gemm-speedup"):
            figure = draw_figure(figure_id, wrong)
            assert "by hand (wrong)" in [text.get_text() for text in figure.axes[0].texts]
            assert hollow(figure.axes[0]) == 1
            assert "wrong" in figure.caption and "by hand (wrong)" in figure.alt
    right = whole.copy()
    right.loc[by_hand, ["exact", "max_error", "error_bound"]] = [pd.NA, 1e-4, 6.75]
    figure = draw_figure("linear-vs-manual", right)
    assert not hollow(figure.axes[0]) and "wrong" not in figure.caption + figure.alt


def hollow(axes) -> int:
    return sum(line.get_markerfacecolor() == "white" for line in axes.lines)


def test_words_say_what_is_shown_and_counted(rows):
    figure = draw_figure("positive-matrix-product", rows)
    assert FLOOR not in figure.alt  # the chart leaves it out
    assert "(9 rounds in one fresh kernel)" in figure.caption and "× is" in figure.caption
    untimed = rows["method"].isin(["layer", "layer" + AGAIN])
    rows.loc[untimed, ["state", "seconds", "round"]] = ["not supported", pd.NA, pd.NA]
    caption = draw_figure("positive-matrix-product", rows).caption
    assert "(9 rounds in" in caption and "×" not in caption and "layer has no time" in caption
    figure = draw_figure("gemm-speedup", rows.assign(part="formulations"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 1 and "layer has no time" in texts[0]
    rows.loc[:, ["state", "seconds", "round"]] = ["not supported", pd.NA, pd.NA]
    assert "nothing was timed" in draw_figure("positive-matrix-product", rows).caption


def test_a_method_that_was_timed_in_some_runs_says_so(rows):
    gone = rows[rows["method"] == "by hand"].head(1).assign(run=0, state="not supported")
    gone[["seconds", "round"]] = pd.NA
    runs = [rows[rows["method"] != "by hand"], gone, rows.assign(run=1), rows.assign(run=2)]
    several = pd.concat(runs, ignore_index=True).assign(part="formulations")
    texts = [t.get_text() for t in draw_figure("linear-vs-manual", several).axes[0].texts]
    assert "177 ms   42.5×, in 2 of 3 runs" in texts
    assert "9 rounds in each of 3 fresh kernels" in draw_figure("linear-vs-manual", several).caption
    alt = draw_figure("gemm-speedup", several).alt
    assert "by hand 177 ms (42.5 times), in 2 of 3 runs" in alt


@pytest.fixture
def times() -> pd.DataFrame:
    then = {"clock": "time.time", "where": "2020, cuda", "device": "cuda", "machine": "2020"}
    now = {"clock": "host", "where": "m, cpu", "device": "cpu", "machine": "m"}
    seed = {"clock": "seed (wall)", "where": "m, cpu", "device": "cpu", "machine": "m"}
    lines = [
        then | {"method": "a", "milliseconds": 3.0},
        now | {"method": "a", "milliseconds": 2.0},
        seed | {"method": "a", "milliseconds": 9.0},
        then | {"method": "b", "milliseconds": 3.0, "where": "2020, cpu", "device": "cpu"},
        now | {"method": "b", "milliseconds": 0.5},
    ]
    return pd.DataFrame([{"section": 1, "dtype": "int8"} | line for line in lines]).convert_dtypes()


def test_then_and_now_says_what_stands_between_the_marks_beside_the_years(times):
    figure = draw_figure("then-and-now", times)
    assert "Some of the clocks of 2020 did not wait" in figure.caption
    assert "On 1 of the 2 lines the devices differ, cuda in 2020 beside m, cpu" in figure.caption
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["a, int8 (2020 on cuda)", "b, int8"]
    old = times["machine"] == "2020"
    known = times.assign(
        synchronised=["no", "", "yes", "not needed", ""],
        q25_milliseconds=(times["milliseconds"] * 0.9).mask(old),
        q75_milliseconds=(times["milliseconds"] * 1.2).mask(old),
        processor=["", "A Processor", "A Processor", "", "A Processor"],
        torch=["", "2.13.0", "2.13.0", "", "2.13.0"],
    )
    figure = draw_figure("then-and-now", known)
    axes = figure.axes[0]
    assert hollow(axes) == 1 and "Hollow marks are of a clock that did not" in figure.caption
    assert "m, cpu (A Processor, PyTorch 2.13.0), with the quartiles as lines" in figure.caption
    whiskers = [line for line in axes.lines if len(line.get_ydata()) == 2 == len(line.get_xdata())]
    ends = [tuple(line.get_xdata()) for line in whiskers if len(set(line.get_ydata())) == 1]
    assert ends[-2:] == [pytest.approx((1.8, 2.4)), pytest.approx((0.45, 0.6))]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2020, cuda, clock did not wait", "2020, cpu", "m, cpu"]
    assert "a, int8, 2020, cuda 3.00; a, int8, m, cpu 2.00; b, int8, 2020, cpu 3.00" in figure.alt


def errors_of(**tables: np.ndarray) -> pd.DataFrame:
    return pd.concat(
        pd.DataFrame(table).rename(columns=str).assign(multiplier=name, weight=range(len(table)))
        for name, table in tables.items()
    )


def test_a_map_of_errors_goes_from_light_to_dark(rows):
    below, mixed = -np.eye(8), np.eye(8) - np.eye(8)[::-1]
    for tables, ends in (
        ({"m": below, "n": np.zeros((8, 8))}, ["exact", "the worst, too small"]),
        ({"m": below, "n": -below}, ["exact", "the worst"]),
        ({"m": below, "n": mixed}, ["too small", "exact", "too large"]),
    ):
        figure = draw_figure("error-tables", errors_of(**tables))
        image = figure.axes[0].images[0]
        shades = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in image.cmap(range(256))]
        steps = np.diff(shades)
        assert (steps <= 1e-3).all() or (steps >= -1e-3).all()
        labels = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
        assert labels == ends
    assert draw_figure("error-tables", errors_of(m=below)).alt.endswith(": m 0 (−1.00 to 0).")


def test_contrast_is_that_of_wcag():
    assert contrast("white") == pytest.approx(1) and contrast("black") == pytest.approx(21)
    assert contrast("#767676") == pytest.approx(4.54, abs=0.01)
    assert all(contrast(as_text(colour)) >= 4.5 for colour in COLOURS)
    assert as_text("#222222") == "#222222"


def published() -> list:
    root = project_root()
    drawings = find_drawings(find_results(root)) if root and (root / "data").is_dir() else []
    return [one for one in drawings if one.run.machine not in OWN]


@pytest.mark.parametrize("drawing", published() or [None], ids=lambda one: getattr(one, "name", ""))
def test_a_published_figure_can_be_read_and_says_what_it_shows(drawing):
    if drawing is None:
        pytest.skip("nothing is published here")
    figure = draw_figure(drawing.id, *map(drawing.run.read, drawing.kinds))
    assert figure.alt != figure.caption and re.search(r"\d", figure.alt)
    assert figure.alt.endswith(".") and figure.caption.endswith(".")
    assert len(figure.alt) < 2 * ALT_LENGTH and not re.search(r"nan|None|<NA>", figure.alt)
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            assert contrast(text.get_color()) >= 4.5, text.get_text()
            assert text.get_fontsize() >= 6.5, text.get_text()


def test_a_chart_in_words_tells_its_first_lines_and_how_many_more():
    def line(name: str) -> dict:
        return {"method": name, "seed": 0, "percent": 97.0}

    frame = pd.DataFrame([line("a") | {"percent": 95.0}, line("a") | {"percent": 96.0}, line("b")])
    table = medians(["method"], {"percent": "percent"})
    assert in_words("A kind", table(frame)) == "A kind: a 95.5 (95.0 to 96.0); b 97.0."
    both = medians(["method", "seed"], {"percent": "share", "seed": "number"}, lambda of: of[:1])
    assert in_words("A kind", both(frame.astype({"seed": str}))) == (
        "A kind: a, 0: share 95.0, number 0."
    )
    many = pd.DataFrame([line(f"{'long ' * 20}{number}") for number in range(9)])
    said = in_words("A kind", table(many))
    assert said.endswith("2 97.0; and 6 more.") and len(said) < ALT_LENGTH
    assert in_words("A kind", table(many[:0])) == "A kind: nothing to show."


def test_what_is_written_on_a_slope_is_struck_through_by_no_point():
    slopes, points = [(2e9, 14e9)], pd.DataFrame({"intensity": [0.5, 1, 2], "gflops": [7, 14, 25]})
    figure = Chart(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(0.3, 500), ylim=(1, 3000))
    _label_slopes(axes, slopes, points)
    (text,) = axes.texts
    angle = np.radians(text.get_rotation())
    start = axes.transData.transform(text.get_position())
    away = axes.transData.transform(points.to_numpy()) - start
    u, v = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ away.T
    text.set_rotation(0)
    box = text.get_window_extent()
    assert not ((u > 0) & (u < box.width) & (v > 0) & (v < box.height)).any()
