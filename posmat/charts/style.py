"""What all charts share: their look, their class, and the words for where rows were measured."""

import io
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import pairwise, product, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from posmat.measure.files import replacing, rows_digest
from posmat.measure.summary import AGAIN, FLOOR, baseline_of, format_figures, is_control, summarize

COLUMN_WIDTH_IN = 3.5  # one column of a two-column paper
DPI = 200
INK, FAINT = "#222222", "#767676"  # both hold 4.5 : 1 on white
BLUE, ORANGE, GREEN, RED, PURPLE, *_ = sns.color_palette("colorblind").as_hex()
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
MARKS = "oDs^vPX"  # a shape for each line too: in greys the colours look alike
ALT_LENGTH = 400  # letters of lines in an alternative text, which is heard at one go

STYLE = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["font.size", "axes.labelsize"], 7.5),
    **dict.fromkeys(["xtick.labelsize", "ytick.labelsize"], 7),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,  # text stays text, in the PDF as in the SVG
    "svg.fonttype": "none",
    "figure.dpi": 150,
    "savefig.dpi": DPI,
}


class Chart(Figure):
    """A figure that a notebook shows as it is saved, with its caption and itself in words."""

    caption = ""
    alt = ""
    title = ""
    reads = ("{stem}.csv",)  # the files of its run that it was drawn from

    def __init__(self, heading: str = "", **how):
        super().__init__(layout="constrained", **how)
        self.suptitle(heading, x=0.01, ha="left", fontsize=8.5)  # over the whole figure

    def keep(self, figure_id: str, folder: Path, stem: str, suffix: str) -> None:
        """Write the figure beside the files of its run, as a notebook keeps it."""
        digest = rows_digest(folder / pattern.format(stem=stem) for pattern in self.reads)
        self.write(figure_id, digest, folder, suffix)

    def write(self, figure_id: str, digest: str, folder: Path, suffix: str) -> None:
        """Write .svg, .pdf and .png, with id, caption and the rows' sha256 inside.

        The same rows give the same bytes under the same matplotlib: no date, no random id.
        """
        title, source = {"Title": f"posmat: {self.title}"}, f"rows sha256 {digest}"
        facts = title | {"Description": self.caption, "Source": source, "Identifier": figure_id}
        words = title | {"Subject": self.caption, "Keywords": f"{figure_id}; {source}"}
        svg, pdf = facts | {"Date": None}, words | {"CreationDate": None}
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure_id}):
            self.draw_without_rendering()  # lays it out, once for the three
            self.set_layout_engine(None)
            for kind, metadata in {"svg": svg, "pdf": pdf}.items():
                with replacing(folder / f"{figure_id}{suffix}.{kind}") as temporary:
                    self.savefig(temporary, format=kind, metadata=metadata)
            with replacing(folder / f"{figure_id}{suffix}.png") as temporary:
                temporary.write_bytes(self._png(facts))

    def _png(self, facts: dict[str, str]) -> bytes:
        """The picture in 256 colours, a third of the bytes of one in all of them."""
        buffer, small, told = io.BytesIO(), io.BytesIO(), PngInfo()
        self.savefig(buffer, format="png")
        buffer.seek(0)
        for name, text in facts.items():
            told.add_text(name, text)
        image = PngImageFile(buffer).convert("RGB").quantize(dither=Image.Dither.NONE)
        image.save(small, "png", optimize=True, dpi=(DPI, DPI), pnginfo=told)
        return small.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict]:
        with matplotlib.rc_context(STYLE):
            content = self._png({})
        width, height = self.get_size_inches()
        size = {"width": round(150 * width), "height": round(150 * height)}
        return content, {**size, "alt": self.alt or self.caption}


def chart_of_nothing(title: str, why: str) -> Chart:
    """A chart that says in words why there is nothing to draw."""
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, 0.9))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0, 0.5, why, transform=axes.transAxes, va="center", wrap=True)
    return figure


def apart(places: list[float], least: float) -> np.ndarray:
    """Move labels as little as it takes to keep them `least` apart, in the order they stand in."""
    moved = np.array(places, dtype=float)
    for _ in range(200):
        for low, high in pairwise(np.argsort(places, kind="stable")):
            short = least - (moved[high] - moved[low])
            if short > 1e-9:
                moved[[low, high]] += (-short / 2, short / 2)
    return moved


