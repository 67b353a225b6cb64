"""Charts of Fibonacci codes and inexact multipliers."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from posmat.charts.style import (
    BLUE,
    COLOURS,
    COLUMN_WIDTH_IN,
    FAINT,
    GREEN,
    INK,
    MARKS,
    ORANGE,
    PURPLE,
    Chart,
    as_text,
    chart_of_nothing,
    counted,
    dots_on_lines,
    listed,
    name_of,
    plain_log_ticks,
    subtitle,
    summary_of,
    words_of_range,
    write_on_line,
)
from posmat.measure.summary import AGAIN, baseline_of


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
    moved = codes["away"].to_numpy(int)
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


def codes_apart(codes: pd.DataFrame) -> pd.DataFrame:
    """Each magnitude with what it is, in words, and how far away its nearest code is."""
    is_code = codes["is_code"].astype(bool)
    kinds = {True: f"{is_code.sum()} codes", False: f"{(~is_code).sum()} others"}
    return codes.assign(kind=is_code.map(kinds), away=codes["nearest"] - codes["magnitude"])


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
    """A heat map per multiplier of product minus true product, each in a scale of its own.

    Where no multiplier errs in both directions the scale is that of the size of the error, from
    light to dark; else it goes from dark to light, so that its ends differ in greys too.
    """
    tables = _tables(errors)
    two_sided = any(table.min() < 0 < table.max() for table in tables.values())
    rows = -(-len(tables) // 3)
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.9 + 1.38 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
        largest = _largest(table)
        scaled = table / max(1.0, abs(largest))
        image = axes.imshow(
            scaled if two_sided else np.abs(scaled),
            origin="lower",
            interpolation="nearest",
            cmap="cividis" if two_sided else "Blues",
            vmin=-1 if two_sided else 0,
            vmax=1,
        )
        wrong = f"{100 * (table != 0).mean():.0f} % wrong"
        axes.set_title(f"{name}\n{wrong}\nworst {_signed(largest)}", fontsize=7, loc="left")
        axes.set(xticks=[0, 64, 127], yticks=[0, 64, 127])
        axes.tick_params(labelsize=6.5, length=2)
        axes.spines[["left", "bottom"]].set_visible(False)
    for axes in list(panels.flat)[len(tables) :]:
        axes.set_visible(False)
    ticks = {-1: "too small", 0: "exact", 1: "too large"} if two_sided else _one_sided_ticks(tables)
    bar = figure.colorbar(
        image, ax=panels, location="bottom", shrink=0.5, aspect=30, pad=0.02, ticks=list(ticks)
    )
    bar.set_ticklabels(list(ticks.values()), fontsize=6.5)
    bar.outline.set_edgecolor(FAINT)
    bar.outline.set_linewidth(0.5)
    panels[-1, 1].set_xlabel("input's magnitude")
    panels[rows // 2, 0].set_ylabel("weight's magnitude", y=1.1 if rows % 2 == 0 else 0.5)
    figure.head(title)
    return figure


def _one_sided_ticks(tables: dict[str, np.ndarray]) -> dict[float, str]:
    """What the ends of the scale are called where every multiplier errs in one direction."""
    directions = {np.sign(_largest(table)) for table in tables.values()} - {0}
    end = {-1: "too small", 1: "too large"}.get(next(iter(directions), 0), "wrong")
    return {0: "exact", 1: "the worst" if len(directions) > 1 else f"the worst, {end}"}


def _tables(errors: pd.DataFrame) -> dict[str, np.ndarray]:
    """The error of each multiplier: a row for each weight, a column for each input."""
    return {
        str(name): own.sort_values("weight").drop(columns=["multiplier", "weight"]).to_numpy(float)
        for name, own in errors.groupby("multiplier", sort=False)
    }


def _largest(table: np.ndarray) -> float:
    """The error that is furthest from 0, with its sign."""
    return table.flat[np.abs(table).argmax()]


def _signed(value: float) -> str:
    return f"{value:,.0f}".replace("-", "−")


def caption_error_tables(errors: pd.DataFrame) -> str:
    """What a cell of `error_tables` is."""
    width = next(iter(_tables(errors).values())).shape[1]
    return (
        "The error of inexact multipliers, product minus true product, for every weight's and "
        f"every input's magnitude of 0 to {width - 1}; each colour scale ends at the multiplier's "
        "own largest error, which stands above it."
    )


def cost_against_rank(rows: pd.DataFrame, title: str) -> Chart:
    """A dot per multiplier: how many GEMMs it takes, and how many times the time of one.

    The square at 1 is the control, the same GEMM timed a second time, whose whisker is the noise.
    """
    baseline = baseline_of(rows)
    table = lines_of_costs(rows)
    ours = table[table["path"] == "gemm"]
    if ours.empty:
        return chart_of_nothing(title, f"No multiplier has a time over that of {baseline} here.")
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 3.1), layout="constrained")
    axes = figure.subplots()
    random = ours["multiplier"].str.startswith(RANDOM_TABLE).astype(bool)
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
        if part["wrong"].any():
            wrong = part["wrong"]
            axes.scatter(x[wrong], y[wrong], s=5, color="white", zorder=3)
    named = ours[~random]
    first_of = named.groupby(named["gemms"].astype(float))["ratio"].first().astype(float)
    close = {1, 2} <= set(first_of.index) and 2 / 3 < first_of[1] / first_of[2] < 3 / 2
    for gemms, part in named.groupby(named["gemms"].astype(float)):
        first, y = part["multiplier"].iloc[0], float(part["ratio"].iloc[0])
        if close and gemms == 1:
            y *= 1.5  # or its name would be written over that of two GEMMs
        left = gemms > 1
        place = {"x": gemms / 1.15 if left else 1.1, "ha": "right" if left else "left"}
        name = name_of(first, part["wrong"].iloc[0])
        axes.text(y=y, s=name, va="center", **place, **small)
    if f"{baseline}{AGAIN}" in table.index:
        again = table.loc[f"{baseline}{AGAIN}"]
        axes.vlines(1, float(again["ratio_low"]), float(again["ratio_high"]), color=INK, lw=1.4)
        axes.scatter([1], [float(again["ratio"])], s=14, marker="s", color=INK, zorder=3)
        axes.text(1.16, float(again["ratio"]), f"one GEMM again: {words_of_range(again)}",
                  va="top", fontsize=6.5)  # fmt: skip
    levels = {
        path: table[table["path"] == path]["ratio"].astype(float)
        for path in ("lookup", "compiled")
        if (table["path"] == path).any()
    }
    highest = max(levels, key=lambda path: levels[path].max(), default="")
    for path, ratios in levels.items():
        colour, dashes = (GREEN, "-") if path == "lookup" else (PURPLE, (0, (4, 2)))
        for ratio in ratios:
            axes.axhline(ratio, color=colour, linewidth=1, linestyle=dashes)
        text = "look-ups, in PyTorch" if path == "lookup" else "look-ups, compiled loop"
        # The highest line bears its name above, the other one below: they may lie close.
        y, va = (1.05 * ratios.max(), "bottom") if path == highest else (0.95 * ratios.min(), "top")
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": va}
        axes.text(0.78, y, text, **place, **(small | {"color": as_text(colour)}))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="GEMMs (of a random table, 1 + rank)", ylabel=f"time / {baseline}")
    axes.set_ylim(bottom=0.55)  # the line below the control's mark is inside
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plain_log_ticks(axes.yaxis, table["ratio"].astype(float))
    axes.grid(axis="y", which="major")
    # Below the GEMMs alone no mark can be, and no line of look-ups has its name there.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.16), frameon=False, fontsize=6.5)
    subtitle(axes, rows, longest=0)
    figure.head(title)
    return figure


def lines_of_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the summary that have a ratio, with multiplier, path and number of GEMMs."""
    host = rows[rows["clock"] == "host"]
    facts = host.groupby("method", sort=False)[["multiplier", "path", "gemms"]].first()
    table = summary_of(rows)
    return table[(table["state"] == "timed") & table["ratio"].notna()].join(facts)


