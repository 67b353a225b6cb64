import numpy as np
import pandas as pd
import pytest

import posmat as pm
from posmat.measure.summary import AGAIN, baseline_of, check_rows, stands, summarize, tell_ratio


def rows_of(times: dict[str, list[float]], run=0, **columns) -> pd.DataFrame:
    """Rows as `time_methods` makes them, from the seconds of each method's rounds."""
    lines = [
        {"run": run, "method": method, "state": "timed", "exact": True, "max_error": None}
        | {"round": index, "number": 10, "seconds": value, "cpu_s": value, "first_s": 9.0}
        | {"device": "cpu", "threads": 1, "clock": "host"}
        | columns
        for method, values in times.items()
        for index, value in enumerate(values)
    ]
    return pd.DataFrame(lines).convert_dtypes()


BASE = [1.0, 2.0, 3.0, 4.0, 5.0]


def test_quartiles_by_hand():
    line = summarize(rows_of({"a": BASE, "a" + AGAIN: BASE})).loc["a"]
    assert (line["q25"], line["median"], line["q75"], line["min"]) == (2, 3, 4, 1)
    assert (line["rounds"], line["number"], line["first"], line["runs"]) == (5, 10, 9, 1)
    assert bool(line["exact"]) and line["ratio"] == line["ratio_low"] == line["ratio_high"] == 1


def test_the_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    times = {"a": BASE, "b": [2.0, 2.0, 30.0, 4.0, 50.0], "few": [3.0]}
    rows = rows_of(times).assign(run=pd.NA)  # without a run they are of one
    table = summarize(rows, "a")
    # Paired: 2, 1, 10, 1, 10 -> 2. The ratio of the medians would be 4 / 3.
    line = table.loc["b"]
    assert line["ratio"] == line["ratio_min"] == 2 and line["runs"] == 1
    assert line["ratio_low"] <= 2 <= line["ratio_high"]
    assert table.loc["few", "ratio"] == 3  # rounds that a slow method missed do not count


def test_several_runs_give_the_range_over_them():
    runs = [rows_of({"a": [1.0] * 5, "b": [b] * 5}, run) for run, b in enumerate((2, 5, 3))]
    table = summarize(pd.concat(runs), "a")
    assert table.loc["b", ["ratio", "ratio_low", "ratio_high", "runs"]].tolist() == [3, 2, 5, 3]
    assert "2.00 to 5.00 over 3 fresh processes" in tell_ratio(table, "b")


@pytest.mark.parametrize(
    ("rounds", "runs", "told"),
    [
        (5, 1, "95 % interval 2.00 to 2.00 in one run)"),
        (4, 1, "95 % interval 2.00 to 2.00 in one run of 4 rounds)"),
        (1, 1, "95 % interval 2.00 to 2.00 in one run of 1 round)"),
        (5, 3, "2.00 to 2.00 over 3 fresh processes)"),
        (4, 3, "2.00 to 2.00 over 3 fresh processes, 12 rounds in all)"),
    ],
)
def test_a_claim_from_few_rounds_says_so(rounds, runs, told):
    frames = [rows_of({"a": [1.0] * 9, "b": [2.0] * rounds}, run) for run in range(runs)]
    table = summarize(pd.concat(frames), "a")
    assert tell_ratio(table, "b") == f"2.00 times as long as `a` ({told}"
    assert stands(table, "b")
    by_size = summarize(pd.concat(frames).assign(batch_size=8), "a", by=["batch_size"])
    assert tell_ratio(by_size, (8, "b")) == tell_ratio(table, "b")
    # The rounds that both met make the ratio, whichever of the two the baseline is.
    assert (f" of {rounds} round" in tell_ratio(summarize(frames[0], "b"), "a")) == (rounds < 5)