def dtypes_of(rows: pd.DataFrame) -> str:
    """Of what dtypes operands were: 'int8 and float32'. A call alone has none that are told."""
    dtypes = rows.loc[rows["method"] != FLOOR, "dtype"].dropna().unique()
    *others, last = sorted(dtypes, reverse=True)  # int8 first
    return f"{', '.join(others)} and {last}" if others else last


def measured_on(rows: pd.DataFrame) -> str:
    """Where and on what rows were measured, as a caption says it."""
    first = rows.iloc[0]
    return (
        f"{first['processor']} ({first['device']}, {counted(first['threads'], 'thread')}, "
        f"PyTorch {first['torch']}), {dtypes_of(rows)} operands, batch_size={first['batch_size']}, "
        f"out_features={first['out_features']}, in_features={first['in_features']}"
    )


def subtitle(axes: Axes, rows: pd.DataFrame, more: str = "") -> None:
    """Put the same over a chart, in several lines if it is long."""
    first = rows.iloc[0]
    processor = re.sub(r"\(R\)|\(TM\)| Processor| CPU @.*", "", first["processor"])
    where = f"{dtypes_of(rows)} · {counted(first['threads'], 'thread')}"
    sizes = {"M": "batch_size", "N": "out_features", "K": "in_features"}
    sizes = " · ".join(f"{letter} = {first[name]:,}" for letter, name in sizes.items()) + more
    line = f"{processor}, {first['device']}"
    for part in (where, sizes):  # as few lines as fit a column
        long = len(line.split("\n")[-1]) + len(part) > 68
        line += ("\n" if long else " · ") + part
    axes.set_title("\n" * line.count("\n") + " ", fontsize=6.5)  # room, but only upwards
    axes.annotate(
        line, (0.01, 1), (0, 6), ("figure fraction", axes.transAxes), "offset points",
        fontsize=6.5, color=FAINT, in_layout=False, annotation_clip=False,
    )  # fmt: skip


def counted(number: int, noun: str) -> str:
    """A number and what is counted: '1 run', '5 runs'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def words_of_processes(runs: int) -> str:
    return "one fresh process" if runs == 1 else f"{runs} fresh processes"


def words_of_whiskers(table: pd.DataFrame) -> str:
    """What the whiskers of a summary's ratios are, and how sure that of several processes is."""
    least, most = int(table["runs"].min()), int(table["runs"].max())
    if most == 1:
        return "the 95 % interval of one fresh process, which does not show how processes differ"
    words = f"the range over {words_of_processes(most)}"
    if least == most >= 5:  # all of them lie on one side of the median once in 2 ** (n - 1) times
        words += f", a {min(99, round(100 - 200 * 0.5**most))} % interval for the median process"
    return words


def words_of_rounds(rows: pd.DataFrame) -> str:
    """How often whatever has a time was timed: '31 rounds in each of 5 fresh processes'."""
    timed = rows[rows["state"] == "timed"]
    if timed.empty:
        return "nothing was timed"
    rounds = timed.groupby(["method", "run"])["round"].nunique()
    runs = timed["run"].nunique()
    most = "up to " * (rounds.nunique() > 1)
    each = "each of " * (runs > 1)
    return f"{most}{counted(rounds.max(), 'round')} in {each}{words_of_processes(runs)}"


def words_of_speedup(line: pd.Series) -> str:
    """The inverse of a ratio with its interval: '0.995× (0.991 to 1.003)'."""
    ends = 1 / line[["ratio", "ratio_high", "ratio_low"]].astype(float)
    # Near 1, where noise is a matter of the third place, to three of them.
    words = [f"{end:.3f}" if 0.9 < end < 1.1 else format_figures(end) for end in ends]
    return "{}× ({} to {})".format(*words)


def name_of(method: str, wrong: bool) -> str:
    """A method as its line is labelled: whoever computes wrong numbers says so, controls apart."""
    return f"{method} (wrong)" if wrong and not is_control(method) else method


def words_of_wrong(table: pd.DataFrame) -> str:
    """A caption's sentence on the hollow marks, or nothing where every number is right."""
    wrong = "; ".join(name for name in table.index[table["wrong"]] if not is_control(name))
    return wrong and (
        f" Hollow marks and the word 'wrong': the numbers are not those of the reference ({wrong})."
    )


def words_of_control(table: pd.DataFrame, mark: str) -> str:
    """A caption's sentence on the control's mark, or nothing where it has none."""
    control = next((name for name in table.index if name.endswith(AGAIN)), "")
    return control and (
        f" The {mark} is {control.removesuffix(AGAIN)} timed a second time: its interval is the "
        "noise floor."
    )


