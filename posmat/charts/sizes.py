"""Charts over many sizes: how the cost grows, and the machine's roof."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from posmat.charts.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MARKS,
    ORANGE,
    PURPLE,
    RED,
    Chart,
    apart,
    as_text,
    counted,
    describe_rows,
    kept,
    words_of_kernels,
)
from posmat.measure.roofline import SIZES, along, measured_roofs, rates
from posmat.measure.summary import format_figures

PAGE_WIDTH_IN = 7.16  # both columns of a two-column paper
_TO_A_LABEL = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}


def _colours_of(methods: list[str]) -> dict[str, str]:
    return dict(zip(methods, [ORANGE, BLUE, GREEN, PURPLE, RED] * len(methods), strict=False))


def _marks_of(methods: list[str]) -> dict[str, str]:
    return dict(zip(methods, MARKS * len(methods), strict=False))


def scaling(rows: pd.DataFrame, title: str) -> Chart:
    """Time and rate of every method against M, N and K, on logarithmic axes.

    The names stand at the ends of the lines, at the right; a ring marks the size that all share.
    """
    table = rates_of(rows)
    table = table.assign(ms=1e3 * table["seconds"])
    methods = list(table["method"].unique())
    colours, marks = _colours_of(methods), _marks_of(methods)
    figure = Chart(figsize=(PAGE_WIDTH_IN, 4.3), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    labels = {"ms": "time per call [ms]", "gmacs": "rate [GMAC/s]"}
    for line, quantity in zip(grid, labels, strict=True):
        for axes, (letter, name) in zip(line, SIZES.items(), strict=True):
            data = along(table, letter).astype({name: float})
            sns.lineplot(
                data,
                x=name,
                y=quantity,
                hue="method",
                hue_order=methods,
                palette=colours,
                style="method",
                style_order=methods,
                markers=marks,
                dashes=False,
                markersize=3.6,
                markeredgewidth=0,
                linewidth=1.1,
                errorbar=None,
                legend=False,
                ax=axes,
            )
            shared = data[data["axis"] == "centre"]
            axes.scatter(
                shared[name], shared[quantity], s=30, facecolor="none", edgecolor=INK, lw=0.6
            )
            axes.set(xscale="log", yscale="log", ylabel=labels[quantity])
            axes.set_xlabel(f"{letter}, {name}" if quantity == "gmacs" else "")
            axes.grid(which="major")
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        ends = {
            method: own.sort_values("in_features").iloc[-1]
            for method, own in along(table, "K").groupby("method", sort=False)
        }
        low, high = np.log10(axes.get_ylim())
        heights = [(np.log10(end[quantity]) - low) / (high - low) for end in ends.values()]
        for (method, end), height in zip(ends.items(), apart(heights, 0.085), strict=True):
            axes.annotate(
                method,
                (float(end["in_features"]), end[quantity]),
                (1.06, height),
                xycoords="data",
                textcoords="axes fraction",
                color=as_text(colours[method]),
                fontsize=7,
                va="center",
                arrowprops={**_TO_A_LABEL, "color": colours[method]},
            )
    where = describe_rows(rows[rows["axis"] == "centre"])
    subtitle = f"{where}, but for the size that is varied"
    # A title of the first panel would widen it: this text is left out of the layout, and an empty
    # second line of the figure's title makes room for it.
    place = {"transform": grid[0, 0].transAxes, "fontsize": 6.5, "color": FAINT}
    grid[0, 0].text(0, 1.04, subtitle, **place).set_in_layout(False)
    figure.head(f"{title}\n")
    return figure


def roofline(rows: pd.DataFrame, title: str) -> Chart:
    """The rate of every method and size over its arithmetic intensity, under the measured roofs."""
    table = rates_of(rows)
    table = table.assign(gflops=2 * table["gmacs"])
    roofs = measured_roofs(rows)
    methods = list(table["method"].unique())
    colours = _colours_of(methods)
    figure = Chart(figsize=(PAGE_WIDTH_IN, 3.8), layout="constrained")
    axes = figure.subplots()
    sns.scatterplot(
        table,
        x="intensity",
        y="gflops",
        hue="method",
        style="method",
        hue_order=methods,
        style_order=methods,
        markers=_marks_of(methods),
        palette=colours,
        s=20,
        linewidth=0,
        alpha=0.85,
        legend=False,
        ax=axes,
    )
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity [FLOP/byte]")
    axes.set(ylabel="rate [GFLOP/s]")
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    peaks = {"float32 peak": roofs.float32_gmacs, "int8 peak": roofs.int8_gmacs}
    peaks = {name: 2 * rate for name, rate in peaks.items() if rate is not None}
    highest = max(peaks.values())
    top = max(top, 1.5 * highest)
    slopes = _slopes(roofs.copies)
    line = {"color": INK, "linewidth": 0.9, "zorder": 1}
    for index, (_, bandwidth) in enumerate(slopes):
        slope = bandwidth / 1e9
        start, ridge = max(left, bottom / slope), min(right, highest / slope)
        dashes = (0, (4, 2)) if index else "-"
        axes.plot([start, ridge], [slope * start, slope * ridge], linestyle=dashes, **line)
    for rate in peaks.values():
        axes.plot([max(left, rate * 1e9 / slopes[-1][1]), right], [rate, rate], **line)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    last = table.sort_values("intensity").groupby("method", sort=False).last()
    ends = {f"{name}, {format_figures(rate)}": (right, rate, INK) for name, rate in peaks.items()}
    for method in methods:
        ends[method] = (*last.loc[method, ["intensity", "gflops"]], colours[method])
    low, high = np.log10(axes.get_ylim())
    heights = [(np.log10(y) - low) / (high - low) for _, y, _ in ends.values()]
    for (name, (x, y, colour)), height in zip(ends.items(), apart(heights, 0.055), strict=True):
        axes.annotate(
            name,
            (float(x), float(y)),
            (1.03, height),
            textcoords="axes fraction",
            color=as_text(colour),
            fontsize=7,
            va="center",
            arrowprops={**_TO_A_LABEL, "color": colour},
        )
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major")
    where = describe_rows(rows[rows["axis"] == "centre"])
    axes.set_title(f"{where}, one size varied at a time", fontsize=6.5, color=FAINT)
    figure.head(title)
    _label_slopes(axes, slopes, table)
    return figure


rates_of = kept(rates)


def _slopes(copies: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The copies that the roof shows: the largest, and the fastest where that is another one."""
    main, fastest = copies[-1], max(copies, key=lambda copy: copy[1])
    return [main] if fastest is main else [main, fastest]


