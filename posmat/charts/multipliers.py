"""Charts of Fibonacci codes and inexact multipliers."""

import numpy as np
import pandas as pd
from matplotlib.colors import FuncNorm
from matplotlib.ticker import FuncFormatter

from posmat.charts import style
from posmat.charts.style import BLUE, COLUMN_WIDTH_IN, FAINT, GREEN, INK, ORANGE, PURPLE, Chart
from posmat.measure.roofline import FLOAT32_LAYER
from posmat.measure.summary import AGAIN, baseline_of

RANDOM_TABLE = "random table"  # how the name of a table drawn at random begins


def fibonacci_codes(codes: pd.DataFrame, title: str) -> Chart:
    """Each code as a column of its bits at its place on the number line, and how far others go."""
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 3.1))
    bits, distance = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    magnitudes = codes["magnitude"].to_numpy(int)
    kept = codes.loc[codes["is_code"].astype(bool), "magnitude"].to_numpy(int)
    width = max(1, int(magnitudes.max()).bit_length())
    places, heights = np.nonzero(kept[:, None] >> np.arange(width) & 1)
    bits.vlines(kept, -0.7, width - 0.3, color="#e8e8e8", linewidth=0.7)
    bits.vlines(kept[places], heights - 0.36, heights + 0.36, color=BLUE, linewidth=0.9)
    bits.set(ylabel="bit", yticks=range(width), ylim=(-0.7, width - 0.3))
    bits.tick_params(length=0)
    share = f"{len(kept)} of {len(magnitudes)} magnitudes are codes; a mark is a one"
    bits.set_title(share, fontsize=6.5, color=FAINT)
    moved = codes["away"].to_numpy(int)
    distance.axhline(0, color=FAINT, linewidth=0.5)
    distance.vlines(magnitudes, 0, moved, color=ORANGE, linewidth=0.7)
    distance.plot(magnitudes, moved, "o", color=ORANGE, markersize=1.6, markeredgewidth=0)
    last = int(kept.max())
    distance.text(last + 1, 2, f"beyond {last},\nthe last code", fontsize=6.5)
    distance.set(xlabel="magnitude", ylabel="nearest code − magnitude")
    distance.set_xticks([0, 21, 32, 42, 64, 85, 127])
    distance.grid(axis="y")
    return figure


def codes_apart(codes: pd.DataFrame) -> pd.DataFrame:
    """Each magnitude with what it is, in words, and how far away its nearest code is."""
    is_code = codes["is_code"].astype(bool)
    kinds = {True: f"{is_code.sum()} codes", False: f"{(~is_code).sum()} others"}
    return codes.assign(kind=is_code.map(kinds), away=codes["nearest"] - codes["magnitude"])


def fibonacci_rounding(rounding: pd.DataFrame, title: str) -> Chart:
    """One line per distribution of weights, one mark per set of codes: the relative error."""
    points = rounding.rename(columns={"distribution": "line", "codes": "kind"})
    points["x"] = 100 * points["relative_error"].astype(float)
    return _marks_by_line(points, title, 0.13, xlabel="relative RMS error [%]")