def test_what_was_not_timed_keeps_its_line_and_compares_nothing():
    rows = rows_of({"a": BASE, "a" + AGAIN: BASE, "b": BASE})
    untimed = rows["method"].isin(["a", "a" + AGAIN])
    rows.loc[untimed, ["state", "seconds"]] = ["not supported", pd.NA]
    table = summarize(rows)
    assert table.loc["a", "state"] == "not supported" and pd.isna(table.loc["a", "median"])
    assert pm.in_milliseconds(table).loc["a", "median_ms"] == ""
    assert tell_ratio(table, "a") == "a time that was not measured (not supported)"
    assert pd.isna(table.loc["b", "ratio"]) and not stands(table, "b")
    assert tell_ratio(table, "b") == "3,000 ms (`a` has no time here)"


def test_clocks_stand_side_by_side():
    host = rows_of({"a": [0.004] * 3, "b": [0.002] * 3})
    wall = rows_of({"a": [0.001]}, clock="seed (wall)")
    shown = pm.clocks_side_by_side(pd.concat([host, wall]))
    assert shown.loc["a"].tolist() == ["4.00", "1.00", "0.250", "10"]
    assert shown.loc["b"].tolist() == ["2.00", "", "", ""]
    assert pm.clocks_side_by_side(host).columns.tolist() == ["host [ms]"]


def test_the_noise_floor_of_a_group_is_that_of_its_own_control():
    def group(size, b, again):
        times = {"a": [1.0] * 3, "b": [b] * 3, "a" + AGAIN: [again] * 3}
        return rows_of(times, batch_size=size, out_features=size)

    rows = pd.concat([group(64, 1.1, 1.2), group(8, 1.1, 1.01), group(256, 0.9, 1.2)])
    table = summarize(rows, by=["batch_size", "out_features"])
    told = {key[0]: stands(table, key) for key in table.index if key[-1] == "b"}
    assert told == {64: False, 8: True, 256: False}
    assert "beyond the noise" in tell_ratio(table, (64, 64, "b"))
    by_one = summarize(rows, by=["batch_size"])
    assert stands(by_one, (8, "b")) and not stands(by_one, (64, "b"))


MIXED = {"clock": ("host", "event"), "dtype": ("int8", "float32"), "batch_size": (1, 256)}
MIXED |= {"threads": (1, 2), "machine": ("epyc", "h200"), "device": ("cpu", "cuda")}


@pytest.mark.parametrize(("column", "values"), MIXED.items())
def test_rows_that_must_not_be_mixed_are_refused(column, values):
    frames = [
        rows_of({"a": [base] * 3, "b": [2.0] * 3}, **{column: value})
        for base, value in zip((1.0, 2.0), values, strict=True)
    ]
    rows = pd.concat(frames)
    told = rf"{column} \({values[0]}, {values[1]}\).*by=\['{column}'"
    with pytest.raises(ValueError, match=told):
        summarize(rows, "a")
    own = summarize(rows, "a", by=[column])  # each group has its own baseline
    assert own["ratio"].tolist() == [1, 2, 1, 1]


def test_a_group_without_the_baseline_may_hold_methods_of_two_dtypes():
    kinds = {"int8 peak": "int8", "float32 peak": "float32"}
    peaks = [rows_of({name: BASE}, dtype=kind, axis="roof") for name, kind in kinds.items()]
    rows = pd.concat([*peaks, rows_of({"a": BASE}, dtype="int8", axis="M")])
    table = summarize(rows, "a", by=["axis"])
    assert table["median"].tolist() == [3, 3, 3] and table["ratio"].isna().tolist() == [1, 1, 0]


def test_a_method_is_in_the_state_of_its_worst_run():
    runs = [rows_of({"a": [1.0] * 3, "b": [2.0] * 3}, run) for run in range(2)]
    wrong = runs[1][runs[1]["method"] == "b"].iloc[:1]
    wrong = wrong.assign(state="wrong", exact=False, seconds=None, round=None)
    rows = pd.concat([runs[0], runs[1][runs[1]["method"] == "a"], wrong])
    table = summarize(rows, "a")
    assert table.loc["b", ["state", "runs", "rounds"]].tolist() == ["wrong", 1, 3]
    assert table.loc["b", "warnings"] == "not timed in every run"
    assert "not measured (wrong)" in tell_ratio(table, "b")
    assert table.loc["a", ["state", "runs", "warnings"]].tolist() == ["timed", 2, ""]
    over_b = summarize(rows, "b")
    assert pd.isna(over_b.loc["a", "ratio"]), "a baseline that is wrong in one run compares nothing"


