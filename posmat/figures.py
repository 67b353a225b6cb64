"""Figures: the ordered list of them, and how one is drawn, named and kept.

`FIGURES` is only appended to, because a figure's number is its place and its id stands in papers.
Each is a pure function of rows, in `posmat.charts`, so that anyone can draw it again. No torch.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd

from posmat.charts.findings import (
    finding_formulations,
    finding_linear,
    finding_magnitude,
    finding_matvec,
    finding_positive,
    finding_signs,
)
from posmat.charts.machines import (
    caption_speedup,
    finding_speedup,
    speedup,
    words_of_speedup,
)
from posmat.charts.multipliers import (
    caption_cost_against_rank,
    caption_digits_accuracy,
    caption_error_tables,
    caption_fibonacci_codes,
    caption_fibonacci_rounding,
    caption_inexact_times,
    caption_output_error,
    cost_against_rank,
    digits_accuracy,
    error_tables,
    fibonacci_codes,
    fibonacci_rounding,
    finding_cost_against_rank,
    finding_digits_accuracy,
    finding_error_tables,
    finding_fibonacci_codes,
    finding_fibonacci_rounding,
    finding_inexact_times,
    finding_output_error,
    inexact_times,
    output_error,
    words_of_cost_against_rank,
    words_of_digits_accuracy,
    words_of_error_tables,
    words_of_fibonacci_codes,
    words_of_fibonacci_rounding,
    words_of_inexact_times,
    words_of_output_error,
)
from posmat.charts.scaling import (
    caption_of_sizes,
    finding_roofline,
    finding_scaling,
    roofline,
    scaling,
    words_of_roofline,
    words_of_scaling,
)
from posmat.charts.style import STYLE, Chart, kept, summaries_kept
from posmat.charts.times import (
    caption_of_times,
    caption_then_and_now,
    finding_then_and_now,
    then_and_now,
    time_per_method,
    words_of_then_and_now,
    words_of_times,
)
from posmat.records import replacing, rows_hash

ROWS = "{stem}.csv"  # the timed blocks of one run


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the list: its id, the notebook it belongs to, what it reads, how it is drawn.

    The id stands in file names and papers and never changes.

    It is drawn for each run and variant of its notebook, from files of that run alone. `reads`
    names them, one for each frame that `draw`, `caption`, `finding` and `alt` are given, in that
    order:

        ("{stem}.csv",)                         the rows of the run; the default
        ("{stem}.memory.csv",)                  its frame `memory` in their place
        ("{stem}.csv", "{stem}.roofs.csv")      both: draw(rows, roofs, title)
    """

    id: str
    notebook: str
    title: str
    draw: Callable[..., Chart]  # (*frames, title) -> figure
    caption: Callable[..., str]  # (*frames) -> what was asked, where measured, what the marks are
    reads: tuple[str, ...] = (ROWS,)
    finding: Callable[..., str] | None = None  # (*frames) -> what the figure shows, in a sentence
    alt: Callable[..., str] | None = None  # (*frames) -> it in words, for who cannot see it

    def in_words(self, *frames: pd.DataFrame) -> str:
        """What the figure shows, in words: `alt`, or the caption where a figure has none."""
        return (self.alt or self.caption)(*frames)


def draw_figure(figure_id: str, *frames: pd.DataFrame) -> Chart:
    """Draw a figure of the list from its frames: the rows, or what its `reads` names.

    Raises:
        KeyError: no figure of the list has this id.
    """
    spec = find_figure(figure_id)
    with matplotlib.rc_context(STYLE), summaries_kept():
        figure = spec.draw(*frames, spec.title)
        figure.caption, figure.alt = spec.caption(*frames), spec.in_words(*frames)
    return figure


def find_figure(figure_id: str) -> FigureSpec:
    """The entry of the list with this id.

    Raises:
        KeyError: there is none; near ids are suggested.
    """
    import difflib

    ids = [spec.id for spec in FIGURES]
    if figure_id in ids:
        return FIGURES[ids.index(figure_id)]
    near = difflib.get_close_matches(figure_id, ids, n=3, cutoff=0)
    raise KeyError(f"no figure has the id {figure_id!r}: did you mean {' or '.join(near)}?")