def error_tables(errors: pd.DataFrame, title: str) -> Chart:
    """A heat map per multiplier of its error, all in one scale of signed square roots."""
    errors = errors.sort_values("weight", kind="stable").drop(columns="weight")
    tables = dict(list(errors.groupby("multiplier", sort=False)))
    rows = -(-len(tables) // 3)
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 0.9 + 1.38 * rows))
    panels = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
    largest = max(1.0, errors.drop(columns="multiplier").abs().to_numpy(float).max())
    roots = (lambda e: np.sign(e) * np.sqrt(np.abs(e)), lambda root: np.sign(root) * root**2)
    colours = {"cmap": "RdBu_r", "norm": FuncNorm(roots, -largest, largest)}
    for axes in panels.flat[len(tables) :]:
        axes.set_visible(False)
    for axes, (name, own) in zip(panels.flat, tables.items(), strict=False):
        table = own.drop(columns="multiplier").to_numpy(float)
        worst = table.flat[np.abs(table).argmax()]
        image = axes.imshow(table, origin="lower", interpolation="nearest", **colours)
        words = f"{100 * (table != 0).mean():.0f} % wrong\nworst {worst:,.0f}".replace("-", "−")
        axes.set_title(f"{name}\n{words}", fontsize=7, loc="left")
        axes.set(xticks=[0, 64, 127], yticks=[0, 64, 127])
        axes.tick_params(labelsize=6.5, length=2)
        axes.spines[["left", "bottom"]].set_visible(False)
    ends = np.unique(np.round([largest / 4, largest]))
    place = {"location": "bottom", "shrink": 0.8, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(image, ax=panels, ticks=[*-ends[::-1], 0, *ends], **place)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda e, _: f"{e:,.0f}".replace("-", "−")))
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label("product − true product", fontsize=7)
    bar.outline.set(edgecolor=FAINT, linewidth=0.5)
    panels[-1, 1].set_xlabel("input's magnitude")
    panels[rows // 2, 0].set_ylabel("weight's magnitude", y=1.1 if rows % 2 == 0 else 0.5)
    return figure


_RANDOM, _NAMED = "random tables of chosen rank", "multipliers with a name"
_LOOKUPS, _COMPILED = "look-ups, in PyTorch", "look-ups, compiled loop"
_AGAIN = "one GEMM again"


def cost_against_rank(rows: pd.DataFrame, title: str) -> Chart:
    """A dot per multiplier: its GEMMs and the times of one; the square at 1 is the control."""
    baseline, table = baseline_of(rows), lines_of_costs(rows)
    if not (table["path"] == "gemm").any():
        why = f"No multiplier has a time over that of {baseline} here."
        return style.chart_of_nothing(title, why)
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 3.4))
    axes = figure.subplots()
    looks = {_RANDOM: (BLUE, "o"), _NAMED: (ORANGE, "D"), _AGAIN: (INK, "s")}
    levels = {_LOOKUPS: (GREEN, "-"), _COMPILED: (PURPLE, "--")}
    most = table["gemms"].max()
    for (kind, wrong), own in table.groupby(["kind", "wrong"], sort=False):
        x, y, label = own["gemms"], own["ratio"], style.name_of(kind, wrong)
        if kind == _AGAIN:
            low, high = own.iloc[0][["ratio_low", "ratio_high"]].astype(float)
            label += f": {low:.3f}× to {high:.3f}×"
        if kind in levels:
            colour, dashes = levels[kind]
            axes.hlines(y, 1, most, colour, dashes, label=label)
        else:
            colour, mark = looks[kind]
            face = "white" if wrong else colour
            ends = y - own["ratio_low"], own["ratio_high"] - y
            axes.errorbar(x, y, ends, fmt=mark, color=colour, mfc=face, ms=3.8, label=label)
    axes.plot([1, most], [1, most], ":", color=FAINT, linewidth=0.8, label="the GEMMs alone")
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.6, 1.6 * most)  # the names at the ends are inside
    axes.set_xticks([2**n for n in range(int(most).bit_length())])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # for the names, every other one a line lower
    named = table[table["kind"] == _NAMED].groupby("gemms")
    for place, (gemms, own) in enumerate(named):
        axes.annotate(
            "\n".join(own["label"]), (gemms, own["ratio"].max()), (gemms, 1 - 0.06 * (place % 2)),
            textcoords=axes.get_xaxis_transform(), ha="center", va="top", fontsize=6.5, color=FAINT,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": FAINT, "shrinkB": 3},
            bbox={"color": "white", "pad": 0.6, "linewidth": 0}, zorder=1.5,
        )  # fmt: skip
    unit = "float32" if baseline == FLOAT32_LAYER else "int8"
    axes.set(xlabel=f"{unit} GEMMs, 1 + rank of a random table", ylabel=f"time / {baseline}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style.plain_log_ticks(axes.yaxis, table["ratio"])
    axes.grid(axis="y", which="major")
    small = {"fontsize": 6.5, "handlelength": 1.6, "columnspacing": 1.0}
    figure.legend(loc="outside lower left", ncols=2, frameon=False, **small)
    style.subtitle(axes, rows)
    return figure


def lines_of_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the summary that have a ratio, with multiplier, path, number of GEMMs, kind."""
    host = rows[rows["clock"] == "host"]
    facts = host.groupby("method", sort=False)[["multiplier", "path", "gemms"]].first()
    table = style.summary_of(rows).join(facts)
    table = table[(table["state"] == "timed") & table["ratio"].notna()]
    table = table.astype(dict.fromkeys(["ratio", "ratio_low", "ratio_high", "gemms"], float))
    again = table.index.str.endswith(AGAIN)
    kind = table["path"].map({"gemm": _NAMED, "lookup": _LOOKUPS, "compiled": _COMPILED})
    random = table["multiplier"].astype("string").str.startswith(RANDOM_TABLE, na=False)
    kind = kind.mask(random & (kind == _NAMED), _RANDOM).mask(again, _AGAIN)
    return table.assign(kind=kind, gemms=table["gemms"].mask(again, 1))


def caption_cost_against_rank(rows: pd.DataFrame) -> str:
    """What the marks of `cost_against_rank` are, and where they were measured."""
    baseline, table, where = baseline_of(rows), lines_of_costs(rows), style.measured_on(rows)
    if not (table["path"] == "gemm").any():
        return f"No multiplier has a time over that of {baseline} on {where}."
    control = style.words_of_control(table, "square at 1")
    levels = " Level lines are look-ups in the table, as many whatever its rank."
    return (
        f"The time of a layer under an inexact multiplier, over that of {baseline}, one GEMM, "
        f"against how many of them it takes, both axes logarithmic, on {where}. Names stand above "
        "their marks. A random table maps its inputs by look-ups, a single column as two. "
        f"Upright lines are {style.words_of_whiskers(table)}.{control}"
        f"{levels if table['kind'].isin([_LOOKUPS, _COMPILED]).any() else ''} The dotted line is "
        f"what the GEMMs alone would take.{style.words_of_wrong(table)}"
    )


def output_error(shares: pd.DataFrame, title: str) -> Chart:
    """A faint dot per output: its bias and spread over its signal; boldly the outputs' median."""
    names, inputs = list(shares["multiplier"].unique()), list(shares["inputs"].unique())
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 0.9 + 0.42 * len(names)))
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].axvline(0, color=FAINT, linewidth=0.5)
    looks, shifts = style.looks_of(inputs, 0.36)
    y = shares["multiplier"].map(names.index) + shares["inputs"].map(shifts)
    for axes, part in zip(panels, ("bias", "spread"), strict=True):
        points = pd.DataFrame({"x": shares[part], "y": y, "kind": shares["inputs"]})
        style.dots_on_lines(
            axes, points, looks, len(names), f"{part} / signal [%]", log=False, faint=True,
            columns=2 * (part == "bias"),
        )  # fmt: skip
        axes.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
        axes.tick_params(left=False)
    return figure