def value_of(method: str, line: pd.Series, ratio: str) -> str:
    """A line's median, its ratio in the form that is asked for, and where it has no more."""
    if line["state"] != "timed":
        return str(line["state"])
    value = f"{format_figures(1e3 * line['median'])} ms"
    # A ratio says nothing beside the baseline itself, nor for what a call alone costs.
    if method != line["baseline"] and pd.notna(line["ratio"]) and line["ratio"] > 0.01:
        value += ratio.format(format_figures(line["ratio"]))
    runs = line["all_runs"]
    return value if line["runs"] == runs else f"{value}, in {line['runs']} of {runs} runs"


def medians(frame: pd.DataFrame, by: list[str], values: dict[str, str]) -> pd.DataFrame:
    """Medians and ranges of some columns, renamed, by others: what `in_words` tells of a frame."""

    def median_and_range(values: pd.Series) -> str:
        low, middle, high = map(format_figures, values.quantile([0, 0.5, 1]))
        words = middle if low == high else f"{middle} ({low} to {high})"
        return words.replace("-", "−")

    columns = 0.0 + frame[list(values)].astype(float).rename(columns=values)  # -0 is 0
    return columns.groupby([frame[name] for name in by], sort=False).agg(median_and_range)


def in_words(kind: str, table: pd.DataFrame) -> str:
    """A chart for who cannot see it: what kind it is, and the first lines of its table."""
    said = [_line_in_words(name, line) for name, line in table.iterrows()]
    fit = max(1, int((np.cumsum([len(one) for one in said]) <= ALT_LENGTH).sum()))
    more = f"; and {len(said) - fit} more" if said[fit:] else ""
    return f"{kind}: {'; '.join(said[:fit]) or 'nothing to show'}{more}."


def _line_in_words(name: str | tuple, line: pd.Series) -> str:
    if "state" in line:
        gap = " " if line["state"] == "timed" else ": "
        return line["label"] + gap + value_of(name, line, " ({} times)")
    words = ", ".join(name) if isinstance(name, tuple) else str(name)
    if len(line) == 1:  # what it is, the chart's kind says
        return f"{words} {line.iloc[0]}"
    return f"{words}: {', '.join(f'{what} {value}' for what, value in line.items())}"


def dots_on_lines(
    axes: Axes,
    points: pd.DataFrame,
    looks: dict[str, tuple[str, str]],
    lines: int,
    xlabel: str,
    *,
    log: bool = True,
    centre: str = "median",
    whisker: tuple[str, int] | None = None,
    faint: bool = False,
    columns: int = 0,
) -> None:
    """On each line a bold dot with its whisker, and where `faint` the dots that they are of.

    `points` have `x`, `y` (0 for the first line, or a little off), the `kind` of dot, `hollow`
    where the bold dot of some has no face, and `low` and `high` where these are a whisker's ends.
    `looks` are colour and mark of each kind, in the order of the legend, which has `columns`.
    `centre` and `whisker` are seaborn's names of where the bold dot stands and what it spans.
    """
    axes.set(xscale="log" if log else "linear")
    points = points.assign(hollow=points.get("hollow", False))
    if "low" in points:  # each point three times, whose median it is and whose range its whisker
        ends = [points.assign(x=points[name]) for name in ("low", "high")]
        points, whisker = pd.concat([points, *ends]).dropna(subset="x"), ("pi", 100)
    handles = {}
    for (kind, (colour, mark)), hollow in product(looks.items(), (False, True)):
        own = points[(points["kind"] == kind) & (points["hollow"] == hollow)]
        if own.empty:
            continue
        shared = {"data": own, "x": "x", "y": "y", "orient": "y", "native_scale": True}
        shared |= {"color": colour, "ax": axes}
        if faint:
            # As pixels: thousands of dots would make most of an .svg.
            look = {"jitter": False, "marker": mark, "size": 2.5, "alpha": 0.25}
            sns.stripplot(**shared, **look, rasterized=True)
        look = {"marker": mark, "markersize": 4, "linestyle": "none", "zorder": 4}
        if hollow:
            look |= {"markersize": 5.5, "markeredgewidth": 1.3, "markerfacecolor": "white"}
        below = {"linewidth": 1.6, "zorder": 3}
        sns.pointplot(**shared, estimator=centre, errorbar=whisker, err_kws=below, **look)
        handles.setdefault(kind, Line2D([], [], label=kind, color=colour, **look))
    axes.set(xlabel=xlabel + ", log scale" * log, ylabel="", yticks=[], ylim=(lines - 0.6, -0.75))
    if points.empty:
        axes.set_xticks([])
    elif log:
        plain_log_ticks(axes.xaxis, points["x"])
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    if columns:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": columns}
        small = {"fontsize": 6.5, "handletextpad": 0.1, "columnspacing": 1.2}
        axes.legend(handles=list(handles.values()), frameon=False, **place, **small)


