import pandas as pd
import pytest

import posmat as pm
from posmat.tests.test_summary import AGAIN, BASE, rows_of


@pytest.mark.parametrize(
    ("bounds", "found", "verdict"),
    [
        ((2, 3), pm.Found(2.5, 2.1, 2.9), "as predicted"),
        ((2, 3), pm.Found(2.5, 2.1, 3.1), "undecided"),
        ((2, 3), pm.Found(3.4, 3.2, 3.6), "not as predicted"),
        ((2, 3), pm.Found(3.4, 3.2, 3.6, noise=0.1), "undecided"),
        ((2, 3), pm.Found(1.5, 1.4, 1.6), "not as predicted"),
        ((2, 3), pm.Found(1.9, 1.8, 1.95, noise=0.1), "undecided"),
        ((10, None), 12, "as predicted"),
        ((10, None), 9.3, "not as predicted"),
        ((None, 2), 1.5, "as predicted"),
        ((None, 0), 0.5, "not as predicted"),
        ((0, None), None, "not measured"),
        ((0, None), pm.Found(0.5, float("nan"), float("nan")), "undecided"),
    ],
)
def test_a_verdict_knows_the_range_and_the_noise(bounds, found, verdict):
    scores = pm.score_predictions({"a": bounds}, {"a": found}, run=0)
    assert scores["verdict"].tolist() == [verdict] and scores["run"].tolist() == [0]


def test_a_ratio_brings_the_noise_of_its_own_control():
    times = {"a": BASE, "b": [2 * s for s in BASE], "a" + AGAIN: [1.1 * s for s in BASE]}
    table = pm.summarize(rows_of(times | {"none": [1.0] * 5}))
    found = pm.found_ratio(table, "b")
    assert found[:3] == (2, 2, 2) and found.noise == pytest.approx(0.1)
    assert pm.score_predictions({"b": (2.1, 3)}, {"b": found}).loc[0, "verdict"] == "undecided"
    table.loc["b", "ratio"] = pd.NA
    assert pm.found_ratio(table, "b") is None


def test_what_is_shown_and_said():
    predicted = {"a": (2, 3), "b": (10, None), "c": (None, 1), "d": (1, 2)}
    scores = pm.score_predictions(predicted, {"a": 2.5, "b": 9, "c": pm.Found(1, 0, 2), "d": None})
    shown = pm.show_predictions(scores)
    assert shown["predicted"].tolist() == ["2 to 3", "at least 10", "at most 1", "1 to 2"]
    assert pm.tell_predictions(scores) == (
        "Of 4 predictions 1 came out as predicted; not as predicted: b; undecided: c; "
        "not measured: d."
    )
    with pytest.raises(ValueError, match="differ in b"):
        pm.score_predictions({"a": (1, 2), "b": (1, 2)}, {"a": 1})
