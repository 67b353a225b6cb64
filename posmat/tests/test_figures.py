import re
from itertools import product

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Axis
from matplotlib.text import Text
from seaborn.utils import relative_luminance

from posmat.charts.catalogue import FIGURES, draw_figure, figure_number, find_figure
from posmat.charts.style import ALT_LENGTH, STYLE, in_words, medians
from posmat.measure.files import project_root
from posmat.measure.summary import AGAIN, FLOOR
from posmat.report.store import OWN, find_drawings, find_results
from posmat.tests.sample import MACHINES, make_rows
from posmat.tests.test_summary import rows_of


@pytest.fixture
def rows() -> pd.DataFrame:
    times = {"layer": 4e-3, "by hand": 0.17, "layer" + AGAIN: 4e-3, FLOOR: 7e-7}
    rounds = {name: [base * (1 + i / 100) for i in range(9)] for name, base in times.items()}
    facts = {"processor": "A Processor", "torch": "2.0", "dtype": "int8", "number": 2}
    found = rows_of(rounds, **facts, batch_size=8, out_features=4, in_features=2)
    gone = found.head(1).assign(method="gone", state="not supported", seconds=pd.NA)
    return pd.concat([found, gone], ignore_index=True)


def test_ids_are_unique_and_without_numbers():
    ids = [spec.id for spec in FIGURES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in ids)
    assert figure_number("matvec-vs-elementwise") == 1  # the list is only appended to
    assert figure_number("positive-matrix-product") == 2
    with pytest.raises(KeyError, match="positive-matrix-product"):
        find_figure("positive-matrix")


