"""Charts over many sizes: how the cost grows, and the machine's roof."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from posmat.charts import style
from posmat.charts.style import BLUE, COLOURS, INK, MARKS, ORANGE, Chart
from posmat.measure.roofline import SIZES, along, measured_roofs, rates
from posmat.measure.summary import format_figures

PAGE_WIDTH_IN = 7.16  # both columns of a two-column paper
rates_of = style.kept(rates)


def _heading(title: str, rows: pd.DataFrame) -> str:
    where = style.describe_rows(rows[rows["axis"] == "centre"])
    return f"{title}\n{where}, one size varied at a time"


def _by_method(table: pd.DataFrame) -> dict:
    """What seaborn needs to show each method in a colour and with a mark of its own."""
    methods = list(table["method"].unique())
    colours = zip(methods, [ORANGE, BLUE, *COLOURS[2:]] * len(methods), strict=False)
    marks = dict(zip(methods, MARKS * len(methods), strict=False))
    look = {"hue": "method", "hue_order": methods, "palette": dict(colours), "legend": False}
    return look | {"style": "method", "style_order": methods, "markers": marks}


def _names_at_right(axes: Axes, ends: dict[str, tuple[float, float, str]], least: float) -> None:
    """At the right of the axes a name for each point of a colour, with a line that leads to it."""
    low, high = np.log10(axes.get_ylim())
    heights = [(np.log10(y) - low) / (high - low) for _, y, _ in ends.values()]
    heights = style.apart(heights, least)
    for (name, (x, y, colour)), height in zip(ends.items(), heights, strict=True):
        leader = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
        axes.annotate(
            name, (float(x), float(y)), (1.04, height), textcoords="axes fraction", fontsize=7,
            va="center", color=style.as_text(colour), arrowprops=leader | {"color": colour},
        )  # fmt: skip


def scaling(rows: pd.DataFrame, title: str) -> Chart:
    """Time and rate of every method against M, N and K; a ring marks the size that all share."""
    table = rates_of(rows)
    table = table.assign(ms=1e3 * table["seconds"])
    look = _by_method(table) | {"dashes": False, "markersize": 3.6, "markeredgewidth": 0}
    look |= {"linewidth": 1.1, "errorbar": None}
    figure = Chart(_heading(title, rows), figsize=(PAGE_WIDTH_IN, 4.3))
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    labels = {"ms": "time per call [ms]", "gmacs": "rate [GMAC/s]"}
    ring = {"s": 30, "facecolor": "none", "edgecolor": INK, "lw": 0.6}
    for line, quantity in zip(grid, labels, strict=True):
        for axes, (letter, name) in zip(line, SIZES.items(), strict=True):
            data = along(table, letter).astype({name: float})
            sns.lineplot(data, x=name, y=quantity, ax=axes, **look)
            shared = data[data["axis"] == "centre"]
            axes.scatter(shared[name], shared[quantity], **ring)
            axes.set(xscale="log", yscale="log", ylabel=labels[quantity])
            axes.set_xlabel(f"{letter}, {name}" if quantity == "gmacs" else "")
            axes.grid(which="major")
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            style.plain_numbers(axes.xaxis)
        style.plain_numbers(axes.yaxis)
        last = along(table, "K").groupby("method", sort=False)[["in_features", quantity]].last()
        ends = {name: (*end, look["palette"][name]) for name, end in last.iterrows()}
        _names_at_right(axes, ends, 0.085)
    return figure


def roofline(rows: pd.DataFrame, title: str) -> Chart:
    """The rate of every method and size over its arithmetic intensity, under the measured roofs."""
    table, roofs = rates_of(rows), measured_roofs(rows)
    table = table.assign(gflops=2 * table["gmacs"])
    look = _by_method(table) | {"s": 20, "linewidth": 0, "alpha": 0.85}
    figure = Chart(_heading(title, rows), figsize=(PAGE_WIDTH_IN, 3.8))
    axes = figure.subplots()
    sns.scatterplot(table, x="intensity", y="gflops", ax=axes, **look)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity [FLOP/byte]")
    axes.set(ylabel="rate [GFLOP/s]")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    peaks = {f"{engine} peak": 2 * rate for engine, rate in roofs.peaks.items()}
    highest = max(peaks.values())
    # The slope of the largest copy, and of the fastest where that is another one.
    copies = dict.fromkeys([roofs.copies[-1], max(roofs.copies, key=lambda copy: copy[1])])
    for (moved, bandwidth), dashes in zip(copies, ("-", (0, (4, 2))), strict=False):
        slope = bandwidth / 1e9
        x = np.array([max(left, bottom / slope), min(right, highest / slope)])
        size = f"{moved / 1e9:,.3g} GB" if moved >= 1e9 else f"{moved / 1e6:,.3g} MB"
        label = f"copy of {size}, {format_figures(slope)} GB/s"
        axes.plot(x, slope * x, color=INK, linewidth=0.9, zorder=1.8, linestyle=dashes, label=label)
    for rate in peaks.values():
        axes.hlines(rate, max(left, rate / slope), right, color=INK, linewidth=0.9, zorder=1.8)
    axes.set(xlim=(left, right), ylim=(bottom, max(top, 1.5 * highest)))
    ends = {f"{name}, {format_figures(rate)}": (right, rate, INK) for name, rate in peaks.items()}
    last = table.sort_values("intensity").groupby("method")[["intensity", "gflops"]].last()
    ends |= {name: (*last.loc[name], colour) for name, colour in look["palette"].items()}
    _names_at_right(axes, ends, 0.055)
    style.plain_numbers(axes.xaxis)
    style.plain_numbers(axes.yaxis)
    axes.grid(which="major")
    axes.legend(loc="upper left", frameon=False, fontsize=6.5)
    return figure


def caption_of_sizes(what: str, rows: pd.DataFrame) -> str:
    """A caption for charts over many sizes: what they show, and where it was measured."""
    kernels = style.words_of_kernels(rows["run"].nunique())
    where = style.measured_on(rows[rows["axis"] == "centre"])
    return f"{what} Medians over the rounds of {kernels}, on {where}, but for the varied size."