def test_warnings():
    steady = [1.0] * 30
    times = {"a": steady, "noisy": [1.0, 2.0] * 15, "drifting": [1.0] * 15 + [1.3] * 15}
    table = summarize(rows_of(times), "a")
    assert table.loc["a", "warnings"] == ""
    assert "noisy" in table.loc["noisy", "warnings"]
    assert "drifting" in table.loc["drifting", "warnings"]
    short = summarize(rows_of({"a": [1e-6] * 30}), "a")
    assert short.loc["a", "warnings"] == "short"
    disturbed = summarize(rows_of({"a": steady}, cpu_s=0.9), "a").loc["a"]
    assert disturbed["disturbed"] == 1 and disturbed["warnings"] == "disturbed"
    assert summarize(rows_of({"a": steady}, cpu_s=0.96), "a").loc["a", "disturbed"] == 0


STANDING = [  # the ratios of two runs, and those of their controls
    ((1.3, 1.4), (0.95, 1.05), True),
    ((1.04, 1.4), (0.95, 1.05), False),
    ((0.9, 1.4), (1.0, 1.0), False),
    ((0.5, 0.6), (0.9, 1.1), True),
]


@pytest.mark.parametrize(("method", "control", "told"), STANDING)
def test_a_claim_stands_only_beyond_the_noise_floor(method, control, told):
    runs = [
        rows_of({"a": [1.0] * 3, "b": [b] * 3, "a" + AGAIN: [again] * 3}, run)
        for run, (b, again) in enumerate(zip(method, control, strict=True))
    ]
    table = summarize(pd.concat(runs))
    assert stands(table, "b") == told == ("beyond the noise" not in tell_ratio(table, "b"))


def test_the_noise_is_that_of_the_control_whatever_the_baseline():
    """What drifts from run to run, the timed-again method against another, is no noise of b / c."""
    runs = [
        rows_of({"a": [a] * 3, "a" + AGAIN: [a] * 3, "c": [1.0] * 3, "b": [1.05] * 3}, run)
        for run, a in enumerate((1.0, 1.3))
    ]
    table = summarize(pd.concat(runs), "c")
    assert stands(table, "b") and table.loc["a" + AGAIN, ["ratio", "baseline"]].tolist() == [1, "a"]
    assert not stands(summarize(pd.concat(runs)), "b")  # over a its ratio is 1.05 and 0.81


def test_bad_rows_are_refused():
    for seconds in (None, 0.0, -1.0, float("nan")):
        rows = rows_of({"a": BASE})
        rows["seconds"] = rows["seconds"].astype(object)
        rows.loc[2, "seconds"] = seconds
        with pytest.raises(ValueError, match=r"row 3 \(a\)"):
            check_rows(rows)
    with pytest.raises(ValueError, match="'seconds'"):
        check_rows(rows_of({"a": BASE}).drop(columns="seconds"))
    with pytest.raises(ValueError, match="no row"):
        check_rows(rows_of({"a": BASE}).iloc[:0])
    with pytest.raises(ValueError, match="'c' is not among the methods: a"):
        summarize(rows_of({"a": BASE}), "c")
    with pytest.raises(ValueError, match="no baseline"):
        baseline_of(rows_of({"a": BASE}))


def test_three_figures():
    told = ["0.000736", "43.9", "3,280", "1.00", "0", ""]
    assert [*map(pm.format_figures, [0.000736, 43.87, 3284.0, 1.0, 0.0, None])] == told
    assert [*map(pm.format_figures, [0.9996, 9.996, 999.6])] == ["1.00", "10.0", "1,000"]
    assert [*map(pm.format_figures, [3284, np.int64(-12345), 0])] == ["3,284", "-12,345", "0"]