def caption_cost_against_rank(rows: pd.DataFrame) -> str:
    """What the marks of `cost_against_rank` are, and where they were measured."""
    first = rows.iloc[0]
    baseline = baseline_of(rows)
    table = lines_of_costs(rows)
    where = f"{first['processor']} ({first['device']}, {counted(first['threads'], 'thread')})"
    if table[table["path"] == "gemm"].empty:
        return f"No multiplier has a time over that of {baseline} on {where}."
    control = (
        f" The square at 1 is {baseline} timed a second time, whose interval is the noise floor."
        if f"{baseline}{AGAIN}" in table.index
        else ""
    )
    paths = table["path"].isin(["lookup", "compiled"])
    level = (
        " Level lines are the table look-ups, which take as long whatever the table;"
        if paths.any()
        else ""
    )
    wrong = table.loc[table["wrong"], "multiplier"].dropna().unique()
    hollow = f" Hollow marks are wrong: {listed(list(wrong))}." if len(wrong) else ""
    return (
        f"The time of a layer under an inexact multiplier, over that of {baseline}, one GEMM, "
        "against how many of them it takes (of multipliers with equally many, one is named), on "
        f"{where}; lines are intervals.{control}{level}"
        f"{' the' if level else ' The'} dotted line is what the GEMMs alone would take.{hollow}"
    )