def _label_slopes(axes, slopes: list[tuple[float, float]], table: pd.DataFrame) -> None:
    """Write on each slope which copy it is of, where no point and no other line is in the way."""
    axes.figure.draw_without_rendering()  # from here on a place on the paper is known
    points = axes.transData.transform(table[["intensity", "gflops"]].astype(float).to_numpy())
    (left, right), bottom = axes.get_xlim(), axes.get_ylim()[0]
    lines = {
        bandwidth: axes.transData.transform(
            [(x, x * bandwidth / 1e9) for x in np.geomspace(left, right, 200)]
        )
        for _, bandwidth in slopes
    }
    inside = axes.get_window_extent()
    dpi = axes.figure.dpi
    for moved, bandwidth in slopes:
        slope = bandwidth / 1e9
        (x0, y0), (x1, y1) = lines[bandwidth][[0, -1]]
        angle = np.arctan2(y1 - y0, x1 - x0)
        words = f"copy of {_megabytes(moved)}, {format_figures(slope)} GB/s"
        text = axes.text(left, bottom, words, fontsize=6.5)
        box = text.get_window_extent()
        long, high, gap = box.width, box.height, 2.5 / 72 * dpi
        obstacles = np.vstack([points, *(at for of, at in lines.items() if of != bandwidth)])
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        best = None
        for x in np.geomspace(max(left, bottom / slope), right, 60):
            for side in (1, -1):
                start = axes.transData.transform((x, slope * x))
                u, v = turn @ (obstacles - start).T
                low, up = (gap, gap + high) if side > 0 else (-gap - high, -gap)
                pad = 4 / 72 * dpi  # half a mark
                hit = (u > -pad) & (u < long + pad) & (v > low - pad) & (v < up + pad)
                corners = np.array([(0, low), (long, low), (0, up), (long, up)]) @ turn + start
                out = sum(not inside.contains(*corner) for corner in corners)
                if best is None or (out, hit.sum()) < best[0]:
                    best = (out, hit.sum()), start + turn.T @ (0, low)
        text.set_position(axes.transData.inverted().transform(best[1]))
        text.set(
            rotation=float(np.degrees(angle)), rotation_mode="anchor", va="bottom", in_layout=False
        )


def _megabytes(moved: float) -> str:
    return f"{moved / 1e9:,.3g} GB" if moved >= 1e9 else f"{moved / 1e6:,.3g} MB"


def caption_of_sizes(what: str) -> Callable[[pd.DataFrame], str]:
    """A caption for charts over many sizes: what they show, and where it was measured."""

    def caption(rows: pd.DataFrame) -> str:
        first = rows[rows["axis"] == "centre"].iloc[0]
        runs = int(rows["run"].nunique())
        return (
            f"{what} Medians over the rounds of {words_of_kernels(runs)}, on {first['processor']} "
            f"({first['device']}, {counted(first['threads'], 'thread')}, PyTorch {first['torch']})."
        )

    return caption
