"""Predictions: bounds that were written before a measurement, and what was found. No torch."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from posmat.measure.summary import format_figures, noise_of

KEPT, FAILED, OPEN = "as predicted", "not as predicted", "undecided"
NOT_MEASURED = "not measured"
COLUMNS = ["prediction", "at_least", "at_most", "measured", "low", "high", "noise", "verdict"]


class Found(NamedTuple):
    """A measured number and its range, and how far the control of a ratio strays from 1."""

    value: float
    low: float
    high: float
    noise: float = 0.0


def found_ratio(table: pd.DataFrame, method: str | tuple) -> Found | None:
    """What a line of `summarize` says of its ratio; None where the method has none."""
    line = table.loc[method]
    if pd.isna(line["ratio"]):
        return None
    return Found(*line[["ratio", "ratio_low", "ratio_high"]], noise_of(table, method))


def score_predictions(
    predicted: Mapping[str, tuple[float | None, float | None]],
    found: Mapping[str, Found | float | None],
    **tags: object,
) -> pd.DataFrame:
    """A row for each prediction, with what was measured beside it and a verdict.

    Args:
        predicted: by name, the least and the most that was expected; None for no bound.
        found: by the same names, a number, alone or with its range, or None where there is none.
        tags: a column each, with one value for all rows.

    Returns:
        The columns prediction, at_least, at_most, measured, low, high, noise and `verdict`: 'as
        predicted' where the whole range is within the bounds, 'not as predicted' where it is
        outside by more than the noise, 'undecided' between the two or where the range is not known,
        or 'not measured'.

    Raises:
        ValueError: the two do not name the same predictions.
    """
    if strange := predicted.keys() ^ found.keys():
        raise ValueError(f"predicted and found differ in {', '.join(sorted(strange))}: name both.")
    lines = []
    for name, (least, most) in predicted.items():
        own = found[name]
        own = own if isinstance(own, Found) else Found(own, own, own)
        bounds = [None if end is None else float(end) for end in (least, most)]
        lines.append((name, *bounds, *own, _verdict(least, most, own)))
    return pd.DataFrame(lines, columns=COLUMNS).assign(**tags).convert_dtypes()


def _verdict(least: float | None, most: float | None, found: Found) -> str:
    if pd.isna(found.value):
        return NOT_MEASURED
    least = -float("inf") if least is None else least
    most = float("inf") if most is None else most
    if least <= found.low and found.high <= most:
        return KEPT
    outside = found.high * (1 + found.noise) < least or found.low > most * (1 + found.noise)
    return FAILED if outside else OPEN


def show_predictions(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of `score_predictions` as they are shown: bounds in words, numbers to 3 figures."""
    ends = scores[["at_least", "at_most"]].map(lambda end: "" if pd.isna(end) else f"{end:,.4g}")
    texts = [
        f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
        for low, high in zip(ends["at_least"], ends["at_most"], strict=True)
    ]
    numbers = scores[["measured", "low", "high"]].map(format_figures)
    shown = numbers.rename(columns={"low": "from", "high": "to"})
    shown.insert(0, "predicted", texts)
    return shown.assign(verdict=scores["verdict"]).set_axis(scores["prediction"])


def tell_predictions(scores: pd.DataFrame) -> str:
    """One sentence: how many came out as predicted, and which did not or cannot be told."""
    kept = int((scores["verdict"] == KEPT).sum())
    others = [
        f"{verdict}: {' | '.join(scores.loc[scores['verdict'] == verdict, 'prediction'])}"
        for verdict in (FAILED, OPEN, NOT_MEASURED)
        if (scores["verdict"] == verdict).any()
    ]
    of = f"Of {len(scores)} prediction{'s' * (len(scores) > 1)} {kept} came out as predicted"
    return "; ".join([of, *others]) + "."
