"""What all charts share: their look, their class, and the words for where rows were measured."""

import io
from contextlib import contextmanager
from contextvars import ContextVar

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from posmat.summary import summarize

COLUMN_WIDTH_IN = 3.5  # one column of a two-column paper
INK, FAINT = "#222222", "#767676"  # both hold 4.5 : 1 on white
BLUE, ORANGE, GREEN, RED, PURPLE, *_ = sns.color_palette("colorblind").as_hex()

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
    """A figure that a notebook shows as it is saved, with its caption as the alternative text."""

    caption = ""

    def head(self, title: str) -> None:
        """Put the title over the whole figure, at its left edge."""
        self.suptitle(title, x=0.01, ha="left", fontsize=8.5)

    def _repr_png_(self) -> tuple[bytes, dict]:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=200)
        width, height = self.get_size_inches()
        size = {"width": round(150 * width), "height": round(150 * height)}
        return buffer.getvalue(), {**size, "alt": self.caption}


def describe_rows(rows: pd.DataFrame) -> str:
    """Where and on what rows were measured, in one line: the subtitle of a chart."""
    first = rows.iloc[0]
    processor = str(first["processor"])
    for word in ("(R)", "(TM)", " Processor"):  # the line must fit a column
        processor = processor.replace(word, "")
    parts = [f"{processor}, {first['device']}", str(first["dtype"])]
    for letter, name in (("M", "batch_size"), ("N", "out_features"), ("K", "in_features")):
        if rows[name].nunique() == 1:
            parts.append(f"{letter} = {first[name]:,}")
    threads = rows["threads"].nunique() == 1
    return " · ".join(parts + ([words_of_threads(first["threads"])] if threads else []))


def words_of_threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def plain_log_ticks(axis, values: pd.Series) -> None:
    """Ticks written as plain numbers, at 1, 2 and 5 where the range is short."""
    decades = np.log10(values.max() / values.min()) if len(values) else 1
    subs = (1, 2, 5) if decades < 2 else (1,)
    few = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])  # in half a decade 1, 2, 5 leave one or none
    axis.set_major_locator(few if decades < 0.7 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


_SUMMARIES: ContextVar[dict[int, tuple[pd.DataFrame, pd.DataFrame]] | None]
_SUMMARIES = ContextVar("summaries", default=None)


@contextmanager
def summaries_kept():
    """Within it a frame is summarized once: chart, finding and words ask for the same table.

    Only for whoever changes no frame meanwhile, as `posmat draw`; a notebook may.
    """
    before = _SUMMARIES.get()
    token = _SUMMARIES.set({} if before is None else before)
    try:
        yield
    finally:
        _SUMMARIES.reset(token)


def summary_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of the rows that the host's clock timed, as `summarize` gives it."""
    kept = _SUMMARIES.get()
    if kept is None:
        return summarize(rows[rows["clock"] == "host"])
    if id(rows) not in kept:  # the frame is kept beside its table, so that its id stays its own
        kept[id(rows)] = rows, summarize(rows[rows["clock"] == "host"])
    return kept[id(rows)][1]
