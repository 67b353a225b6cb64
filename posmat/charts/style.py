"""What all charts share: their look, their class, and the words for where rows were measured."""

import io
import re
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from seaborn.utils import relative_luminance

from posmat.measure.files import replacing, rows_digest
from posmat.measure.summary import format_figures, is_control, summarize

COLUMN_WIDTH_IN = 3.5  # one column of a two-column paper
INK, FAINT = "#222222", "#767676"  # both hold 4.5 : 1 on white
BLUE, ORANGE, GREEN, RED, PURPLE, *_ = sns.color_palette("colorblind").as_hex()
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
MARKS = "oDs^vPX"  # a shape for each line too: in greys the colours look alike
ALT_LENGTH = 400  # letters of lines in an alternative text, which is heard at one go
READABLE = 4.5  # the contrast of small text with white that WCAG asks for

STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "figure.dpi": 150,
    "savefig.dpi": 200,
}


class Chart(Figure):
    """A figure that a notebook shows as it is saved, with its caption and itself in words."""

    caption = ""
    alt = ""
    title = ""
    reads = ("{stem}.csv",)  # the files of its run that it was drawn from

    def head(self, title: str) -> None:
        """Put the title over the whole figure, at its left edge."""
        self.suptitle(title, x=0.01, ha="left", fontsize=8.5)

    def keep(self, figure_id: str, folder: Path, stem: str, suffix: str) -> None:
        """Write the figure beside the files of its run, as a notebook keeps it."""
        digest = rows_digest(folder / pattern.format(stem=stem) for pattern in self.reads)
        self.write(figure_id, digest, folder, suffix)

    def write(self, figure_id: str, digest: str, folder: Path, suffix: str) -> None:
        """Write .svg, .pdf and .png, with id, caption and the rows' sha256 inside.

        The same rows give the same bytes under the same matplotlib: no date, no random id.
        """
        title, source = f"posmat: {self.title}", f"rows sha256 {digest}"
        facts = {"Title": title, "Description": self.caption, "Source": source}
        facts["Identifier"] = figure_id
        words = {"Title": title, "Subject": self.caption, "Keywords": f"{figure_id}; {source}"}
        metadata = {
            "svg": facts | {"Date": None},
            "pdf": words | {"CreationDate": None},
            "png": facts,
        }
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure_id}):
            self.draw_without_rendering()  # lays it out, once for the three
            self.set_layout_engine(None)
            for kind, facts in metadata.items():
                with replacing(folder / f"{figure_id}{suffix}.{kind}") as temporary:
                    self.savefig(temporary, format=kind, metadata=facts)

    def _repr_png_(self) -> tuple[bytes, dict]:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=200)
        width, height = self.get_size_inches()
        size = {"width": round(150 * width), "height": round(150 * height)}
        return buffer.getvalue(), {**size, "alt": self.alt or self.caption}


def chart_of_nothing(title: str, why: str) -> Chart:
    """A chart that says in words why there is nothing to draw."""
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.9), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0, 0.5, why, transform=axes.transAxes, va="center", wrap=True)
    figure.head(title)
    return figure


def contrast(colour: str | tuple) -> float:
    """The contrast of a colour with white, as WCAG 2 computes it: 1 for white, 21 for black."""
    return 1.05 / (relative_luminance(colour) + 0.05)


def as_text(colour: str) -> str:
    """A colour darkened until small text in it can be read on white."""
    shade = to_rgb(colour)
    while contrast(shade) < READABLE:
        shade = tuple(0.98 * part for part in shade)
    return to_hex(shade)


def apart(places: list[float], least: float) -> np.ndarray:
    """Move labels as little as it takes to keep them `least` apart, in the order they stand in."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, dtype=float)[order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            short = least - (moved[i + 1] - moved[i])
            if short > 1e-9:
                moved[i : i + 2] += (-short / 2, short / 2)
    result = np.empty_like(moved)
    result[order] = moved
    return result


def describe_rows(rows: pd.DataFrame) -> str:
    """Where and on what rows were measured, in one line."""
    first = rows.iloc[0]
    processor = re.sub(r"\(R\)|\(TM\)| Processor", "", first["processor"])  # it must fit a column
    parts = [f"{processor}, {first['device']}", first["dtype"]]
    sizes = {"batch_size": "M", "out_features": "N", "in_features": "K"}
    parts += [f"{sizes[name]} = {first[name]:,}" for name in sizes if rows[name].nunique() == 1]
    threads = [counted(first["threads"], "thread")] if rows["threads"].nunique() == 1 else []
    return " · ".join(parts + threads)


def subtitle(axes: Axes, rows: pd.DataFrame, longest: int = 72) -> None:
    """Put where rows were measured over a chart as wide as a column, in two lines if it is long."""
    line = describe_rows(rows)
    line = line if len(line) <= longest else line.replace(" · M", "\nM", 1)
    axes.set_title(line, fontsize=6.5, color=FAINT)


def counted(number: int, noun: str) -> str:
    """A number and what is counted: '1 run', '5 runs'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def words_of_kernels(runs: int) -> str:
    return "one fresh kernel" if runs == 1 else f"{runs} fresh kernels"


