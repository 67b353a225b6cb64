"""The chart of ratios: speedup beside the noise.

A ratio is the one of `summarize`, paired by round; its whisker is the interval of one run, or the
range over several.
"""

import numpy as np
import pandas as pd

from posmat.charts.style import (
    BLUE,
    COLUMN_WIDTH_IN,
    FAINT,
    INK,
    Chart,
    chart_of_nothing,
    describe_rows,
    name_of,
    plain_log_ticks,
    summary_of,
    words_of_kernels,
    words_of_range,
    words_of_wrong,
)
from posmat.summary import AGAIN, FLOOR, baseline_of, is_control


def speedup(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: how many times faster than the baseline, with its interval.

    The last line is the control, the baseline timed a second time: its interval is the noise.
    """
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    shown = lines_of_speedup(rows)
    if shown.empty:
        return chart_of_nothing(title, f"{baseline} has no time here: there is no speedup over it.")
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.95 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.6, zorder=1)
    for place, (method, line) in enumerate(shown.iterrows()):
        middle, low, high = (1 / float(line[n]) for n in ("ratio", "ratio_high", "ratio_low"))
        colour, mark = (INK, "D") if is_control(method) else (BLUE, "o")
        axes.hlines(place, low, high, color=colour, linewidth=1.8)
        _mark(axes, middle, place, mark, colour, line["wrong"])
        _write_on_line(
            axes, place, name_of(method, line["wrong"]), words_of_range(line, inverse=True)
        )
    axes.set_xscale("log")
    axes.set(xlabel=f"speedup over {baseline}", yticks=[], ylim=(len(shown) - 0.6, -0.75))
    plain_log_ticks(axes.xaxis, 1 / shown["ratio"].astype(float))
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


def lines_of_speedup(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines whose ratio says something: all but the baseline's own, the control at the end."""
    table = summary_of(rows)
    has = table[(table["state"] == "timed") & table["ratio"].notna()]
    has = has.drop(index=[baseline_of(rows), FLOOR], errors="ignore")
    last = np.array([str(name).endswith(AGAIN) for name in has.index], dtype=bool)
    return pd.concat([has[~last], has[last]])


def caption_speedup(rows: pd.DataFrame) -> str:
    """What the marks of `speedup` are."""
    baseline = baseline_of(rows)
    shown = lines_of_speedup(rows)
    if shown.empty:
        return f"No speedup: {baseline} has no time here. {describe_rows(rows)}."
    runs = int(shown["runs"].max())
    whisker = (
        "the range of the runs" if runs > 1 else "95 % intervals, of which one run knows no better"
    )
    control = (
        f" The line '{baseline}{AGAIN}', a diamond, is the baseline timed a second time: its "
        "interval is the noise floor."
        if f"{baseline}{AGAIN}" in shown.index
        else ""
    )
    return (
        f"Speedup over {baseline}: medians of the ratios within a round, with {whisker} "
        f"({words_of_kernels(runs)}).{control}{words_of_wrong(shown)} {describe_rows(rows)}, "
        f"PyTorch {rows['torch'].iloc[0]}."
    )


def _mark(axes, x: float, y: float, mark: str, colour: str, wrong: bool, **options) -> None:
    """A mark; a hollow one where the numbers are wrong."""
    face = "white" if wrong else colour
    axes.plot([x], [y], mark, color=colour, markersize=4, markerfacecolor=face, **options)


def _write_on_line(axes, place: float, left: str, right: str) -> None:
    """A line's name at its left and a value at its right, above the marks."""
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "color": INK}
    axes.text(0.0, place - 0.33, left, ha="left", fontsize=7.5, **style)
    axes.text(1.0, place - 0.33, right, ha="right", fontsize=7, **style)
