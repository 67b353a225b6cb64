"""Figures: the ordered list of them, and how one is drawn, named and kept.

`FIGURES` is only appended to: a figure's number is its place, and its id, which stands in file
names and papers, never changes. Anyone can draw it again, from rows alone. No torch.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import matplotlib
import pandas as pd

from posmat.charts import lines, multipliers, sizes
from posmat.charts.style import STYLE, Chart, in_words, medians, summaries_kept


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the list, drawn for each run and variant of its notebook from its files alone.

    `reads` names the files, one for each frame that `draw`, `caption` and `table` are given.
    """

    id: str
    notebook: str
    title: str
    draw: Callable[..., Chart]  # (*frames, title) -> figure
    caption: str | Callable[..., str]  # what was asked, where, what the marks are; or of (*frames)
    reads: tuple[str, ...] = Chart.reads
    only: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame  # what it shows of a frame
    kind: str = "Times per call, one line per method, medians"  # what it is, in a few words
    table: Callable[..., pd.DataFrame] = lines.lines_of_times  # (*frames) -> what follows `kind`
    former: bool = False  # no notebook keeps what it reads any more: drawn where that is published

    def describe(self, *frames: pd.DataFrame) -> tuple[str, str]:
        """Caption and alternative text of what `shown` gives."""
        caption = self.caption if isinstance(self.caption, str) else self.caption(*frames)
        return caption, in_words(self.kind, self.table(*frames))

    def shown(self, *frames: pd.DataFrame) -> list[pd.DataFrame]:
        """What the figure shows of the frames of its files."""
        return [self.only(frame) for frame in frames]


def draw_figure(figure_id: str, *frames: pd.DataFrame) -> Chart:
    """Draw a figure of the list from its frames: the rows, or what its `reads` names."""
    spec = find_figure(figure_id)
    with matplotlib.rc_context(STYLE), summaries_kept():
        shown = spec.shown(*frames)
        figure = spec.draw(*shown, spec.title)
        figure.caption, figure.alt = spec.describe(*shown)
    figure.title, figure.reads = spec.title, spec.reads
    return figure


def find_figure(figure_id: str) -> FigureSpec:
    """The entry of the list with this id, or a KeyError that suggests near ones."""
    for spec in FIGURES:
        if spec.id == figure_id:
            return spec
    raise unknown_figure(figure_id, [spec.id for spec in FIGURES])


def unknown_figure(word: str, known: Iterable[str]) -> KeyError:
    """The error that suggests the three names nearest to a word."""
    near = difflib.get_close_matches(word, [*known], n=3, cutoff=0)
    return KeyError(f"no figure has the id {word!r}: did you mean {' or '.join(near)}?")


def figure_number(figure_id: str) -> int:
    """A figure's number: its place in the list, from 1."""
    return FIGURES.index(find_figure(figure_id)) + 1


def _times(figure_id: str, notebook: str, title: str, question: str, **more) -> FigureSpec:
    """A figure of times per call, whose caption begins with what was asked."""
    caption = partial(lines.caption_of_times, question)
    return FigureSpec(figure_id, notebook, title, lines.time_per_method, caption, **more)


