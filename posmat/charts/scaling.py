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
    ORANGE,
    PURPLE,
    RED,
    Chart,
    describe_rows,
    words_of_threads,
)
from posmat.summary import format_figures

PAGE_WIDTH_IN = 7.16  # both columns of a two-column paper
_TO_A_LABEL = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
_SIZE_NAMES = {"M": "batch_size", "N": "out_features", "K": "in_features"}


def _colours_of(methods: list[str]) -> dict[str, str]:
    return dict(zip(methods, [ORANGE, BLUE, GREEN, PURPLE, RED] * len(methods), strict=False))


def _apart(places: list[float], least: float) -> list[float]:
    """Move labels as little as it takes to keep them `least` apart, in the order they stand in."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            short = least - (moved[i + 1] - moved[i])
            if short > 1e-9:
                moved[i] -= short / 2
                moved[i + 1] += short / 2
    result = [0.0] * len(places)
    for place, i in zip(moved, order, strict=True):
        result[i] = place
    return result


def scaling(rows: pd.DataFrame, title: str) -> Chart:
    """Time and rate of every method against M, N and K, on logarithmic axes.

    The names stand at the ends of the lines, at the right; a ring marks the size that all share.
    """
    from posmat.roofline import along, rates

    table = rates(rows)
    table["ms"] = 1e3 * table["seconds"]
    methods = list(table["method"].unique())
    colours = _colours_of(methods)
    figure = Chart(figsize=(PAGE_WIDTH_IN, 4.3), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    labels = {"ms": "time per call [ms]", "gmacs": "rate [GMAC/s]"}
    for line, quantity in zip(grid, labels, strict=True):
        for axes, (letter, name) in zip(line, _SIZE_NAMES.items(), strict=True):
            data = along(table, letter).astype({name: float})
            sns.lineplot(
                data,
                x=name,
                y=quantity,
                hue="method",
                hue_order=methods,
                palette=colours,
                marker="o",
                markersize=3,
                markeredgewidth=0,
                linewidth=1.1,
                errorbar=None,
                legend=False,
                ax=axes,
            )
            shared = data[data["axis"] == "centre"]
            axes.scatter(
                shared[name], shared[quantity], s=22, facecolor="none", edgecolor=INK, lw=0.6
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
        for (method, end), height in zip(ends.items(), _apart(heights, 0.085), strict=True):
            axes.annotate(
                method,
                (float(end["in_features"]), end[quantity]),
                (1.06, height),
                xycoords="data",
                textcoords="axes fraction",
                color=colours[method],
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
    from posmat.roofline import measured_roofs, rates

    table = rates(rows)
    table["gflops"] = 2 * table["gmacs"]
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
        palette=colours,
        s=22,
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
    main, fastest = roofs.copies[-1], max(roofs.copies, key=lambda copy: copy[1])
    slopes = [(*main, "-")] + ([(*fastest, (0, (4, 2)))] if fastest is not main else [])
    line = {"color": INK, "linewidth": 0.9, "zorder": 1}
    for moved, bandwidth, dashes in slopes:
        slope = bandwidth / 1e9
        start, ridge = max(left, bottom / slope), min(right, highest / slope)
        axes.plot([start, ridge], [slope * start, slope * ridge], linestyle=dashes, **line)
        axes.text(
            1.1 * start,
            1.2 * slope * 1.1 * start,
            f"copy of {_megabytes(moved)}, {format_figures(slope)} GB/s",
            rotation=float(np.degrees(np.arctan(1.2 * slope))),
            rotation_mode="anchor",
            transform_rotates_text=True,
            fontsize=6.5,
        )
    for rate in peaks.values():
        axes.plot([max(left, rate * 1e9 / slopes[-1][1]), right], [rate, rate], **line)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    last = table.sort_values("intensity").groupby("method", sort=False).last()
    ends = {f"{name}, {format_figures(rate)}": (right, rate, INK) for name, rate in peaks.items()}
    for method in methods:
        ends[method] = (*last.loc[method, ["intensity", "gflops"]], colours[method])
    low, high = np.log10(axes.get_ylim())
    heights = [(np.log10(y) - low) / (high - low) for _, y, _ in ends.values()]
    for (name, (x, y, colour)), height in zip(ends.items(), _apart(heights, 0.055), strict=True):
        axes.annotate(
            name,
            (float(x), float(y)),
            (1.03, height),
            textcoords="axes fraction",
            color=colour,
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
    return figure


def _megabytes(moved: float) -> str:
    return f"{moved / 1e9:,.3g} GB" if moved >= 1e9 else f"{moved / 1e6:,.3g} MB"


def caption_of_sizes(what: str) -> Callable[[pd.DataFrame], str]:
    """A caption for charts over many sizes: what they show, and where it was measured."""

    def caption(rows: pd.DataFrame) -> str:
        first = rows[rows["axis"] == "centre"].iloc[0]
        runs = int(rows["run"].nunique())
        kernels = "one fresh kernel" if runs == 1 else f"{runs} fresh kernels"
        return (
            f"{what} Medians over the rounds of {kernels}, on {first['processor']} "
            f"({first['device']}, {words_of_threads(first['threads'])}, PyTorch {first['torch']})."
        )

    return caption
