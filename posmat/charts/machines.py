"""Charts of ratios: speedup beside the noise, machines side by side, a parameter swept.

A ratio is the one of `summarize`, paired by round; its whisker is the interval of one run, or the
range over several.
"""

import pandas as pd

from posmat.charts.style import (
    BLUE,
    COLUMN_WIDTH_IN,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    Chart,
    describe_rows,
    plain_log_ticks,
    summary_of,
)
from posmat.summary import AGAIN, FLOOR, baseline_of, format_figures, is_control, summarize

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
_SWEPT = ("batch_size", "out_features", "in_features", "threads")


def speedup(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: how many times faster than the baseline, with interval and noise."""
    rows = rows[rows["clock"] == "host"]
    table = summary_of(rows)
    baseline = baseline_of(rows)
    shown = table[(table["state"] == "timed") & table["ratio"].notna()]
    shown = shown.drop(index=[name for name in shown.index if is_control(name)])
    shown = shown.drop(index=baseline, errors="ignore")
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.95 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.8)
    again = table.loc[f"{baseline}{AGAIN}"]
    if again["state"] == "timed" and pd.notna(again["ratio"]):
        low, high = 1 / float(again["ratio_high"]), 1 / float(again["ratio_low"])
        axes.axvspan(low, high, color=FAINT, alpha=0.25, linewidth=0)
    for place, (method, line) in enumerate(shown.iterrows()):
        middle, low, high = (1 / float(line[n]) for n in ("ratio", "ratio_high", "ratio_low"))
        axes.hlines(place, low, high, color=BLUE, linewidth=1.8)
        axes.plot([middle], [place], "o", color=BLUE, markersize=4)
        _write_on_line(axes, place, method, f"{format_figures(middle)}×")
    axes.set_xscale("log")
    axes.set(xlabel=f"speedup over {baseline}", yticks=[], ylim=(len(shown) - 0.6, -0.75))
    plain_log_ticks(axes.xaxis, 1 / shown["ratio"].astype(float))
    axes.spines["left"].set_visible(False)
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


def caption_speedup(rows: pd.DataFrame) -> str:
    """What the marks of `speedup` are."""
    runs = int(rows["run"].nunique())
    whisker = "the range over fresh kernels" if runs > 1 else "95 % intervals in one run"
    return (
        f"Speedup over {baseline_of(rows)}: medians of the ratios within a round, with {whisker} "
        f"({runs} run{'s' * (runs > 1)}). The grey band is the noise floor, the baseline timed a "
        f"second time over itself. {describe_rows(rows)}."
    )


def machines_side_by_side(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method, one mark per machine and device: its time over the baseline's there."""
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    table = summarize(rows, baseline, by=["machine", "device"]).reset_index()
    table = table[(table["state"] == "timed") & table["ratio"].notna()]
    table = table[~table["method"].map(is_control) & (table["method"] != baseline)]
    methods = list(table["method"].unique())
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.1 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.8)
    places = list(table.groupby(["machine", "device"], sort=False))
    for index, ((machine, device), own) in enumerate(places):
        colour, mark = _COLOURS[index % len(_COLOURS)], "oDs^v"[index % 5]
        y = [methods.index(name) + 0.12 * (index - (len(places) - 1) / 2) for name in own["method"]]
        axes.hlines(
            y, own["ratio_low"].astype(float), own["ratio_high"].astype(float), color=colour
        )
        label = f"{machine}, {device}"
        axes.plot(own["ratio"].astype(float), y, mark, color=colour, markersize=3.6, label=label)
    for place, method in enumerate(methods):
        _write_on_line(axes, place, method, "")
    axes.set_xscale("log")
    axes.set(xlabel=f"time / time of {baseline} there", yticks=[])
    axes.set_ylim(len(methods) - 0.6, -0.8)
    plain_log_ticks(axes.xaxis, table["ratio"].astype(float))
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=6.5, frameon=False)
    figure.head(title)
    return figure


def caption_machines(rows: pd.DataFrame) -> str:
    """What the marks of `machines_side_by_side` are."""
    where = rows.groupby(["machine", "device"], sort=False)["processor"].first()
    said = "; ".join(f"{machine}, {device}: {name}" for (machine, device), name in where.items())
    return (
        f"Each form's time over that of {baseline_of(rows)} on the same machine, so that machines "
        f"can be compared by ratios ({said}). Marks are medians of paired ratios, whiskers their "
        "intervals, or the range over several runs."
    )


def sweep(rows: pd.DataFrame, title: str) -> Chart:
    """A line per method: time per call against the parameter in which the runs differ."""
    rows = rows[(rows["clock"] == "host") & (rows["state"] == "timed")]
    rows = rows[rows["method"] != FLOOR]
    name = swept(rows)
    medians = rows.groupby(["method", name], sort=False)["seconds"].median().astype(float) * 1e3
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 2.9), layout="constrained")
    axes = figure.subplots()
    methods = [one for one in rows["method"].unique() if not is_control(one)]
    ends = []
    for index, method in enumerate(methods):
        line = medians[method].sort_index()
        colour = _COLOURS[index % len(_COLOURS)]
        x = line.index.to_numpy(float)
        axes.plot(x, line.to_numpy(), "o-", color=colour, markersize=3, linewidth=1)
        ends.append((line.iloc[-1], method, colour))
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="time per call [ms]")
    plain_log_ticks(axes.xaxis, rows[name].astype(float))
    plain_log_ticks(axes.yaxis, medians)
    axes.grid(which="major")
    for value, method, colour in ends:  # the name at the end of its line
        axes.annotate(
            method, (1.0, value), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", color=colour, fontsize=6.5,
        )  # fmt: skip
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


def swept(rows: pd.DataFrame) -> str:
    """The size or the number of threads in which runs differ: the one with the most values."""
    return max(_SWEPT, key=lambda name: rows[name].nunique())


def caption_sweep(rows: pd.DataFrame) -> str:
    """What the lines of `sweep` are."""
    name = swept(rows)
    values = ", ".join(f"{value:,}" for value in sorted(rows[name].unique()))
    return (
        f"Median time per call of each form against {name} ({values}), one run for each value. "
        f"{describe_rows(rows)}."
    )


def _write_on_line(axes, place: int, left: str, right: str) -> None:
    """A line's name at its left and a value at its right, above the marks."""
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
    axes.text(0.0, place - 0.33, left, ha="left", color=INK, **style)
    axes.text(1.0, place - 0.33, right, ha="right", color=INK, **style)