def shares_of_signal(errors: pd.DataFrame) -> pd.DataFrame:
    """Bias and spread of every output, in percent of its signal."""
    signal = errors["signal"].astype(float)
    parts = ("bias", "spread")
    return errors.assign(**{part: 100 * errors[part].astype(float) / signal for part in parts})


def digits_accuracy(accuracies: pd.DataFrame, title: str) -> Chart:
    """One line per multiplier and kind of weights: each seed faintly, their mean boldly."""
    points = accuracies.rename(columns={"multiplier": "line", "weights": "kind"})
    points["x"] = 100 * points["accuracy"].astype(float)
    return _marks_by_line(points, title, 0.16, xlabel="accuracy [%]", log=False, faint=True)


def network_accuracy(accuracies: pd.DataFrame, title: str) -> Chart:
    """One line per multiplier and weights, a mark per way of training: seeds, and their mean."""
    return _marks_by_line(
        ways_of(accuracies), title, 0.14, xlabel="accuracy [%]", log=False, faint=True
    )


def ways_of(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in percent, each with its line, what multiplies what, and how it was trained."""
    names = accuracies["multiplier"], accuracies["weights"]
    line = names[0].where(names[0] == names[1], names[0] + ", " + names[1])
    x = 100 * accuracies["accuracy"].astype(float)
    return accuracies.assign(line=line, kind=accuracies["training"], x=x)


def _marks_by_line(points: pd.DataFrame, title: str, apart: float, **how) -> Chart:
    """The mean of `x` of each `kind` on each `line`, the kinds of a line so far `apart`."""
    names = list(points["line"].unique())
    looks, shifts = style.looks_of(list(points["kind"].unique()), apart)
    points["y"] = points["line"].map(names.index) + points["kind"].map(shifts) + 0.1  # off names
    how |= {"looks": looks, "centre": "mean", "columns": 2 + len(looks) % 2}
    return style.chart_of_lines(title, names, points, **how)
