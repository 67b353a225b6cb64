"""Summaries: rows -> tables. Frames in, frames and sentences out; needs no torch.

A ratio is paired: within a round the method's block is divided by the baseline's, and the median
over the rounds is taken, so that a machine which slows down for a while slows both. The range over
several fresh processes is two to three times wider than the interval of one: the one to print.
"""

import numpy as np
import pandas as pd

AGAIN = " (again)"  # the first control: the baseline a second time, whose ratio is the noise floor
FLOOR = "one-element call"  # the second: what calling and launching alone costs

FEW_ROUNDS = 5  # fewer in a run, and a claim says how many there were
_RESAMPLES = 2000
# What two times must share before one is divided by the other or both go into one median.
_SHARED = ["clock", "batch_size", "out_features", "in_features", "threads", "machine", "device"]
_STATES = ("timed", "not available", "not supported", "wrong")  # from the best to the worst
_NUMBERS = ["number", "seconds", "cpu_s", "first_s"]
_NEEDED = ["run", "method", "state", "exact", "max_error", "device", "threads", "clock", "round"]
_NEEDED += _NUMBERS
_MEASURED = ["median", "q25", "q75", "min", "first", "disturbed"]
_MEASURED += ["ratio", "ratio_low", "ratio_high", "ratio_min"]
_COLUMNS = ["state", "exact", "max_error", "runs", "rounds", "number", *_MEASURED, "warnings"]


def is_control(method: str) -> bool:
    """Whether a row's method is one of the two controls that every table has."""
    return method.endswith(AGAIN) or method == FLOOR


def baseline_of(rows: pd.DataFrame) -> str:
    """The baseline of rows, told by its control, the same method timed again, or a ValueError."""
    for method in rows["method"].unique():
        if method.endswith(AGAIN):
            return method.removesuffix(AGAIN)
    raise ValueError("the rows have no baseline: name one when you call time_methods.")


def summarize(
    rows: pd.DataFrame, baseline: str | None = None, by: list[str] | None = None
) -> pd.DataFrame:
    """One line per method: median, quartiles and minimum, and the ratio to the baseline.

    Args:
        rows: what `time_methods` gave, of one run or of several.
        baseline: the method whose time is 1; the default is the one that was timed again.
        by: columns that set groups of rows apart, each with its own baseline (clock, a size).

    Returns:
        A frame indexed by `by` and method, in the order of the rows. Times are in seconds. `ratio`
        is the method's time over the baseline's, and of the control always over that of the same
        method timed once, with `ratio_low` and `ratio_high`: a 95 %
        bootstrap interval where `runs` is 1, the smallest and the largest run's where it is more.
        `state` is the worst of the runs, and `runs` counts those that timed the method.

    Raises:
        ValueError: the baseline is not among the methods, a timed row has no time above 0, a group
            mixes clocks, sizes, threads, machines or devices, or the rows of one method dtypes.
    """
    by = list(by or [])
    check_rows(rows)
    baseline = baseline or baseline_of(rows)
    if baseline not in set(rows["method"]):
        raise ValueError(
            f"baseline={baseline!r} is not among the methods: {', '.join(rows['method'].unique())}."
        )
    rows = rows.assign(
        run=rows["run"].fillna(0),  # blank where no notebook's run tagged them
        **rows[_NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float),
    )
    lines = []
    groups = rows.groupby(by, sort=False, dropna=False) if by else [((), rows)]
    for key, group in groups:
        base = group[group["method"] == baseline]
        if len(base):
            _refuse_mixture(group, by, _SHARED)
        for method, own in group.groupby("method", sort=False):
            # Where nothing is divided, methods may differ in all of it; in dtype always.
            _refuse_mixture(own, by, ["dtype"] if len(base) else [*_SHARED, "dtype"])
            # Of the control the ratio is its own, to the same method timed once, always.
            once = method.removesuffix(AGAIN)
            over = base if once == method else group[group["method"] == once]
            facts = {"method": method, **_line(own, over)}
            facts["baseline"] = baseline if once == method else once
            lines.append(dict(zip(by, key, strict=True)) | facts)
    table = pd.DataFrame(lines).convert_dtypes()
    table = table.astype(dict.fromkeys(_MEASURED, "Float64"))  # whole ones too
    return table.set_index([*by, "method"])