def words_of_rounds(rows: pd.DataFrame) -> str:
    """How often whatever has a time was timed: '31 rounds in each of 5 fresh kernels'."""
    timed = rows[rows["state"] == "timed"]
    if timed.empty:
        return "nothing was timed"
    rounds = timed.groupby(["method", "run"])["round"].nunique()
    runs = timed["run"].nunique()
    most = "up to " if rounds.nunique() > 1 else ""
    each = "each of " if runs > 1 else ""
    return f"{most}{counted(rounds.max(), 'round')} in {each}{words_of_kernels(runs)}"


def words_of_range(line: pd.Series, inverse: bool = False) -> str:
    """A ratio, or with `inverse` the speedup, with its interval: '0.995× (0.991 to 1.003)'."""
    ends = line[["ratio", "ratio_low", "ratio_high"]].astype(float)
    if inverse:
        ends = 1 / ends.iloc[[0, 2, 1]]
    # Near 1, where noise is a matter of the third place, to three of them.
    words = [f"{end:.3f}" if 0.9 < end < 1.1 else format_figures(end) for end in ends]
    return "{}× ({} to {})".format(*words)


def name_of(method: str, wrong: bool) -> str:
    """A method as its line is labelled: whoever computes wrong numbers says so."""
    if not wrong:
        return method
    return f"{method[:-1]}, wrong)" if method.endswith(")") else f"{method} (wrong)"


def words_of_wrong(table: pd.DataFrame) -> str:
    """The sentence of a caption on the hollow marks, or nothing where every number is right."""
    wrong = [str(name) for name in table.index[table["wrong"]] if not is_control(name)]
    if not wrong:
        return ""
    return (
        f" Hollow marks and the word 'wrong': the numbers are not those of the reference "
        f"({'; '.join(wrong)})."
    )


def listed(words: list[str]) -> str:
    """Words as a sentence lists them: 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def value_of(method: str, line: pd.Series, ratio: str) -> str:
    """A line's median, its ratio in the form that is asked for, and where it has no more."""
    if line["state"] != "timed":
        return str(line["state"])
    value = f"{format_figures(1e3 * line['median'])} ms"
    if has_ratio(method, line):
        value += ratio.format(format_figures(line["ratio"]))
    runs = line["all_runs"]
    return value if line["runs"] == runs else f"{value}, in {line['runs']} of {runs} runs"


def has_ratio(method: str, line: pd.Series) -> bool:
    """Whether a ratio says something: not beside the baseline, nor for what a call alone costs."""
    ratio = line["ratio"]
    return method != line["baseline"] and pd.notna(ratio) and bool(ratio > 0.01)


def medians(by: list[str], values: dict[str, str], of: Callable | None = None) -> Callable:
    """What makes the table of a frame that is no summary of times, for `in_words`.

    Args:
        by: the columns that set its lines apart.
        values: the columns whose median and range it has, and what each is called.
        of: makes the frame that has these columns of the one that is given.
    """

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        frame = of(frame) if of else frame
        columns = 0.0 + frame[list(values)].astype(float).rename(columns=values)  # -0 is 0
        return columns.groupby([frame[name] for name in by], sort=False).agg(_median_and_range)

    return table