def _formulations(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the seed's whole form, which was another part in rows of before."""
    return rows[rows["part"] == "formulations"] if "part" in rows else rows


FIGURES: list[FigureSpec] = [
    _times(
        "matvec-vs-elementwise",
        "01_matvec_vs_elementwise",
        "Matrix-vector and element-wise product",
        "A matrix-vector product beside the element-wise product that is its first half.",
    ),
    _times(
        "positive-matrix-product",
        "05_positive_matrix_product",
        "The positive matrix product",
        "The sign-magnitude form of a fully connected layer beside the layer itself.",
    ),
    _times(
        "linear-vs-manual",
        "02_linear_vs_manual",
        "A fully connected layer and the same by hand",
        "A fully connected layer beside the same product written by hand.",
    ),
    _times(
        "sign-matrix",
        "03_sign_matrix",
        "The matrix of signs",
        "The signs of all partial products, from signs and from shifts.",
    ),
    _times(
        "magnitude",
        "04_magnitude",
        "The magnitude of int8 numbers",
        "The magnitude of an input and of the weights, three ways.",
    ),
    FigureSpec(
        "then-and-now",
        "11_summary",
        "Then and now",
        lines.then_and_now,
        lines.caption_then_and_now,
        only=lines.rows_then_and_now,
        kind="Times per call in ms, then and now, one line per form of the 2020 notebook",
        table=lambda frame: medians(frame, ["line", "where"], {"milliseconds": "ms"}),
    ),
    FigureSpec(
        "fibonacci-codes",
        "08_fibonacci_magnitudes",
        "Fibonacci codes on the number line",
        multipliers.fibonacci_codes,
        "Above, the Fibonacci codes among the magnitudes of 7 bits, each at its place on the "
        "number line with the ones of its binary form; no two are adjacent. Below, for every "
        "magnitude, how far away the code is that it is rounded to; a tie goes up.",
        reads=("{stem}.codes.csv",),
        only=multipliers.codes_apart,
        kind="Bits of codes on the number line, and how far away they are; medians with ranges",
        table=lambda frame: medians(frame, ["kind"], {"magnitude": "magnitude", "away": "away"}),
    ),
    FigureSpec(
        "fibonacci-rounding",
        "08_fibonacci_magnitudes",
        "What rounding to Fibonacci codes loses",
        multipliers.fibonacci_rounding,
        "What quantization to int8 magnitudes loses, over distributions of weights: the root of "
        "the sum of squared errors over that of the squared weights. Each set of codes has the "
        "scale of least squared error, unless it says whose scale it took.",
        reads=("{stem}.rounding.csv",),
        kind="Relative errors, one line per distribution of weights; medians with ranges",
        table=lambda frame: medians(frame, ["codes"], {"relative_error": "error / weights"}),
    ),
    _times(
        "inexact-multipliers",
        "09_inexact_multipliers",
        "A layer under inexact multipliers",
        "A fully connected layer whose multiplications are inexact, bit for bit; `exact` is the "
        "same code with a multiplier that makes no errors.",
        only=lambda rows: rows[~rows["method"].str.startswith(multipliers.RANDOM_TABLE)],
    ),
    FigureSpec(
        "error-tables",
        "09_inexact_multipliers",
        "Errors of inexact multipliers",
        multipliers.error_tables,
        "The error of inexact multipliers, product minus true product, for every weight's and "
        "every input's magnitude, in one scale for all: blue is too small, red too large, and the "
        "colours go by the square root of the error, so that small ones show. Above each map are "
        "the share of wrong products and the largest error.",
        reads=("{stem}.errors.csv",),
        kind="Heat maps of product minus true product, one per multiplier; medians with ranges",
        table=lambda errors: medians(
            errors.melt(["multiplier", "weight"]), ["multiplier"], {"value": "error"}
        ),
    ),
    FigureSpec(
        "cost-against-rank",
        "09_inexact_multipliers",
        "Cost against rank",
        multipliers.cost_against_rank,
        multipliers.caption_cost_against_rank,
        kind="Scatter of time over one GEMM's against the number of GEMMs, medians and ratios",
        table=multipliers.lines_of_costs,
    ),
    FigureSpec(
        "output-error",
        "09_inexact_multipliers",
        "The error of a layer's outputs",
        multipliers.output_error,
        "The error of a layer's outputs when every multiplication is done by the multiplier: its "
        "mean over the batch (bias) and its standard deviation (spread), over the standard "
        "deviation of the exact output; a faint dot for each output, a bold mark for their median.",
        reads=("{stem}.outputs.csv",),
        only=multipliers.shares_of_signal,
        kind="Bias and spread of each output in percent of the signal, medians with ranges",
        table=lambda frame: medians(
            frame, ["multiplier", "inputs"], {"bias": "bias", "spread": "spread"}
        ),
    ),
    FigureSpec(
        "digits-accuracy",
        "09_inexact_multipliers",
        "Digits under inexact multipliers",
        multipliers.digits_accuracy,
        "The share of test images of scikit-learn's digits that a network of two layers names "
        "rightly, trained in float32 and then quantized with plain or with Fibonacci magnitudes, "
        "under each multiplier. A faint dot for each seed of split and training, a bold one for "
        "their mean.",
        reads=("{stem}.digits.csv",),
        former=True,
        kind="Accuracies, one line per multiplier and a dot per seed; medians with ranges",
        table=lambda frame: medians(frame, ["multiplier", "weights"], {"accuracy": "accuracy"}),
    ),
    _times(
        "gemm-formulations",
        "06_gemm_formulations",
        "The same product as GEMMs",
        "The positive matrix product as GEMMs, beside a float32 layer and one int8 GEMM.",
        only=_formulations,
    ),
    FigureSpec(
        "scaling",
        "07_scaling",
        "How the cost grows with M, N and K",
        sizes.scaling,
        partial(
            sizes.caption_of_sizes,
            "Time per call and rate of every method while one of M, N and K is varied, all axes "
            "logarithmic; the ring marks the size that the three have in common. A rate counts the "
            "M·N·K multiply-accumulates of the product, however many a method does.",
        ),
        kind="Lines of time and rate against M, N and K; medians with ranges, in GMAC/s",
        table=lambda rows: medians(sizes.rates_of(rows), ["method"], {"gmacs": "GMAC/s"}),
    ),
    FigureSpec(
        "roofline",
        "07_scaling",
        "Under the roof of the machine",
        sizes.roofline,
        partial(
            sizes.caption_of_sizes,
            "The rate of every method and size over its arithmetic intensity, both axes "
            "logarithmic, below what the same run measured: the fastest large GEMM of 8-bit and of "
            "float32 numbers, and copies. Points above the solid slope had their operands in a "
            "cache. An operation (OP) is a multiplication or an addition, of floating-point "
            "numbers or of integers; a rate counts the 2·M·N·K of the product, however many a "
            "method does.",
        ),
        kind="Scatter of rate over arithmetic intensity under the machine's roofs; medians with "
        "ranges over all sizes",
        table=lambda rows: medians(
            sizes.rates_of(rows), ["method"], {"intensity": "OP/byte", "gmacs": "GMAC/s"}
        ),
    ),
    FigureSpec(
        "gemm-speedup",
        "06_gemm_formulations",
        "Speedup of the GEMM forms",
        lines.speedup,
        lines.caption_speedup,
        only=_formulations,
        kind="Speedups over the baseline, one line per method; times, and ratios to it",
        table=lines.lines_of_speedup,
    ),
    FigureSpec(
        "network-accuracy",
        "10_network",
        "A network under inexact multipliers",
        multipliers.network_accuracy,
        "The share of test images that the network of the seed's layer names rightly, each product "
        "of its convolutions and fully connected layers done by the multiplier, with int8 or with "
        "Fibonacci weights, rounded at once or retrained. A faint dot for each training, a bold "
        "one for their mean.",
        reads=("{stem}.accuracy.csv",),
        kind="Accuracies in percent, one line per multiplier and weights; medians with ranges",
        table=lambda frame: medians(multipliers.ways_of(frame), ["line", "kind"], {"x": "%"}),
    ),
    _times(
        "network-times",
        "10_network",
        "What simulating a network costs",
        "PyTorch's MNIST example, two convolutions and two fully connected layers: in float32, and "
        "with every product of int8 numbers by the multiplier that is named, bit for bit. "
        "Notebooks 9 and 10 define them; compiled look-ups take each product from a table, in C.",
    ),
]
