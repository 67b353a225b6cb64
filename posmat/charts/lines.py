"""Charts of one line per method: times, speedup beside the noise, then and now.

A ratio is the one of `summarize`, paired by round; its whisker is the interval of one run, or the
range over several.
"""

import pandas as pd

from posmat.charts import style
from posmat.charts.style import BLUE, FAINT, INK, ORANGE, Chart
from posmat.measure.summary import AGAIN, FLOOR, baseline_of, is_control


def time_per_method(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: every block as a faint dot, the median as a bold one, the quartiles.

    Dots, not bars: a logarithm has no zero for a bar to start from. The dot of a method whose
    numbers are wrong is hollow.
    """
    table = lines_of_times(rows)
    rows = rows[rows["clock"] == "host"]
    methods = list(table.index)
    timed = rows[(rows["state"] == "timed") & rows["method"].isin(methods)]
    method = timed["method"].astype(str)
    kinds = {name: "control" if is_control(name) else "" for name in methods}
    kinds[baseline_of(rows)] = "baseline"
    points = pd.DataFrame({"x": 1e3 * timed["seconds"].astype(float), "kind": method.map(kinds)})
    points = points.assign(y=method.map(methods.index), hollow=method.map(table["wrong"]))
    looks = {"baseline": (ORANGE, "o"), "": (BLUE, "o"), "control": (FAINT, "o")}
    return style.chart_of_lines(
        title, list(table["label"]), points, rows=rows, looks=looks, xlabel="time per call [ms]",
        values=[style.value_of(method, line, "\u2003{}×") for method, line in table.iterrows()],
        whisker=("pi", 50), faint=True,
    )  # fmt: skip


def lines_of_times(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the summary that the chart has: the cost of a call only where it is near."""
    table = style.summary_of(rows)
    median = table["median"].astype("Float64")
    # Over 30 times below every other line it would leave the axis to show little else.
    far = (30 * median < median.drop(FLOOR, errors="ignore").min()) & (table.index == FLOOR)
    return table[~far.fillna(False)]


def caption_of_times(question: str, rows: pd.DataFrame) -> str:
    """A caption for `time_per_method`: what was asked, where measured, what the marks are."""
    table = lines_of_times(rows)
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    ratio = f"{baseline} has no time here, so there is no ratio to it"
    if table.loc[baseline, "state"] == "timed":
        ratio = f"× is the paired ratio to {baseline}"
    return (
        f"{question} Time per call on {style.measured_on(rows)}. Faint dots are blocks of calls "
        f"({style.words_of_rounds(rows)}), bold dots their medians, lines their quartiles; {ratio}."
        " Below the baseline, methods stand from the fastest to the slowest."
        f"{style.words_of_wrong(table)}"
    )


def speedup(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: how many times faster than the baseline, and the control's at last."""
    shown, baseline = lines_of_speedup(rows), baseline_of(rows)
    if shown.empty:
        why = f"{baseline} has no time here: there is no speedup over it."
        return style.chart_of_nothing(title, why)
    ends = {"x": "ratio", "low": "ratio_high", "high": "ratio_low"}
    points = pd.DataFrame({name: 1 / shown[of].astype(float) for name, of in ends.items()})
    kinds = ["control" if is_control(name) else "" for name in shown.index]
    points = points.assign(y=range(len(shown)), kind=kinds, hollow=shown["wrong"])
    figure = style.chart_of_lines(
        title, list(shown["label"]), points, rows=rows[rows["clock"] == "host"],
        values=[style.words_of_speedup(line) for _, line in shown.iterrows()],
        looks={"": (BLUE, "o"), "control": (INK, "D")}, xlabel=f"speedup over {baseline}",
    )  # fmt: skip
    figure.axes[0].axvline(1, color=FAINT, linewidth=0.6, zorder=1)
    return figure


def lines_of_speedup(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines whose ratio says something: all but the baseline's own, the control at the end."""
    table = style.summary_of(rows)
    has = table[(table["state"] == "timed") & table["ratio"].notna()]
    has = has.drop(index=[baseline_of(rows), FLOOR], errors="ignore")
    return has.sort_index(key=lambda names: names.str.endswith(AGAIN), kind="stable")


def caption_speedup(rows: pd.DataFrame) -> str:
    """What the marks of `speedup` are."""
    shown, baseline, where = lines_of_speedup(rows), baseline_of(rows), style.measured_on(rows)
    if shown.empty:
        return f"No speedup: {baseline} has no time on {where}."
    return (
        "How sure the ratios of the figure gemm-formulations are, from the same rows: speedup over "
        f"{baseline} on {where}. Dots are medians of the ratios within a round, turned over; lines "
        f"and brackets are {style.words_of_whiskers(shown)}."
        f"{style.words_of_control(shown, 'diamond')}{style.words_of_wrong(shown)}"
    )


_HOLLOW = ", clock did not wait"
_MARKS_OF_DEVICES = {"cpu": "o", "cuda": "s"}


def then_and_now(rows: pd.DataFrame, title: str) -> Chart:
    """One line per form that the seed timed: its own time, and the median of each machine today.

    The mark is the device's, the colour the machine's. A time whose clock did not wait for the
    device is a hollow mark.
    """
    names = list(rows["line"].unique())
    then, now = (rows.loc[rows["when"] == when, "where"].unique() for when in ("then", "now"))
    looks, shifts = style.looks_of(now, 0.14)
    devices = rows.groupby("where")["device"].first()
    colours = dict.fromkeys(then, INK) | {place: colour for place, (colour, _) in looks.items()}
    looks = {
        place + more: (colour, _MARKS_OF_DEVICES.get(devices[place], "^"))
        for place, colour in colours.items()
        for more in ("", _HOLLOW)
    }
    columns = ["milliseconds", "q25_milliseconds", "q75_milliseconds"]
    points = rows[columns].astype("Float64").astype(float).set_axis(["x", "low", "high"], axis=1)
    points = points.assign(
        y=rows["line"].map(names.index) + rows["where"].map(shifts).fillna(0) + 0.08,
        kind=rows["where"].where(~rows["hollow"], rows["where"] + _HOLLOW),
        hollow=rows["hollow"],
    )
    how = {"looks": looks, "xlabel": "time per call [ms]", "columns": 2}
    return style.chart_of_lines(title, names, points, **how)


def rows_then_and_now(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that the chart shows, with their line, then or now, and whether a dot is hollow."""
    whens = {"time.clock": "then", "time.time": "then", "host": "now"}
    rows = rows.assign(when=rows["clock"].map(whens), line=rows["method"] + ", " + rows["dtype"])
    hollow = rows["synchronised"].astype("string").eq("no").fillna(False).astype(bool)
    return rows.assign(hollow=hollow).dropna(subset="when")


def caption_then_and_now(rows: pd.DataFrame) -> str:
    """What the marks of `then_and_now` are, and what stands between them beside the years."""
    now = rows[rows["when"] == "now"].groupby("where", sort=False)[["processor", "torch"]].first()
    places = [f"{where} ({name}, PyTorch {torch})" for where, name, torch in now.itertuples()]
    hollow = " Hollow marks are of a clock that did not wait for the device."
    return (
        "Time per call of the forms that the 2020 notebook timed: what it printed (2020; other "
        "hardware, which it does not name), and the medians of today, warm and synchronised, on "
        f"{'; '.join(places) or 'no machine yet'}, with the quartiles as lines. Round marks are "
        f"CPUs, square ones GPUs.{hollow if rows['hollow'].any() else ''} A round and a square "
        "mark of one line differ in the kind of device, and not in the year alone."
    )
