"""Charts of Fibonacci codes and inexact multipliers."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FuncFormatter

from posmat.charts.style import (
    BLUE,
    COLUMN_WIDTH_IN,
    FAINT,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    Chart,
    describe_rows,
    plain_log_ticks,
    words_of_threads,
)
from posmat.charts.times import time_per_method
from posmat.summary import baseline_of, summarize


def fibonacci_codes(codes: pd.DataFrame, title: str) -> Chart:
    """Each code as a column of its bits at its place on the number line, and how far others go."""
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 3.1), layout="constrained")
    bits, distance = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    magnitudes = codes["magnitude"].to_numpy(int)
    kept = codes.loc[codes["is_code"].astype(bool), "magnitude"].to_numpy(int)
    width = max(1, int(magnitudes.max()).bit_length())
    places, heights = np.nonzero(kept[:, None] >> np.arange(width) & 1)
    bits.vlines(kept, -0.7, width - 0.3, color="#e4e4e4", linewidth=1.1)
    bits.vlines(kept[places], heights - 0.36, heights + 0.36, color=BLUE, linewidth=1.3)
    bits.set(ylabel="bit", yticks=range(width), ylim=(-0.7, width - 0.3))
    bits.tick_params(length=0)
    share = f"{len(kept)} of {len(magnitudes)} magnitudes are codes; a mark is a one"
    bits.set_title(share, fontsize=6.5, color=FAINT)
    moved = codes["nearest"].to_numpy(int) - magnitudes
    distance.axhline(0, color=FAINT, linewidth=0.5)
    distance.vlines(magnitudes, 0, moved, color=ORANGE, linewidth=1)
    distance.plot(magnitudes, moved, "o", color=ORANGE, markersize=1.6, markeredgewidth=0)
    last = int(kept.max())
    distance.text(
        last + 1, moved.min(), f"beyond {last},\nthe last code ", ha="right", fontsize=6.5
    )
    distance.set(xlabel="magnitude", ylabel="nearest code − magnitude")
    distance.set_xticks([0, 21, 32, 42, 64, 85, 127])
    distance.grid(axis="y")
    figure.head(title)
    return figure


def caption_fibonacci_codes(_: pd.DataFrame) -> str:
    """What the two panels of `fibonacci_codes` are."""
    return (
        "Above, the Fibonacci codes among the magnitudes of 7 bits, each at its place on the "
        "number line with the ones of its binary form; no two are adjacent. Below, for every "
        "magnitude, how far away the code is that it is rounded to; a tie goes up."
    )


def fibonacci_rounding(rounding: pd.DataFrame, title: str) -> Chart:
    """One line per distribution of weights, one mark per set of codes: the relative error."""
    return _marks_by_line(
        rounding.assign(percent=100 * rounding["relative_error"].astype(float)),
        title,
        x="percent",
        line="distribution",
        mark="codes",
        xlabel="error / weights, root of the sums of squares [%]",
    )


def caption_fibonacci_rounding(_: pd.DataFrame) -> str:
    """What the marks of `fibonacci_rounding` are."""
    return (
        "What quantization to int8 magnitudes loses, over distributions of weights: the root of "
        "the sum of squared errors over that of the squared weights. Each set of codes has the "
        "scale of least squared error, unless it says whose scale it took."
    )


def error_tables(errors: pd.DataFrame, title: str) -> Chart:
    """A heat map per multiplier of product minus true product, each in a scale of its own."""
    names = list(errors["multiplier"].unique())
    rows = -(-len(names) // 3)
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.9 + 1.32 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, names, strict=False):
        own = errors[errors["multiplier"] == name].sort_values("weight")
        table = own.drop(columns=["multiplier", "weight"]).to_numpy(float)
        largest = table.flat[np.abs(table).argmax()]
        image = axes.imshow(
            table / max(1.0, abs(largest)),
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
        )
        worst = f"{largest:,.0f}".replace("-", "−")
        wrong = f"{100 * (table != 0).mean():.0f} % wrong"
        axes.set_title(f"{name}\n{wrong}\nworst {worst}", fontsize=6.5, loc="left")
        axes.set(xticks=[0, 64, 127], yticks=[0, 64, 127])
        axes.tick_params(labelsize=6, length=2)
        axes.spines[["left", "bottom"]].set_visible(False)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(
        image, ax=panels, location="bottom", shrink=0.5, aspect=30, pad=0.02, ticks=[-1, 0, 1]
    )
    bar.set_ticklabels(["too small", "exact", "too large"], fontsize=6)
    bar.outline.set_visible(False)
    panels[-1, 1].set_xlabel("input's magnitude")
    panels[rows // 2, 0].set_ylabel("weight's magnitude", y=1.1 if rows % 2 == 0 else 0.5)
    figure.head(title)
    return figure


def caption_error_tables(_: pd.DataFrame) -> str:
    """What a cell of `error_tables` is."""
    return (
        "The error of inexact multipliers, product minus true product, for every weight's and "
        "every input's magnitude of 0 to 127; each colour scale ends at the multiplier's own "
        "largest error, which stands above it."
    )


def inexact_times(rows: pd.DataFrame, title: str) -> Chart:
    """`time_per_method` without the random tables, which `cost_against_rank` shows."""
    return time_per_method(rows[~_is_random(rows)], title)


def cost_against_rank(rows: pd.DataFrame, title: str) -> Chart:
    """A dot per multiplier: how many int8 GEMMs it takes, and how many times the time of one."""
    rows = rows[rows["clock"] == "host"]
    table = summarize(rows)
    facts = rows.groupby("method", sort=False)[["multiplier", "path", "gemms"]].first()
    table = table[table["state"] == "timed"].join(facts)
    baseline = baseline_of(rows)
    ours = table[table["path"] == "gemm"]
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 3.1), layout="constrained")
    axes = figure.subplots()
    random = ours["multiplier"].str.startswith(RANDOM_TABLE)
    most = float(ours["gemms"].max())
    axes.plot([1, most], [1, most], color=FAINT, linewidth=0.8, linestyle=":")
    small = {"fontsize": 6.5, "color": FAINT}
    axes.text(most / 3.5, most / 6.5, "the GEMMs alone", ha="left", va="center", **small)
    for part, colour, mark in ((ours[random], BLUE, "o"), (ours[~random], ORANGE, "D")):
        if part.empty:
            continue
        x, y = part["gemms"].astype(float), part["ratio"].astype(float)
        low, high = part["ratio_low"].astype(float), part["ratio_high"].astype(float)
        axes.vlines(x, low, high, color=colour, linewidth=1.4)
        label = "random tables of chosen rank" if colour == BLUE else "multipliers with a name"
        axes.plot(x, y, mark, color=colour, markersize=3.8, label=label)
    named = ours[~random]
    for gemms, part in named.groupby(named["gemms"].astype(float)):
        first, y = part["multiplier"].iloc[0], float(part["ratio"].iloc[0])
        left = gemms > 1
        place = {"x": gemms / 1.15 if left else 1.1, "ha": "right" if left else "left"}
        axes.text(y=y, s=first, va="center" if left else "top", **place, **small)
    for path, colour in (("lookup", GREEN), ("compiled", PURPLE)):
        ratios = table[table["path"] == path]["ratio"].dropna().astype(float)
        for ratio in ratios:
            axes.axhline(ratio, color=colour, linewidth=1)
        if len(ratios):
            text = "look-ups, in PyTorch" if path == "lookup" else "look-ups, compiled loop"
            place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(0.99, ratios.max(), text, **place, **small | {"color": colour})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="int8 GEMMs (of a random table, 1 + rank)", ylabel=f"time / {baseline}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plain_log_ticks(axes.yaxis, table["ratio"].dropna().astype(float))
    axes.grid(axis="y", which="major")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.83), frameon=False, fontsize=6.5)
    axes.set_title(describe_rows(rows).replace(" · M", "\nM", 1), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


def caption_cost_against_rank(rows: pd.DataFrame) -> str:
    """What the marks of `cost_against_rank` are, and where they were measured."""
    first = rows.iloc[0]
    return (
        "The time of a layer under an inexact multiplier, over the time of one int8 GEMM, against "
        "how many of them it takes (of multipliers with equally many, one is named), on "
        f"{first['processor']} ({first['device']}, {words_of_threads(first['threads'])}); "
        "lines are intervals. Level lines are the table look-ups, "
        "which take as long whatever the table; the dotted line is what the GEMMs alone would take."
    )


def output_error(errors: pd.DataFrame, title: str) -> Chart:
    """A dot per output of the layer: bias and spread under each multiplier, over its signal."""
    names = list(errors["multiplier"].unique())
    long = errors.melt(["multiplier", "inputs", "output", "signal"], ["bias", "spread"], "part")
    long["percent"] = 100 * long["value"].astype(float) / long["signal"].astype(float)
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.9 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    inputs = list(long["inputs"].unique())
    for axes, part in zip(panels, ("bias", "spread"), strict=True):
        sns.stripplot(
            long[long["part"] == part].astype({"multiplier": str, "inputs": str}),
            x="percent",
            y="multiplier",
            order=names,
            hue="inputs",
            hue_order=inputs,
            palette=[BLUE, ORANGE],
            dodge=True,
            jitter=False,
            size=2.2,
            alpha=0.35,
            legend=part == "bias",
            ax=axes,
        )
        axes.set(xlabel=f"{part} / signal [%]", ylabel="")
        axes.grid(axis="x")
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
    panels[0].axvline(0, color=FAINT, linewidth=0.5)
    sns.move_legend(
        panels[0],
        "lower left",
        bbox_to_anchor=(-0.1, 1.0),
        ncols=2,
        frameon=False,
        fontsize=6.5,
        title=None,
        handletextpad=0.1,
        columnspacing=1,
    )
    figure.head(title)
    return figure


def caption_output_error(_: pd.DataFrame) -> str:
    """What the dots of `output_error` are."""
    return (
        "The error of a layer's outputs when every multiplication is done by the multiplier: its "
        "mean over the batch (bias) and its standard deviation (spread), over the standard "
        "deviation of the exact output; one dot for each output."
    )


def digits_accuracy(accuracies: pd.DataFrame, title: str) -> Chart:
    """One line per multiplier and kind of weights: each seed faintly, their mean boldly."""
    shown = accuracies.assign(percent=100 * accuracies["accuracy"].astype(float))
    return _marks_by_line(
        shown, title, x="percent", line="multiplier", mark="weights", xlabel="accuracy [%]",
        log=False, each=True,
    )  # fmt: skip


def caption_digits_accuracy(accuracies: pd.DataFrame) -> str:
    """What the dots of `digits_accuracy` are."""
    seeds = f"{accuracies['seed'].nunique()} seeds" if "seed" in accuracies else "several seeds"
    return (
        "The share of test images of scikit-learn's digits that a network of two layers names "
        "rightly, trained in float32 and then quantized with plain or with Fibonacci magnitudes, "
        f"under each multiplier. Faint dots are {seeds} of split and training, bold ones their "
        "means."
    )


RANDOM_TABLE = "random table"  # how the name of a table drawn at random begins


def _is_random(rows: pd.DataFrame) -> pd.Series:
    return rows["method"].astype(str).str.startswith(RANDOM_TABLE)


def _marks_by_line(
    rows: pd.DataFrame,
    title: str,
    *,
    x: str,
    line: str,
    mark: str,
    xlabel: str,
    log: bool = True,
    each: bool = False,
) -> Chart:
    """One line per value of `line`, with its name on it, and a coloured mark per value of `mark`.

    With `each` the rows are faint dots and their mean is the bold one.
    """
    lines, marks = list(rows[line].unique()), list(rows[mark].unique())
    colours = dict(zip(marks, (BLUE, ORANGE, GREEN, PURPLE, RED), strict=False))
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.05 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(lines):
        for index, kind in enumerate(marks):
            values = rows[(rows[line] == name) & (rows[mark] == kind)][x].astype(float)
            if values.empty:
                continue
            y = place + 0.16 * (index - (len(marks) - 1) / 2) if each else place
            if each:
                axes.plot(values, [y] * len(values), "o", color=colours[kind], markersize=2.5,
                          alpha=0.3, markeredgewidth=0)  # fmt: skip
            axes.plot([values.mean()], [y], "oDs^v"[index], color=colours[kind], markersize=4,
                      label=kind if place == 0 or kind not in _labels(axes) else None)  # fmt: skip
        axes.text(0.0, place - 0.34, name, transform=axes.get_yaxis_transform(), fontsize=7,
                  va="center")  # fmt: skip
    if log:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis, rows[x].astype(float))
    axes.set(xlabel=xlabel, yticks=[], ylim=(len(lines) - 0.6, -0.7))
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2 + len(marks) % 2,
        fontsize=6.5,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    figure.head(title)
    return figure


def _labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]