def check_rows(rows: pd.DataFrame) -> None:
    """Raise a ValueError where a column is missing, or a 'timed' row has no time above 0."""
    if missing := [name for name in _NEEDED if name not in rows]:
        raise ValueError(f"the rows have no column {missing[0]!r}: are they rows of time_methods?")
    if rows.empty:
        raise ValueError("there are no rows.")
    seconds = pd.to_numeric(rows["seconds"], errors="coerce").astype(float)
    bad = (rows["state"] == "timed") & ~(seconds > 0)
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"row {place + 1} ({rows['method'].iloc[place]}) is in the state 'timed' with the time "
            f"{rows['seconds'].iloc[place]!r}: seconds must be a number above 0."
        )


def _refuse_mixture(rows: pd.DataFrame, by: list[str], shared: list[str]) -> None:
    """Refuse rows of more than one clock, size ... as one group."""
    for name in shared:
        if name in rows and rows[name].nunique() > 1:
            found = ", ".join(map(str, rows[name].dropna().unique()))
            raise ValueError(
                f"the rows of one group hold several values of {name} ({found}), whose times must "
                f"not be mixed: take the rows of one, or give by={[*by, name]}."
            )


def clocks_side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """Median milliseconds of each method by clock, and how far the seed's wall clock was off.

    Rows of `time_methods` and of `time_as_seed`, one under the other; `calls` are the seed's.
    """
    timed = rows[rows["state"] == "timed"]
    medians = timed.groupby(["method", "clock"], sort=False)["seconds"].median().astype(float)
    beside = 1e3 * medians.unstack("clock").reindex(timed["method"].unique())
    shown, wall = beside.add_suffix(" [ms]").map(format_figures), "seed (wall)"
    if wall in beside:
        shown[f"{wall} / host"] = (beside[wall] / beside["host"]).map(format_figures)
        calls = timed[timed["clock"] == wall].groupby("method")["number"].first().map(str)
        shown["calls"] = calls.reindex(shown.index, fill_value="")
    return shown.rename_axis("method").rename_axis(None, axis=1)


