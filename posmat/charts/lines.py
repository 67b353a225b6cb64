"""Charts of one line per method: times, speedup beside the noise, then and now.

A ratio is the one of `summarize`, paired by round; its whisker is the interval of one run, or the
range over several.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from posmat.charts.style import (
    BLUE,
    COLOURS,
    COLUMN_WIDTH_IN,
    FAINT,
    INK,
    MARKS,
    ORANGE,
    Chart,
    chart_of_nothing,
    counted,
    describe_rows,
    dots_on_lines,
    has_ratio,
    listed,
    name_of,
    subtitle,
    summary_of,
    value_of,
    with_ends,
    words_of_kernels,
    words_of_range,
    words_of_rounds,
    words_of_wrong,
    write_on_line,
)
from posmat.measure.summary import AGAIN, FLOOR, baseline_of, is_control


def time_per_method(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: every block as a faint dot, the median as a bold one, the quartiles.

    The name stands on the line, the median and its ratio to the baseline at the right. Dots, not
    bars: a logarithm has no zero for a bar to start from. The dot of a method whose numbers are
    wrong is hollow.
    """
    table = lines_of_times(rows)
    rows = rows[rows["clock"] == "host"]
    methods = list(table.index)
    timed = rows[(rows["state"] == "timed") & rows["method"].isin(methods)]
    timed = timed.astype({"method": str})
    kinds = {name: "control" if is_control(name) else "" for name in methods}
    kinds[baseline_of(rows)] = "baseline"
    points = pd.DataFrame(
        {
            "x": timed["seconds"].astype(float) * 1e3,
            "y": timed["method"].map(methods.index),
            "kind": timed["method"].map(kinds),
            "hollow": timed["method"].map(table["wrong"]),
        }
    )
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.85 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots()
    looks = {"baseline": (ORANGE, "o"), "": (BLUE, "o"), "control": (FAINT, "o")}
    few = {"size": 2.5, "alpha": 0.25}
    dots_on_lines(
        axes, points, looks, len(methods), "time per call [ms]", whisker=("pi", 50), faint=few
    )
    for place, (method, line) in enumerate(table.iterrows()):
        name, value = name_of(method, line["wrong"]), value_of(method, line, "   {}×")
        write_on_line(axes, place, name, value, FAINT if is_control(method) else INK)
    subtitle(axes, rows)
    figure.head(title)
    return figure


def lines_of_times(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the summary that the chart has: the cost of a call only where it is near."""
    table = summary_of(rows)
    median = table["median"].astype("Float64")
    # Over 30 times below every other line it would leave the axis to show little else.
    far = (30 * median < median.drop(FLOOR, errors="ignore").min()) & (table.index == FLOOR)
    return table[~far.fillna(False)]


def caption_of_times(question: str) -> Callable[[pd.DataFrame], str]:
    """A caption for `time_per_method`: what was asked, where measured, what the marks are."""

    def caption(rows: pd.DataFrame) -> str:
        table = lines_of_times(rows)
        rows = rows[rows["clock"] == "host"]
        first = rows.iloc[0]
        baseline = baseline_of(rows)
        threads = counted(first["threads"], "thread")
        ratio = ""
        if any(has_ratio(method, line) for method, line in table.iterrows()):
            ratio = f"; × is the paired ratio to {baseline}"
        elif table.loc[baseline, "state"] != "timed":
            ratio = f"; {baseline} has no time here, so there is no ratio to it"
        return (
            f"{question} Time per call on {first['processor']} ({first['device']}, {threads}, "
            f"PyTorch {first['torch']}), {first['dtype']} operands, "
            f"batch_size={first['batch_size']}, "
            f"out_features={first['out_features']}, in_features={first['in_features']}. Faint "
            f"dots are blocks of calls ({words_of_rounds(rows)}), bold dots their medians, "
            f"lines their quartiles{ratio}.{words_of_wrong(table)}"
        )

    return caption


def speedup(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: how many times faster than the baseline, with its interval.

    The last line is the control, the baseline timed a second time: its interval is the noise.
    """
    shown, baseline = lines_of_speedup(rows), baseline_of(rows)
    if shown.empty:
        return chart_of_nothing(title, f"{baseline} has no time here: there is no speedup over it.")
    points = pd.DataFrame(
        {
            "x": 1 / shown["ratio"].astype(float),
            "low": 1 / shown["ratio_high"].astype(float),
            "high": 1 / shown["ratio_low"].astype(float),
            "y": range(len(shown)),
            "kind": ["control" if is_control(name) else "" for name in shown.index],
            "hollow": shown["wrong"],
        }
    )
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.95 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.6, zorder=1)
    looks = {"": (BLUE, "o"), "control": (INK, "D")}
    xlabel = f"speedup over {baseline}"
    dots_on_lines(axes, with_ends(points), looks, len(shown), xlabel, whisker=("pi", 100))
    for place, (method, line) in enumerate(shown.iterrows()):
        value = words_of_range(line, inverse=True)
        write_on_line(axes, place, name_of(method, line["wrong"]), value)
    subtitle(axes, rows[rows["clock"] == "host"])
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