def chart_of_lines(
    title: str,
    names: list[str],
    points: pd.DataFrame,
    *,
    values: Iterable[str] = (),
    rows: pd.DataFrame | None = None,
    **how,
) -> Chart:
    """A chart of `dots_on_lines`, which is given `points` and `how`.

    Above each line are its name, in grey of a control, and its value; above them all is where the
    `rows` were measured.
    """
    height = 0.34 * len(names) + (1.05 if how.get("columns") else 0.85)
    figure = Chart(title, figsize=(COLUMN_WIDTH_IN, height))
    axes = figure.subplots()
    dots_on_lines(axes, points, lines=len(names), **how)
    for place, (left, right) in enumerate(zip_longest(names, values)):
        style = {"transform": axes.get_yaxis_transform(), "va": "center"}
        style["color"] = FAINT if is_control(left) else INK
        style["bbox"] = {"color": "white", "pad": 0.6, "linewidth": 0}  # no grid runs through it
        axes.text(0.0, place - 0.32, left, ha="left", fontsize=7.5, **style)
        if right:
            axes.text(1.0, place - 0.32, right, ha="right", fontsize=7, **style)
    if rows is not None:
        subtitle(axes, rows)
    return figure


def looks_of(kinds: list[str], apart: float) -> tuple[dict[str, tuple[str, str]], dict[str, float]]:
    """Colour and mark of each kind, and how far off its line it stands."""
    looks = zip(kinds, zip(COLOURS * len(kinds), MARKS * len(kinds), strict=False), strict=False)
    middle = (len(kinds) - 1) / 2
    return dict(looks), {kind: apart * (place - middle) for place, kind in enumerate(kinds)}


def plain_log_ticks(axis: Axis, values: pd.Series) -> None:
    """Ticks written as plain numbers, at more than the powers of ten where the range is short."""
    decades = np.log10(values.max() / values.min()) if len(values) else 1
    few = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])  # where these would leave one or none
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1.1 else (1, 2, 5) if decades < 2.6 else (1,)
    axis.set_major_locator(few if decades < 0.4 else LogLocator(subs=subs))
    plain_numbers(axis)


def plain_numbers(axis: Axis) -> None:
    """Write the ticks of a logarithmic axis as plain numbers, without those between them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


_KEPT: ContextVar[dict] = ContextVar("kept")


@contextmanager
def summaries_kept():
    """Within it a frame is summarized once: only for whoever changes no frame meanwhile."""
    token = _KEPT.set(_KEPT.get({}))
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept(make: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable:
    """Have `make` make what it makes of a frame once within `summaries_kept`."""

    @wraps(make)
    def of(rows: pd.DataFrame) -> pd.DataFrame:
        store, key = _KEPT.get({}), (id(rows), make.__name__)
        if key not in store:  # with the frame beside what was made, its id stays its own
            store[key] = rows, make(rows)
        return store[key][1]

    return of


@kept
def summary_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The table that `summarize` gives of what the host's clock timed, as charts need it.

    The baseline is first, then the fastest to the slowest, what has no time, and the controls.
    What has a time in some of `all_runs` is 'timed'. `wrong` says whether a method's numbers were
    not exact, or further off than the bound, and so does `label`, the name on its line.
    """
    rows = rows[rows["clock"] == "host"]
    table = summarize(rows)
    table["state"] = table["state"].mask(table["median"].notna(), "timed")
    table["all_runs"] = rows["run"].nunique()
    wrong = rows["exact"].astype("boolean").eq(False).fillna(False)
    if "error_bound" in rows:
        error, bound = (rows[name].astype("Float64") for name in ("max_error", "error_bound"))
        # An error that is no number, beside a bound, is that of a result that is none.
        wrong |= (error > bound).fillna(bound.notna() & error.isna())
    table["wrong"] = wrong.groupby(rows["method"]).any().reindex(table.index).astype(bool)
    table["label"] = [name_of(*line) for line in table["wrong"].items()]
    baseline = baseline_of(rows)
    places = {baseline: -1, baseline + AGAIN: 1, FLOOR: 2}
    table["place"] = [places.get(name, 0) for name in table.index]
    return table.sort_values(["place", "median"], kind="stable")