def test_the_same_rows_give_the_same_bytes_with_id_caption_and_hash(rows, tmp_path):
    figure_id, kept = "positive-matrix-product", []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        figure = draw_figure(figure_id, rows)
        figure.write(figure_id, "ab12", tmp_path / name, "-m-cpu")
        kept.append({path.suffix: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert kept[0] == kept[1] and set(kept[0]) == {".svg", ".pdf", ".png"}
    assert all(b"rows sha256 ab12" in one for one in kept[0].values())
    assert all(figure_id.encode() in one for one in kept[0].values())
    assert figure.caption in kept[0][".svg"].decode() and b"A Processor" in kept[0][".png"]


def test_the_chart_names_every_method_and_its_state(rows):
    figure = draw_figure("positive-matrix-product", rows)
    axes, texts = figure.axes[0], texts_of(figure.axes[0])
    assert {"layer", "by hand", "gone", "not supported", "layer" + AGAIN} <= set(texts)
    # 6,000 times below the rest: the axis would show little else.
    assert FLOOR not in texts and FLOOR not in figure.alt
    assert axes.get_xscale() == "log" and "[ms]" in axes.get_xlabel()
    assert not axes.patches  # dots, no bars
    assert "(9 rounds in one fresh process)" in figure.caption and "× is" in figure.caption


def test_a_baseline_without_a_time_leaves_times_without_ratios(rows):
    untimed = rows["method"].isin(["layer", "layer" + AGAIN])
    rows.loc[untimed, ["state", "seconds", "round"]] = ["not supported", pd.NA, pd.NA]
    figure = draw_figure("positive-matrix-product", rows)
    texts = texts_of(figure.axes[0])
    assert "177 ms" in texts and texts.count("not supported") == 3
    assert "×" not in "".join(texts) + figure.caption and "layer has no time" in figure.caption
    assert (
        "layer: not supported; by hand 177 ms; gone: not supported; layer (again): not"
        in figure.alt
    )
    figure = draw_figure("gemm-speedup", rows.assign(part="formulations"))
    (text,) = figure.axes[0].texts
    assert "layer has no time" in text.get_text() and "layer has no time" in figure.caption
    rows.loc[:, ["state", "seconds", "round"]] = ["not supported", pd.NA, pd.NA]
    assert "nothing was timed" in draw_figure("positive-matrix-product", rows).caption


def test_charts_of_ratios_show_what_was_measured_and_the_noise(rows):
    axes = draw_figure("gemm-speedup", rows.assign(part="formulations")).axes[0]
    texts = texts_of(axes)  # 4 ms over 170 ms; the control's line
    assert texts[:-1:2] == ["by hand", "layer" + AGAIN]
    assert texts[1].startswith("0.0235× (") and texts[3] == "1.000× (1.000 to 1.000)"


def test_a_method_whose_numbers_are_wrong_is_marked_so(rows):
    found = rows.assign(part="formulations", error_bound=pd.NA)
    place = rows["method"] == "by hand", ["exact", "max_error", "error_bound"]
    for wrong in ([False, pd.NA, pd.NA], [pd.NA, 550.0, 6.75], [pd.NA, pd.NA, 6.75]):
        found.loc[place] = wrong
        for figure_id in ("linear-vs-manual", "gemm-speedup"):
            figure = draw_figure(figure_id, found)
            assert "by hand (wrong)" in texts_of(figure.axes[0])
            assert hollow(figure.axes[0]) == 1
            assert "wrong" in figure.caption and "by hand (wrong)" in figure.alt
    found.loc[place] = [pd.NA, 1e-4, 6.75]
    figure = draw_figure("linear-vs-manual", found)
    assert not hollow(figure.axes[0]) and "wrong" not in figure.caption + figure.alt


def test_operands_of_two_dtypes_are_both_named_but_not_that_of_a_call_alone(rows):
    rows["dtype"] = rows["method"].map({"by hand": "int8", FLOOR: "float64"}).fillna("float32")
    rows = rows.assign(part="formulations")
    figure = draw_figure("gemm-speedup", rows)
    assert "PyTorch 2.0), int8 and float32 operands, batch_size=8" in figure.caption
    (where,) = (text for text in texts_of(figure.axes[0]) if "M = 8" in text)
    assert "A, cpu · int8 and float32 · 1 thread" in where
    figure = draw_figure("linear-vs-manual", rows[rows["method"] != "by hand"])
    assert ", float32 operands" in figure.caption


def test_a_range_is_told_as_an_interval_from_five_processes(rows):
    runs = [rows.assign(run=run, part="formulations") for run in range(6)]
    for number, words in {
        4: "",
        5: ", a 94 % interval for the median process",
        6: ", a 97 %",
    }.items():
        said = draw_figure("gemm-speedup", pd.concat(runs[:number])).caption
        assert f"the range over {number} fresh processes{words}" in said
        assert ("interval for the median" in said) == bool(words)


def test_lines_are_sorted_by_time_between_the_baseline_and_the_controls(rows):
    faster = rows[rows["method"] == "by hand"].assign(method="faster")
    near = rows["method"] == FLOOR
    rows.loc[near, "seconds"] = rows.loc[near, "seconds"] * 4000
    faster["seconds"] = faster["seconds"] / 1000
    said = texts_of(draw_figure("magnitude", pd.concat([rows, faster])).axes[0])
    assert said[:-1:2] == ["layer", "faster", "by hand", "gone", "layer" + AGAIN, FLOOR]


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def hollow(axes) -> int:
    return sum(line.get_markerfacecolor() == "white" for line in axes.lines)


def test_a_method_that_was_timed_in_some_runs_says_so(rows):
    gone = rows[rows["method"] == "by hand"].head(1).assign(run=0, state="not supported")
    gone[["seconds", "round"]] = pd.NA
    runs = [rows[rows["method"] != "by hand"], gone, rows.assign(run=1), rows.assign(run=2)]
    several = pd.concat(runs, ignore_index=True).assign(part="formulations")
    figure = draw_figure("linear-vs-manual", several)
    assert "177 ms\u200342.5×, in 2 of 3 runs" in texts_of(figure.axes[0])
    assert "9 rounds in each of 3 fresh processes" in figure.caption
    said = "by hand 177 ms (42.5 times), in 2 of 3 runs"
    assert said in figure.alt and said in draw_figure("gemm-speedup", several).alt


@pytest.fixture
def times() -> pd.DataFrame:
    here = {"processor": "A Processor", "torch": "2.13.0"}
    then = {"clock": "time.time", "where": "2020, cuda", "device": "cuda", "synchronised": "no"}
    now = {"clock": "host", "where": "m, cpu", "device": "cpu"} | here
    lines = [
        then | {"method": "a", "milliseconds": 3.0},
        now | {"method": "a", "milliseconds": 2.0},
        now | {"method": "a", "milliseconds": 9.0, "clock": "seed (wall)", "synchronised": "yes"},
        then
        | {"method": "b", "milliseconds": 3.0, "where": "2020, cpu", "device": "cpu"}
        | {"synchronised": "not needed"},
        now | {"method": "b", "milliseconds": 0.5},
    ]
    rows = pd.DataFrame([{"section": 1, "dtype": "int8"} | line for line in lines])
    for name, factor in (("q25_milliseconds", 0.9), ("q75_milliseconds", 1.2)):
        rows[name] = (factor * rows["milliseconds"]).where(rows["clock"] == "host")
    return rows.convert_dtypes()


def test_then_and_now_says_what_stands_between_the_marks_beside_the_years(times):
    figure = draw_figure("then-and-now", times)
    axes = figure.axes[0]
    assert "Round marks are CPUs, square ones GPUs." in figure.caption
    marks = {line.get_label(): line.get_marker() for line in axes.get_legend().legend_handles}
    assert marks == {"2020, cuda, clock did not wait": "s", "2020, cpu": "o", "m, cpu": "o"}
    assert texts_of(axes) == ["a, int8", "b, int8"]
    assert hollow(axes) == 1 and "Hollow marks are of a clock that did not" in figure.caption
    assert "m, cpu (A Processor, PyTorch 2.13.0), with the quartiles as lines" in figure.caption
    whiskers = [line for line in axes.lines if len(line.get_ydata()) == 2 == len(line.get_xdata())]
    ends = [tuple(line.get_xdata()) for line in whiskers if len(set(line.get_ydata())) == 1]
    assert ends[-2:] == [pytest.approx((1.8, 2.4)), pytest.approx((0.45, 0.6))]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2020, cuda, clock did not wait", "2020, cpu", "m, cpu"]
    assert "a, int8, 2020, cuda 3.00; a, int8, m, cpu 2.00; b, int8, 2020, cpu 3.00" in figure.alt


def test_maps_of_errors_share_a_scale_that_darkens_to_both_sides():
    tables = [
        pd.DataFrame(table).rename(columns=str).assign(multiplier=name, weight=range(8))
        for name, table in (("m", -64 * np.eye(8)), ("n", 4 * np.eye(8)), ("o", np.zeros((8, 8))))
    ]
    figure = draw_figure("error-tables", pd.concat(tables))
    maps = [axes.images[0] for axes in figure.axes[:3]]
    errors = np.array([-64, -4, 0, 4, 64])
    for image in maps:
        shades = [relative_luminance(shade) for shade in image.cmap(image.norm(errors))]
        assert np.argsort(shades).tolist() in ([0, 4, 1, 3, 2], [4, 0, 3, 1, 2])
    *_, bar = figure.axes
    figure.draw_without_rendering()
    said = [label.get_text() for label in bar.get_xticklabels()]
    assert said == ["−64", "−16", "0", "16", "64"]
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["m\n12 % wrong\nworst −64", "n\n12 % wrong\nworst 4"]
    assert figure.alt.endswith(": m 0 (−64.0 to 0); n 0 (0 to 4.00); o 0.")


def contrast(colour: str) -> float:
    """With white, as WCAG 2 computes it: 1 for white, 21 for black."""
    return 1.05 / (relative_luminance(colour) + 0.05)


def published() -> list:
    root = project_root()
    drawings = find_drawings(find_results(root)) if root and (root / "data").is_dir() else []
    return [one for one in drawings if one.run.machine not in OWN]


@pytest.mark.parametrize("drawing", published(), ids=lambda one: one.name)
def test_a_published_figure_can_be_read_and_says_what_it_shows(drawing):
    figure = draw_figure(drawing.id, *map(drawing.run.read, drawing.kinds))
    assert figure.alt != figure.caption and re.search(r"\d", figure.alt)
    assert figure.alt.endswith(".") and figure.caption.endswith(".")
    assert len(figure.alt) < 2 * ALT_LENGTH and not re.search(r"nan|None|<NA>", figure.alt)
    assert_fits_a_column(figure)


def assert_fits_a_column(figure) -> None:
    """Printed as wide as a column: large enough, within the picture, and no text over another."""
    assert figure.get_figwidth() <= 3.5
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
    boxes, beyond = [], set()
    for axis in figure.findobj(Axis):  # a tick beyond its axis has a label that is not drawn
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    for text in set(figure.findobj(Text)) - beyond:
        if not text.get_text().strip() or not text.get_visible():
            continue
        assert contrast(text.get_color()) >= 4.5, text.get_text()
        assert text.get_fontsize() >= 6, text.get_text()
        box = Text.get_window_extent(text).padded(-0.6)  # of an annotation without its arrow
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text.get_text()
        over = [other.get_text() for other, taken in boxes if box.overlaps(taken)]
        assert not over, (text.get_text(), over)
        boxes.append((text, box))


def test_a_figure_without_published_rows_fits_a_column_too():
    times = {"float32 network": 0.4, "or_pairs, int8": 0.7}
    for name in ("A Processor", "AMD Ryzen 9 7940HS w/ Radeon 780M Graphics"):
        network = make_rows(times, "alpha", "cpu", name, threads=16)
        network.loc[network["method"] == "float32 network", "dtype"] = "float32"
        assert_fits_a_column(draw_figure("network-times", network))
    lines = product(("exact", "cut"), ("int8", "Fibonacci"), ("not retrained", "retrained"), "012")
    accuracy = pd.DataFrame(lines, columns=["multiplier", "weights", "training", "seed"])
    accuracy["accuracy"] = np.linspace(0.2, 0.9, len(accuracy))
    assert_fits_a_column(draw_figure("network-accuracy", accuracy))
    drawn = {"network-times", "network-accuracy", *(one.id for one in published())}
    assert not published() or drawn == {spec.id for spec in FIGURES}


def test_a_chart_in_words_tells_its_first_lines_and_how_many_more():
    frame = pd.DataFrame({"method": ["a", "a", "b"], "seed": "0", "percent": [95.0, 96.0, 97.0]})
    share = {"percent": "share"}
    said = in_words("A kind", medians(frame, ["method", "seed"], share))
    assert said == "A kind: a, 0 95.5 (95.0 to 96.0); b, 0 97.0."
    both = medians(frame[:1], ["method"], share | {"seed": "number"})
    assert in_words("A kind", both) == "A kind: a: share 95.0, number 0."
    many = pd.DataFrame({"method": [f"{'long ' * 20}{n}" for n in range(9)], "percent": 97.0})
    said = in_words("A kind", medians(many, ["method"], share))
    assert said.endswith("2 97.0; and 6 more.") and len(said) < ALT_LENGTH
    nothing = medians(many[:0], ["method"], share)
    assert in_words("A kind", nothing) == "A kind: nothing to show."


def test_random_tables_stand_in_one_chart_and_not_in_the_other():
    facts = {
        "torch._int_mm": (1e-3, None, None),
        "or_pairs": (3e-3, "gemm", 2),
        "kulkarni": (3.5e-3, "gemm", 2),
        "random table, rank 4": (8e-3, "gemm", 5),
        "look-up": (0.2, "lookup", None),
    }
    rows = make_rows({name: seconds for name, (seconds, *_) in facts.items()}, *MACHINES[0])
    for i, column in enumerate(("path", "gemms"), start=1):
        rows[column] = [facts.get(name, (None,) * 3)[i] for name in rows["method"]]
    rows = rows.assign(multiplier=rows["method"]).convert_dtypes()
    times = [text.get_text() for text in draw_figure("inexact-multipliers", rows).axes[0].texts]
    assert "or_pairs" in times and not any("random" in text for text in times)
    axes = draw_figure("cost-against-rank", rows).axes[0]
    assert "or_pairs\nkulkarni" in texts_of(axes)  # one mark's names, or of two side by side
    assert axes.get_xlabel() == "int8 GEMMs, 1 + rank of a random table"
    found = {tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"}
    assert found == {(1.0,), (2.0, 2.0), (5.0,)}  # the first is the control's