_OF_THE_SEED = ("time.clock", "time.time")
_HOLLOW = ", clock did not wait"


def then_and_now(rows: pd.DataFrame, title: str) -> Chart:
    """One line per form that the seed timed: its own time, and the median of each machine today.

    A time whose clock did not wait for the device is a hollow mark.
    """
    lines = list(rows["line"].unique())
    then, now = _places(rows)
    looks, shifts = {}, {}
    for index, place in enumerate(then + now):
        look = INK if place in then else COLOURS[(index - len(then)) % len(COLOURS)]
        looks |= dict.fromkeys((place, f"{place}{_HOLLOW}"), (look, MARKS[index % len(MARKS)]))
        shifts[place] = 0.14 * (index - len(then) - (len(now) - 1) / 2) if place in now else 0
    named = {"x": "milliseconds", "low": "q25_milliseconds", "high": "q75_milliseconds"}
    points = pd.DataFrame(
        {name: pd.to_numeric(rows[of], errors="coerce").astype(float) for name, of in named.items()}
        | {
            "y": rows["line"].map(lines.index) + rows["where"].map(shifts),
            "kind": rows["where"].where(~rows["hollow"], rows["where"] + _HOLLOW),
            "hollow": rows["hollow"],
        }
    )
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.1 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2, "fontsize": 6.5}
    dots_on_lines(
        axes, with_ends(points), looks, len(lines), "time per call [ms]", whisker=("pi", 100),
        legend=above,
    )  # fmt: skip
    elsewhere = _on_another_device(rows)
    for place, line in enumerate(lines):
        note = f" (2020 on {elsewhere[line]})" if line in elsewhere else ""
        write_on_line(axes, place, f"{line}{note}")
    figure.head(title)
    return figure


def rows_then_and_now(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that the chart shows, with the line that each is on and whether it is hollow."""
    rows = rows[rows["clock"].isin(["host", *_OF_THE_SEED])]
    hollow = rows["synchronised"].astype("string").eq("no").fillna(False).astype(bool)
    return rows.assign(line=rows["method"] + ", " + rows["dtype"], hollow=hollow)


def _places(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Where the times are of: of 2020, and of today."""
    old = rows["clock"].isin(_OF_THE_SEED)
    return list(rows.loc[old, "where"].unique()), list(rows.loc[~old, "where"].unique())


def _on_another_device(rows: pd.DataFrame) -> dict[str, str]:
    """The lines whose time of 2020 is of a device that no time of today is of, with that device."""
    found = {}
    for line, own in rows.groupby("line", sort=False):
        old = own["clock"].isin(_OF_THE_SEED)
        then, now = own.loc[old, "device"], set(own.loc[~old, "device"])
        if now and len(then) and not now & set(then):
            found[str(line)] = listed(list(then.unique()))
    return found


def caption_then_and_now(rows: pd.DataFrame) -> str:
    """What the marks of `then_and_now` are, and what stands between them beside the years."""
    now = rows[rows["clock"] == "host"].groupby("where", sort=False)[["processor", "torch"]].first()
    places = [
        f"{where} ({line['processor']}, PyTorch {line['torch']})" for where, line in now.iterrows()
    ]
    hollow = " Hollow marks are of a clock that did not wait for the device."
    elsewhere = _on_another_device(rows)
    devices = (
        f" On {len(elsewhere)} of the {rows['line'].nunique()} lines the devices differ, "
        f"{listed(list(dict.fromkeys(elsewhere.values())))} in 2020 beside {'; '.join(now.index)}: "
        "there the distance is that of two devices first."
    )
    return (
        "Time per call of the forms that the 2020 notebook timed: what it printed (2020; other "
        "hardware, which it does not name), and the medians of today, warm and synchronised, on "
        f"{'; '.join(places) or 'no machine yet'}, with the quartiles as lines."
        f"{hollow if rows['hollow'].any() else ''}{devices if elsewhere else ''}"
    )