def in_milliseconds(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is shown: times in milliseconds to three figures, the unit in the name."""
    facts = table[["state", "exact", "max_error"]].dropna(axis="columns", how="all")
    # As text, each as one would write it: pandas would align numbers of very different size.
    times = (1e3 * table[["median", "q25", "q75", "first"]]).add_suffix("_ms").map(format_figures)
    ratios = table[["ratio", "ratio_low", "ratio_high"]].map(format_figures)
    counts = ["rounds", "runs", *(["warnings"] if (table["warnings"] != "").any() else [])]
    return pd.concat([facts, times, ratios, table[counts]], axis="columns")


def tell_ratio(table: pd.DataFrame, method: str | tuple) -> str:
    """A ratio as what follows "takes", with its range, few rounds, and the noise."""
    line = table.loc[method]
    if line["state"] != "timed":
        return f"a time that was not measured ({line['state']})"
    if pd.isna(line["ratio"]):
        return f"{format_figures(1e3 * line['median'])} ms (`{line['baseline']}` has no time here)"
    ratio, low, high = map(format_figures, line[["ratio", "ratio_low", "ratio_high"]])
    # The pairs of rounds that the ratio is made of.
    rounds = _group_of(table, method)["rounds"].get(line["baseline"], line["rounds"])
    rounds, runs = int(min(line["rounds"], rounds)), line["runs"]
    few = rounds < FEW_ROUNDS * runs
    if runs > 1:
        spread = f"{low} to {high} over {runs} fresh processes"
        spread += f", {rounds} rounds in all" if few else ""
    else:
        spread = f"95 % interval {low} to {high} in one run"
        spread += f" of {rounds} round{'s' * (rounds > 1)}" if few else ""
    verdict = "" if stands(table, method) else ", no difference beyond the noise"
    return f"{ratio} times as long as `{line['baseline']}` ({spread}{verdict})"


def stands(table: pd.DataFrame, method: str | tuple) -> bool:
    """Whether a method's ratio differs from 1 by more than the noise.

    Its range must leave out 1, and by more than that of the control strays from 1. In a table of
    groups `method` is the whole index, (group, method), and the control is that of the group.
    """
    line = table.loc[method]
    if pd.isna(line["ratio"]):
        return False
    floor = noise_of(table, method)
    return bool(line["ratio_low"] > 1 + floor or line["ratio_high"] < 1 / (1 + floor))


def noise_of(table: pd.DataFrame, method: str | tuple) -> float:
    """How far the control of a method's group strays from 1 at its worst; 0 without a control."""
    own = _group_of(table, method)
    ends = own.loc[[name.endswith(AGAIN) for name in own.index], ["ratio_low", "ratio_high"]]
    return max((abs(float(end) - 1) for end in ends.to_numpy().flat if pd.notna(end)), default=0.0)


def _group_of(table: pd.DataFrame, method: str | tuple) -> pd.DataFrame:
    """The lines that a method is compared with, by their names: its group, or the whole table."""
    return table.xs(method[:-1], level=table.index.names[:-1]) if table.index.nlevels > 1 else table


def _line(own: pd.DataFrame, base: pd.DataFrame) -> dict:
    """What one method's rows come to."""
    states, timed = set(own["state"]), own[own["state"] == "timed"]
    exact, error = own["exact"].dropna(), own["max_error"].dropna()
    facts = dict.fromkeys(_COLUMNS) | {
        "state": max(states, key=_STATES.index),
        "exact": bool(exact.all()) if len(exact) else None,
        "max_error": error.max() if len(error) else None,
        "runs": timed["run"].nunique(),
        "rounds": len(timed),
        "warnings": "",
    }
    if timed.empty:
        return facts
    seconds = timed["seconds"]
    # Something else had the processor meanwhile. With more threads, or a device to wait for, the
    # two times say nothing about each other.
    comparable = (timed["threads"] == 1) & (timed["device"] == "cpu") & timed["cpu_s"].notna()
    disturbed = seconds > 1.05 * timed["cpu_s"]
    facts |= {
        "number": int(timed["number"].median()),
        "median": seconds.median(),
        "q25": seconds.quantile(0.25),
        "q75": seconds.quantile(0.75),
        "min": seconds.min(),
        "first": timed.groupby("run")["first_s"].first().median(),
        "disturbed": float(disturbed.mean()) if comparable.all() else None,
    }
    found = ["not timed in every run"] if len(states) > 1 else []
    facts["warnings"] = ", ".join(found + _warnings(timed, facts))
    return facts | _ratio(timed, base)


def _ratio(own: pd.DataFrame, base: pd.DataFrame) -> dict:
    """The paired ratio, its range, and the ratio of the minima as a second opinion."""
    pairs = own.merge(base, on=["run", "round"], suffixes=("", "_base"))
    if pairs.empty or not (base["state"] == "timed").all():
        return {}
    pairs["paired"] = pairs["seconds"] / pairs["seconds_base"]
    by_run = pairs.groupby("run")["paired"].median()
    if len(by_run) > 1:
        low, high = by_run.min(), by_run.max()
    else:
        values = pairs["paired"].to_numpy()
        drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    smallest = own.groupby("run")["seconds"].min() / base.groupby("run")["seconds"].min()
    ratios = {"ratio": by_run.median(), "ratio_low": low, "ratio_high": high}
    return ratios | {"ratio_min": smallest.median()}


def _warnings(timed: pd.DataFrame, facts: dict) -> list[str]:
    """What a reader should know before believing a line."""
    found = []
    block = (timed["seconds"] * timed["number"]).median()
    if block < 1e-3 and (timed["clock"] == "host").all():
        found.append("short")
    if facts["q75"] - facts["q25"] > 0.1 * facts["median"]:
        found.append("noisy")
    if any(_is_drifting(run.sort_values("round")["seconds"]) for _, run in timed.groupby("run")):
        found.append("drifting")
    if facts["disturbed"] is not None and facts["disturbed"] > 0.25:
        found.append("disturbed")
    return found


def _is_drifting(seconds: pd.Series) -> bool:
    third = len(seconds) // 3
    if third < 5:
        return False
    change = seconds.iloc[-third:].median() / seconds.iloc[:third].median()
    return not 1 / 1.1 < change < 1.1


def format_figures(value: float | None, figures: int = 3) -> str:
    """A number to three significant figures, as one would write it: 0.000736, 43.9, 3,280.

    An integer is written whole.
    """
    if pd.isna(value):
        return ""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    value = float(value)
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    for _ in range(2):  # 0.9996 becomes 1.00, which has a place less
        places = figures - 1 - int(np.floor(np.log10(abs(value))))
        value = round(value, places)
    return f"{value:,.{max(places, 0)}f}"