def figure_number(figure_id: str) -> int:
    """A figure's number: its place in the list, from 1."""
    return FIGURES.index(find_figure(figure_id)) + 1


def save_figure(
    figure: Chart, figure_id: str, rows: pd.DataFrame, digest: str, folder: Path, suffix: str
) -> None:
    """Write a figure of one run beside the files of that run, where a notebook keeps it.

    `digest` is that of the rows; a figure that reads other files takes theirs from `folder`.
    """
    spec = find_figure(figure_id)
    if spec.reads != (ROWS,):
        stem = _stem_of(folder)
        digest = rows_digest(folder / pattern.format(stem=stem) for pattern in spec.reads)
    figure.caption = figure.caption or spec.caption(rows)
    write_figure(figure, figure_id, digest, folder, suffix)


def write_figure(figure: Chart, figure_id: str, digest: str, folder: Path, suffix: str) -> None:
    """Write a figure as .svg, .pdf and .png, with id, caption and the rows' sha256 inside.

    The same rows give the same bytes under the same matplotlib: no date, no random id.
    """
    title, caption = f"posmat: {find_figure(figure_id).title}", figure.caption
    source = f"rows sha256 {digest}"
    metadata = {
        "svg": {"Title": title, "Description": caption, "Identifier": figure_id}
        | {"Source": source, "Date": None},
        "pdf": {"Title": title, "Subject": caption, "Keywords": f"{figure_id}; {source}"}
        | {"CreationDate": None},
        "png": {"Title": title, "Description": caption, "Source": source}
        | {"Identifier": figure_id},
    }
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure_id}):
        figure.draw_without_rendering()  # lays it out, once for the three
        figure.set_layout_engine(None)
        for kind, facts in metadata.items():
            with replacing(folder / f"{figure_id}{suffix}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, metadata=facts)


def rows_digest(files: Iterable[Path]) -> str:
    """The sha256 that a figure carries: that of its file, or of the list of its files' sha256."""
    digests = [rows_hash(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _stem_of(folder: Path) -> str:
    """The stem of the run whose rows a staging folder holds: the shortest of its names."""
    return min((path.name.removesuffix(".csv") for path in folder.glob("*.csv")), key=len)


def _formulations(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the seed's whole form, which rows of before have as another part."""
    if "part" not in rows:
        return rows
    return kept(rows, "formulations", lambda rows: rows[rows["part"] == "formulations"])


def _of_formulations(function: Callable[..., str]) -> Callable[..., str]:
    """A caption, a finding or words of the formulations alone."""
    return lambda rows: function(_formulations(rows))


FIGURES: list[FigureSpec] = [
    FigureSpec(
        "matvec-vs-elementwise",
        "01_matvec_vs_elementwise",
        "Matrix-vector and element-wise product",
        time_per_method,
        caption_of_times(
            "A matrix-vector product beside the element-wise product that is its first half."
        ),
        finding=finding_matvec,
        alt=words_of_times,
    ),
    FigureSpec(
        "positive-matrix-product",
        "05_positive_matrix_product",
        "The positive matrix product",
        time_per_method,
        caption_of_times(
            "The sign-magnitude form of a fully connected layer beside the layer itself."
        ),
        finding=finding_positive,
        alt=words_of_times,
    ),
    FigureSpec(
        "linear-vs-manual",
        "02_linear_vs_manual",
        "A fully connected layer and the same by hand",
        time_per_method,
        caption_of_times("A fully connected layer beside the same product written by hand."),
        finding=finding_linear,
        alt=words_of_times,
    ),
    FigureSpec(
        "sign-matrix",
        "03_sign_matrix",
        "The matrix of signs",
        time_per_method,
        caption_of_times("The signs of all partial products, from signs and from shifts."),
        finding=finding_signs,
        alt=words_of_times,
    ),
    FigureSpec(
        "magnitude",
        "04_magnitude",
        "The magnitude of int8 numbers",
        time_per_method,
        caption_of_times("The magnitude of an input and of the weights, three ways."),
        finding=finding_magnitude,
        alt=words_of_times,
    ),
    FigureSpec(
        "then-and-now",
        "10_summary",
        "Then and now",
        then_and_now,
        caption_then_and_now,
        finding=finding_then_and_now,
        alt=words_of_then_and_now,
    ),
    FigureSpec(
        "fibonacci-codes",
        "08_fibonacci_magnitudes",
        "Fibonacci codes on the number line",
        fibonacci_codes,
        caption_fibonacci_codes,
        reads=("{stem}.codes.csv",),
        finding=finding_fibonacci_codes,
        alt=words_of_fibonacci_codes,
    ),
    FigureSpec(
        "fibonacci-rounding",
        "08_fibonacci_magnitudes",
        "What rounding to Fibonacci codes loses",
        fibonacci_rounding,
        caption_fibonacci_rounding,
        reads=("{stem}.rounding.csv",),
        finding=finding_fibonacci_rounding,
        alt=words_of_fibonacci_rounding,
    ),
    FigureSpec(
        "inexact-multipliers",
        "09_inexact_multipliers",
        "A layer under inexact multipliers",
        inexact_times,
        caption_inexact_times,
        finding=finding_inexact_times,
        alt=words_of_inexact_times,
    ),
    FigureSpec(
        "error-tables",
        "09_inexact_multipliers",
        "Errors of inexact multipliers",
        error_tables,
        caption_error_tables,
        reads=("{stem}.errors.csv",),
        finding=finding_error_tables,
        alt=words_of_error_tables,
    ),
    FigureSpec(
        "cost-against-rank",
        "09_inexact_multipliers",
        "Cost against rank",
        cost_against_rank,
        caption_cost_against_rank,
        finding=finding_cost_against_rank,
        alt=words_of_cost_against_rank,
    ),
    FigureSpec(
        "output-error",
        "09_inexact_multipliers",
        "The error of a layer's outputs",
        output_error,
        caption_output_error,
        reads=("{stem}.outputs.csv",),
        finding=finding_output_error,
        alt=words_of_output_error,
    ),
    FigureSpec(
        "digits-accuracy",
        "09_inexact_multipliers",
        "Digits under inexact multipliers",
        digits_accuracy,
        caption_digits_accuracy,
        reads=("{stem}.digits.csv",),
        finding=finding_digits_accuracy,
        alt=words_of_digits_accuracy,
    ),
    FigureSpec(
        "gemm-formulations",
        "06_gemm_formulations",
        "The same product as GEMMs",
        lambda rows, title: time_per_method(_formulations(rows), title),
        _of_formulations(
            caption_of_times(
                "The positive matrix product as GEMMs, beside a float32 layer and one int8 GEMM."
            )
        ),
        finding=_of_formulations(finding_formulations),
        alt=_of_formulations(words_of_times),
    ),
    FigureSpec(
        "scaling",
        "07_scaling",
        "How the cost grows with M, N and K",
        scaling,
        caption_of_sizes(
            "Time per call and rate of every method while one of M, N and K is varied; the ring "
            "marks the size that the three have in common. A rate counts the M·N·K "
            "multiply-accumulates of the product, however many a method does."
        ),
        finding=finding_scaling,
        alt=words_of_scaling,
    ),
    FigureSpec(
        "roofline",
        "07_scaling",
        "Under the roof of the machine",
        roofline,
        caption_of_sizes(
            "The rate of every method and size over its arithmetic intensity, below what the same "
            "run measured as peaks, with large GEMMs, and as bandwidths, with copies. Points "
            "above the solid slope had their operands in a cache. A rate counts the 2·M·N·K "
            "FLOPs of the product, however many a method does."
        ),
        finding=finding_roofline,
        alt=words_of_roofline,
    ),
    FigureSpec(
        "gemm-speedup",
        "06_gemm_formulations",
        "Speedup of the GEMM forms",
        lambda rows, title: speedup(_formulations(rows), title),
        _of_formulations(caption_speedup),
        finding=_of_formulations(finding_speedup),
        alt=_of_formulations(words_of_speedup),
    ),
]