def output_error(shares: pd.DataFrame, title: str) -> Chart:
    """A faint dot per output: bias and spread under each multiplier, over its signal.

    The bold mark is the median of the outputs, in a shape for each kind of inputs.
    """
    names, inputs = list(shares["multiplier"].unique()), list(shares["inputs"].unique())
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.9 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].axvline(0, color=FAINT, linewidth=0.5)
    looks, shifts = _looks(inputs, 0.36)
    y = shares["multiplier"].map(names.index) + shares["inputs"].map(shifts)
    above = {"loc": "lower left", "bbox_to_anchor": (-0.1, 1.0), "ncols": 2, "fontsize": 7}
    above |= {"handletextpad": 0.1, "columnspacing": 1, "markerscale": 1.2}
    for axes, part in zip(panels, ("bias", "spread"), strict=True):
        points = pd.DataFrame({"x": shares[part], "y": y, "kind": shares["inputs"]})
        dots_on_lines(
            axes, points, looks, len(names), f"{part} / signal [%]", log=False,
            faint={"size": 2.4, "alpha": 0.3}, legend=above if part == "bias" else None,
            size=4.6, markeredgecolor="white", markeredgewidth=0.4,
        )  # fmt: skip
        axes.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
        axes.tick_params(left=False)
    figure.head(title)
    return figure


def _looks(kinds: list[str], apart: float) -> tuple[dict[str, tuple[str, str]], dict[str, float]]:
    """Colour and mark of each kind, and how far off its line it stands."""
    looks = zip(kinds, zip(COLOURS * len(kinds), MARKS * len(kinds), strict=False), strict=False)
    middle = (len(kinds) - 1) / 2
    return dict(looks), {kind: apart * (place - middle) for place, kind in enumerate(kinds)}


def shares_of_signal(errors: pd.DataFrame) -> pd.DataFrame:
    """Bias and spread of every output, in percent of its signal."""
    signal = errors["signal"].astype(float)
    return errors.assign(
        **{part: 100 * errors[part].astype(float) / signal for part in ("bias", "spread")}
    )


def caption_output_error(_: pd.DataFrame) -> str:
    """What the dots of `output_error` are."""
    return (
        "The error of a layer's outputs when every multiplication is done by the multiplier: its "
        "mean over the batch (bias) and its standard deviation (spread), over the standard "
        "deviation of the exact output; a faint dot for each output, a bold mark for their median."
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
    looks, shifts = _looks(marks, 0.16 if each else 0)
    y = rows[line].map(lines.index) + rows[mark].map(shifts)
    points = pd.DataFrame({"x": rows[x].astype(float), "y": y, "kind": rows[mark]})
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.05 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 2 + len(marks) % 2}
    above |= {"fontsize": 6.5, "handletextpad": 0.1, "columnspacing": 1.2}
    dots_on_lines(
        axes, points, looks, len(lines), xlabel, log=log, centre="mean",
        faint={"size": 2.5, "alpha": 0.3} if each else None, legend=above,
    )  # fmt: skip
    for place, name in enumerate(lines):
        write_on_line(axes, place, name)
    figure.head(title)
    return figure
