"""Charts over many sizes: how the cost grows, and the machine's roof."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from posmat.charts import style
from posmat.charts.style import BLUE, COLOURS, COLUMN_WIDTH_IN, INK, MARKS, ORANGE, Chart
from posmat.measure.roofline import SIZES, along, measured_roofs, rates
from posmat.measure.summary import format_figures

rates_of = style.kept(rates)


def _looks(table: pd.DataFrame) -> dict:
    """What seaborn needs to show each method in a colour and with a mark of its own."""
    methods = list(table["method"].unique())
    colours = zip(methods, [ORANGE, BLUE, *COLOURS[2:]] * len(methods), strict=False)
    marks = dict(zip(methods, MARKS * len(methods), strict=False))
    look = {"hue": "method", "hue_order": methods, "palette": dict(colours)}
    return look | {"style": "method", "style_order": methods, "markers": marks}


def _finish(figure: Chart, axes: Axes, rows: pd.DataFrame) -> None:
    """Put where the rows were measured over the axes, and below the figure what its marks are."""
    centre = rows[rows["axis"] == "centre"]
    style.subtitle(axes, centre, ", one of the three varied at a time")
    handles, labels = axes.get_legend_handles_labels()
    if axes.get_legend():
        axes.get_legend().remove()
    small = {"fontsize": 6.5, "handletextpad": 0.4, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, **small)


def scaling(rows: pd.DataFrame, title: str) -> Chart:
    """Time and rate of every method against M, N and K; a ring marks the size that all share."""
    table = rates_of(rows)
    table = table.assign(ms=1e3 * table["seconds"])
    look = _looks(table) | {"dashes": False, "markersize": 3.2, "markeredgewidth": 0}
    look |= {"linewidth": 0.9, "errorbar": None}
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 5.2))
    grid = figure.subplots(3, 2, sharex="row", sharey="col")
    labels = {"ms": "time per call [ms]", "gmacs": "rate [GMAC/s]"}
    ring = {"s": 26, "facecolor": "none", "edgecolor": INK, "lw": 0.6}
    for line, (letter, name) in zip(grid, SIZES.items(), strict=True):
        data = along(table, letter).astype({name: float})
        shared = data[data["axis"] == "centre"]
        for axes, (quantity, label) in zip(line, labels.items(), strict=True):
            sns.lineplot(data, x=name, y=quantity, ax=axes, legend=axes is grid[0, 0], **look)
            axes.scatter(shared[name], shared[quantity], **ring)
            axes.set(xscale="log", yscale="log", xlabel=f"{letter}, {name}", ylabel=label)
            first, last = np.log10(axes.get_xlim())  # two or three of the powers of ten have room
            first, last = int(np.ceil(first)), int(np.floor(last))
            axes.set_xticks(10.0 ** np.arange(first, last + 1, np.ceil(0.5 * (last - first) or 1)))
            style.plain_numbers(axes.xaxis)
            style.plain_numbers(axes.yaxis)
            axes.grid(which="major")
    _finish(figure, grid[0, 0], rows)
    return figure


def roofline(rows: pd.DataFrame, title: str) -> Chart:
    """The rate of every method and size over its arithmetic intensity, under the measured roofs."""
    table, roofs = rates_of(rows), measured_roofs(rows)
    table = table.assign(gops=2 * table["gmacs"])
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 3.9))
    axes = figure.subplots()
    look = _looks(table) | {"s": 13, "linewidth": 0, "alpha": 0.85}
    sns.scatterplot(table, x="intensity", y="gops", ax=axes, **look)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity [OP/byte]")
    axes.set(ylabel="rate [GOP/s]")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    peaks = {engine: 2 * rate for engine, rate in roofs.peaks.items()}
    highest = max(peaks.values())
    # The slope of the largest copy, and of the fastest where that is another one.
    copies = dict.fromkeys([roofs.copies[-1], max(roofs.copies, key=lambda copy: copy[1])])
    for (moved, bandwidth), dashes in zip(copies, ("-", (0, (4, 2))), strict=False):
        slope = bandwidth / 1e9
        x = np.array([max(left, bottom / slope), min(right, highest / slope)])
        size = f"{moved / 1e9:,.3g} GB" if moved >= 1e9 else f"{moved / 1e6:,.3g} MB"
        label = f"copy of {size}, {format_figures(slope)} GB/s"
        axes.plot(x, slope * x, color=INK, linewidth=0.9, zorder=1.8, linestyle=dashes, label=label)
    axes.set(xlim=(left, right), ylim=(bottom, max(top, 1.5 * highest)))
    low, high = np.log10(axes.get_ylim())
    heights = [(np.log10(rate) - low) / (high - low) for rate in peaks.values()]
    for (engine, rate), height in zip(peaks.items(), style.apart(heights, 0.1), strict=True):
        axes.hlines(rate, max(left, rate / slope), right, color=INK, linewidth=0.9, zorder=1.8)
        best = {"int8": "8-bit"}.get(engine, engine)  # of int8 or of uint8, whichever was faster
        words = f"{best}\n{format_figures(rate)}"
        axes.text(1.02, height, words, transform=axes.transAxes, va="center", fontsize=6.5)
    style.plain_numbers(axes.xaxis)
    style.plain_numbers(axes.yaxis)
    axes.grid(which="major")
    _finish(figure, axes, rows)
    return figure


def caption_of_sizes(what: str, rows: pd.DataFrame) -> str:
    """A caption for charts over many sizes: what they show, and where it was measured."""
    processes = style.words_of_processes(rows["run"].nunique())
    where = style.measured_on(rows[rows["axis"] == "centre"])
    return f"{what} Medians over the rounds of {processes}, on {where}, one size varied at a time."
