"""Charts of times: one line per method, and the seed's times beside today's."""

from collections.abc import Callable

import pandas as pd
import seaborn as sns

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
    words_of_threads,
)
from posmat.summary import FLOOR, baseline_of, format_figures, is_control


def time_per_method(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: every block as a faint dot, the median as a bold one, the quartiles.

    The name stands on the line, the median and its ratio to the baseline at the right. Dots, not
    bars: a logarithm has no zero for a bar to start from.
    """
    table = summary_of(rows)
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    if _far_below(table, FLOOR):  # the axis would show little else
        table = table.drop(index=FLOOR)
    methods = list(table.index)
    timed = rows[(rows["state"] == "timed") & rows["method"].isin(methods)]
    timed = pd.DataFrame(
        {
            "method": timed["method"].astype(str),
            "ms": timed["seconds"].astype(float) * 1e3,
        }
    )
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.85 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots()
    palette = {m: FAINT if is_control(m) else ORANGE if m == baseline else BLUE for m in methods}
    shared = {
        "data": timed,
        "x": "ms",
        "y": "method",
        "order": methods,
        "hue": "method",
        "palette": palette,
        "legend": False,
        "ax": axes,
    }
    sns.stripplot(**shared, jitter=False, size=2.5, alpha=0.25)
    sns.pointplot(
        **shared,
        estimator="median",
        errorbar=("pi", 50),
        linestyle="none",
        markersize=4,
        err_kws={"linewidth": 1.6},
    )
    axes.set(xscale="log", xlabel="time per call [ms]", ylabel="")
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    plain_log_ticks(axes.xaxis, timed["ms"])
    axes.set_yticks([])
    axes.set_ylim(len(methods) - 0.6, -0.75)
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    for place, method in enumerate(methods):
        line = table.loc[method]
        colour = FAINT if is_control(method) else INK
        if line["state"] == "timed":
            value = f"{format_figures(1e3 * line['median'])} ms"
            # Beside the baseline itself, and beside what calling alone costs, a ratio says nothing.
            if method != baseline and pd.notna(line["ratio"]) and line["ratio"] > 0.01:
                value += f"   {format_figures(line['ratio'])}×"
        else:
            value = line["state"]
        style = {"transform": axes.get_yaxis_transform(), "y": place - 0.3, "color": colour}
        style |= {"va": "center", "fontsize": 7.5}
        axes.text(0.0, s=method, ha="left", **style)
        axes.text(1.0, s=value, ha="right", **style)
    return figure


def _far_below(table: pd.DataFrame, method: str) -> bool:
    """Whether a line is over 30 times faster than every other one."""
    if method not in table.index or pd.isna(table.loc[method, "median"]):
        return False
    return bool(30 * table.loc[method, "median"] < table["median"].drop(index=method).min())


def caption_of_times(question: str) -> Callable[[pd.DataFrame], str]:
    """A caption for `time_per_method`: what was asked, where measured, what the marks are."""

    def caption(rows: pd.DataFrame) -> str:
        rows = rows[rows["clock"] == "host"]
        first = rows.iloc[0]
        baseline = baseline_of(rows)
        rounds = int(rows[rows["method"] == baseline]["round"].nunique())
        runs = int(rows["run"].nunique())
        kernels = "one fresh kernel" if runs == 1 else f"{runs} fresh kernels"
        threads = words_of_threads(first["threads"])
        return (
            f"{question} Time per call on {first['processor']} ({first['device']}, {threads}, "
            f"PyTorch {first['torch']}), {first['dtype']} operands, "
            f"batch_size={first['batch_size']}, "
            f"out_features={first['out_features']}, in_features={first['in_features']}. Faint "
            f"dots are blocks of calls ({rounds} rounds in {kernels}), bold dots their medians, "
            f"lines their quartiles; × is the paired ratio to {baseline}."
        )

    return caption


def words_of_times(rows: pd.DataFrame) -> str:
    """What `time_per_method` shows, in words for who cannot see it: each median with its ratio."""
    table = summary_of(rows)
    baseline = baseline_of(rows)
    said = []
    for method, line in table.iterrows():
        if line["state"] != "timed":
            said.append(f"{method}: {line['state']}")
            continue
        told = method != baseline and pd.notna(line["ratio"])
        ratio = f" ({format_figures(line['ratio'])} times)" if told else ""
        said.append(f"{method} {format_figures(1e3 * line['median'])} ms{ratio}")
    return f"Chart, one line per method: {'; '.join(said)}. {describe_rows(rows)}."


def then_and_now(rows: pd.DataFrame, title: str) -> Chart:
    """One line per form that the seed timed: its own time, and the median of each machine today."""
    rows = rows[rows["clock"].isin(["host", "time.clock", "time.time"])]
    rows = rows.assign(line=rows["method"] + ", " + rows["dtype"], ms=rows["milliseconds"])
    lines, places = list(rows["line"].unique()), list(rows["where"].unique())
    then = [place for place in places if place.startswith("2020")]
    now = [place for place in places if place not in then]
    colours = dict(zip(now, [BLUE, ORANGE, GREEN, PURPLE, RED] * len(now), strict=False))
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.1 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    sns.scatterplot(
        rows.astype({"line": str, "where": str, "ms": float}),
        x="ms",
        y="line",
        hue="where",
        style="where",
        hue_order=then + now,
        style_order=then + now,
        palette=dict.fromkeys(then, INK) | colours,
        s=26,
        ax=axes,
    )
    axes.set(xscale="log", xlabel="time per call [ms]", ylabel="")
    axes.set_yticks([])
    axes.set_ylim(len(lines) - 0.6, -0.75)
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    plain_log_ticks(axes.xaxis, rows["ms"].astype(float))
    for place, line in enumerate(lines):
        label = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "center"}
        axes.text(0.0, place - 0.33, line, fontsize=7, **label)
    figure.head(title)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=6.5, frameon=False)
    return figure


def caption_then_and_now(rows: pd.DataFrame) -> str:
    """What the marks of `then_and_now` are."""
    now = rows[rows["clock"] == "host"]["where"].unique()
    return (
        "Time per call of the forms that the 2020 notebook timed: what it printed (2020; other "
        "hardware, which it does not name, and for some forms a clock that did not wait for the "
        f"device), and the median on {'; '.join(now)} today, warm and synchronised."
    )