def _median_and_range(values: pd.Series) -> str:
    low, middle, high = (
        format_figures(value).replace("-", "−") for value in values.quantile([0, 0.5, 1])
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def in_words(kind: str, table: pd.DataFrame) -> str:
    """A chart for who cannot see it: what kind it is, and the first lines of its table."""
    said = [_line_in_words(name, line) for name, line in table.iterrows()]
    fit = max(1, int((np.cumsum([len(one) for one in said]) <= ALT_LENGTH).sum()))
    more = f"; and {len(said) - fit} more" if said[fit:] else ""
    return f"{kind}: {'; '.join(said[:fit]) or 'nothing to show'}{more}."


def _line_in_words(name: str | tuple, line: pd.Series) -> str:
    words = ", ".join(name) if isinstance(name, tuple) else str(name)
    if "state" in line:
        gap = " " if line["state"] == "timed" else ": "
        return name_of(words, line["wrong"]) + gap + value_of(words, line, " ({} times)")
    if len(line) == 1:  # what it is, the chart's kind says
        return f"{words} {line.iloc[0]}"
    return f"{words}: {', '.join(f'{what} {value}' for what, value in line.items())}"


def dots_on_lines(
    axes,
    points: pd.DataFrame,
    looks: dict[str, tuple[str, str]],
    lines: int,
    xlabel: str,
    *,
    log: bool = True,
    centre: str = "median",
    whisker: tuple[str, int] | None = None,
    faint: dict | None = None,
    legend: dict | None = None,
    size: float = 4,
    **bold,
) -> None:
    """On each line a bold dot with its whisker, and faintly the dots that they are of.

    Args:
        axes: where to draw.
        points: `x`, `y` (0 for the first line, or a little off), the `kind` of dot, and `hollow`
            where the bold dot of some has no face.
        looks: colour and mark of each kind, in the order of the legend.
        lines: how many there are.
        xlabel: what `x` is.
        log: whether `x` is shown on a logarithmic axis.
        centre: seaborn's name of where the bold dot stands.
        whisker: seaborn's name of what the whisker spans.
        faint: how the dots of `points` look, where they are shown.
        legend: where the legend stands, where there is one.
        size: of the bold dots, which `bold` says more of.
    """
    axes.set(xscale="log" if log else "linear")
    points = points if "hollow" in points else points.assign(hollow=False)
    handles = []
    for kind, (colour, mark) in looks.items():
        own = points[points["kind"] == kind]
        if own.empty:
            continue
        shared = {"data": own, "x": "x", "y": "y", "color": colour, "orient": "y", "ax": axes}
        if faint:
            sns.stripplot(**shared, native_scale=True, jitter=False, marker=mark, **faint)
        look = {"markersize": size, "linestyle": "none", "zorder": 4} | bold
        sns.pointplot(**shared, native_scale=True, estimator=centre, errorbar=whisker, markers=mark,
                      err_kws={"linewidth": 1.6}, **look)  # fmt: skip
        hollow = own[own["hollow"]].groupby("y")["x"].agg(centre)
        if len(hollow):
            dot = {"markersize": size + 1.5, "markeredgewidth": 1.3, "markerfacecolor": "white"}
            axes.plot(hollow, hollow.index, mark, color=colour, zorder=5, **dot)
        face = "white" if own["hollow"].all() else colour
        look = {"color": colour, "markerfacecolor": face, "marker": mark} | look
        handles.append(Line2D([], [], label=kind, **look))
    axes.set(xlabel=xlabel, ylabel="", yticks=[], ylim=(lines - 0.6, -0.75))
    if points.empty:
        axes.set_xticks([])
    elif log:
        plain_log_ticks(axes.xaxis, points["x"])
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    if legend:
        axes.legend(handles=handles, frameon=False, **legend)


def with_ends(points: pd.DataFrame) -> pd.DataFrame:
    """Each point three times, as itself and as its `low` and `high`: their range is its whisker."""
    ends = [points.assign(x=points[name]) for name in ("low", "high")]
    return pd.concat([points, *ends]).dropna(subset="x")


def write_on_line(axes, place: int, left: str, right: str = "", colour: str = INK) -> None:
    """A line's name at its left and a value at its right, above the dots."""
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "color": colour}
    axes.text(0.0, place - 0.32, left, ha="left", fontsize=7.5, **style)
    if right:
        axes.text(1.0, place - 0.32, right, ha="right", fontsize=7, **style)


def plain_log_ticks(axis, values: pd.Series) -> None:
    """Ticks written as plain numbers, at 1, 2 and 5 where the range is short."""
    decades = np.log10(values.max() / values.min()) if len(values) else 1
    subs = (1, 2, 5) if decades < 2 else (1,)
    few = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])  # in half a decade 1, 2, 5 leave one or none
    axis.set_major_locator(few if decades < 0.7 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


_KEPT: ContextVar[dict[tuple[int, str], tuple] | None] = ContextVar("kept", default=None)


@contextmanager
def summaries_kept():
    """Within it a frame is summarized once: chart, caption and words ask for the same table.

    Only for whoever changes no frame meanwhile, as `posmat draw`; a notebook may.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept(make: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable:
    """Have `make` make what it makes of a frame once within `summaries_kept`."""

    @wraps(make)
    def of(rows: pd.DataFrame) -> pd.DataFrame:
        store = _KEPT.get()
        if store is None:
            return make(rows)
        key = id(rows), make.__name__
        if key not in store:  # with the frame beside what was made, its id stays its own
            store[key] = rows, make(rows)
        return store[key][1]

    return of


@kept
def summary_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The table that `summarize` gives of what the host's clock timed, as charts need it.

    What has a time in some runs is 'timed', and `runs` are those that timed it, of `all_runs`.
    `wrong` says whether a method's numbers were not exact, or further off than the bound.
    """
    rows = rows[rows["clock"] == "host"]
    table = summarize(rows)
    table["state"] = table["state"].mask(table["median"].notna(), "timed")
    table["all_runs"] = rows["run"].nunique()
    wrong = rows.assign(wrong=_is_wrong(rows)).groupby("method")["wrong"].any()
    table["wrong"] = wrong.reindex(table.index).astype(bool)
    return table


def _is_wrong(rows: pd.DataFrame) -> pd.Series:
    """Of each row, whether its numbers were compared and found wrong."""
    wrong = rows["exact"].astype("boolean").eq(False).fillna(False)
    if "error_bound" in rows:
        error, bound = (rows[name].astype("Float64") for name in ("max_error", "error_bound"))
        # An error that is no number, beside a bound, is that of a result that is none.
        wrong |= (error > bound).fillna(bound.notna() & error.isna())
    return wrong.astype(bool)
