"""Compare: two machines, or two runs, method by method.

Times of separate processes are not paired, so two things stand side by side: the quotient of the
times, and the quotient of the ratios to the baseline, which a machine that is slower as a whole
leaves at 1.
"""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.records import RecordError
from posmat.report.drawing import (
    Library,
    Result,
    find_results,
    groups_of,
    is_timed,
    summarize_groups,
)
from posmat.report.parameters import UsageError

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 2000
_PROBLEM = ("dtype", "batch_size", "out_features", "in_features")  # must agree between sides


def compare_sides(root: Path, a: str, b: str) -> str:
    """What `posmat compare A B` prints.

    Raises:
        UsageError: A or B is neither a machine in data/ nor a file of rows, or they share nothing.
        RecordError: a file of rows does not hold.
    """
    library = Library(root)
    left, right = _side(root, a), _side(root, b)
    said = []
    if isinstance(left, Path) or isinstance(right, Path):
        if not (isinstance(left, Path) and isinstance(right, Path)):
            raise UsageError("give two machines, or two files of rows, not one of each.")
        for path in (left, right):
            _require_blocks(library, path)
        said.append(_compare_files(library, left, right, (a, b), left.name))
    else:
        for one, other in _pairs(left, right):
            names = tuple(f"{side.machine}/{side.device}" for side in (one, other))
            said += [_compare_files(library, one.rows, other.rows, names, one.stem)]
        said = [text for text in said if text]
        if not said:
            raise UsageError(f"{a} and {b} have no rows of the same notebook and parameters.")
    said.append(
        "times: seconds of B / seconds of A. ratios: (method / baseline) of B / that of A, which "
        "does not see that one\nmachine is slower as a whole. Intervals: the range over fresh "
        "kernels, of one run a 95 % bootstrap; noise: how far\nthe baseline timed a second time "
        "strays from 1 on both sides."
    )
    return "\n\n".join(said)


def compare_rows(a: "pd.DataFrame", b: "pd.DataFrame") -> "pd.DataFrame":
    """One line per method: its times on both sides, their quotient, and that of the ratios.

    Columns `time`, `time_low`, `time_high` and `ratio`, `ratio_low`, `ratio_high` are B over A;
    `time_is` and `ratio_is` say 'slower', 'faster' or 'within the noise'; of a single block, which
    has no interval, that it is not judged; and of a method that only one side has timed, why.

    Raises:
        ValueError: the rows cannot be summarized, or are of different problems.
    """
    import pandas as pd

    from posmat.summary import AGAIN

    by = list(dict.fromkeys([*groups_of(a), *groups_of(b)]))
    for name in by:
        for side, rows in (("A", a), ("B", b)):
            if name not in rows:
                raise ValueError(f"{side} has no column {name!r}, which sets the other's apart.")
    for name in _PROBLEM:
        if name not in by and name in a and name in b:
            values = [set(side[name].dropna().unique()) for side in (a, b)]
            if not values[0] & values[1]:
                one, other = (", ".join(map(str, sorted(v, key=str))) for v in values)
                raise ValueError(f"they are of different problems: {name} is {one} and {other}.")
    tables = [summarize_groups(side, by) for side in (a, b)]
    ranges = [_ranges(side, by) for side in (a, b)]
    lines = []
    for key in dict.fromkeys([*tables[0].index, *tables[1].index]):
        group, method = (key[:-1], key[-1]) if by else ((), key)
        line = {**dict(zip(by, group, strict=True)), "method": method}
        here = [table.loc[key] if key in table.index else None for table in tables]
        states = ["not there" if one is None else one["state"] for one in here]
        if any(state != "timed" for state in states):
            where = [f"{state} on {side}" for state, side in zip(states, "AB", strict=True)]
            lines.append(line | {"time_is": ", ".join(w for w in where if "timed" not in w)})
            continue
        baseline = here[0]["baseline"]
        if baseline != here[1]["baseline"]:
            raise ValueError(f"their baselines differ: {baseline} and {here[1]['baseline']}.")
        noise = 1.0
        for table in tables:
            control = (*group, baseline + AGAIN) if by else baseline + AGAIN
            if control in table.index and table.loc[control, "state"] == "timed":
                ends = table.loc[control, ["ratio_low", "ratio_high"]]
                noise *= 1 + max(abs(float(end) - 1) for end in ends)
        mid_a, mid_b = (float(one["median"]) for one in here)
        (low_a, high_a), (low_b, high_b) = (side[key] for side in ranges)
        line |= {"a_ms": 1e3 * mid_a, "b_ms": 1e3 * mid_b, "time": mid_b / mid_a}
        line |= {"time_low": low_b / high_a, "time_high": high_b / low_a}
        single = min(int(one["rounds"]) for one in here) < 2  # the seed's loop, say
        judge = (lambda *_: "one block, not judged") if single else _verdict
        line["time_is"] = judge(line["time_low"], line["time_high"], noise)
        if method != baseline:
            one, other = here
            line |= {"ratio_a": float(one["ratio"]), "ratio_b": float(other["ratio"])}
            line["ratio"] = line["ratio_b"] / line["ratio_a"]
            line["ratio_low"] = float(other["ratio_low"]) / float(one["ratio_high"])
            line["ratio_high"] = float(other["ratio_high"]) / float(one["ratio_low"])
            line["ratio_is"] = judge(line["ratio_low"], line["ratio_high"], noise)
        lines.append(line)
    columns = ["a_ms", "b_ms", "time", "time_low", "time_high", "time_is"]
    columns += ["ratio_a", "ratio_b", "ratio", "ratio_low", "ratio_high", "ratio_is"]
    return pd.DataFrame(lines).set_index([*by, "method"]).reindex(columns=columns)


def _verdict(low: float, high: float, noise: float) -> str:
    """What an interval of B over A says, where the controls alone stray by `noise`."""
    if low > noise:
        return "slower"
    return "faster" if high < 1 / noise else "within the noise"


def _ranges(rows: "pd.DataFrame", by: list[str]) -> dict:
    """The range of each method's median seconds: over its runs, or a bootstrap of one."""
    import numpy as np

    timed = rows[rows["state"] == "timed"]
    found = {}
    for key, own in timed.groupby([*by, "method"], sort=False, dropna=False):
        medians = own.assign(s=own["seconds"].astype(float)).groupby("run")["s"].median()
        low, high = medians.min(), medians.max()
        if len(medians) == 1:
            values = own["seconds"].to_numpy(float)
            drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
            low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        found[key if by else key[0]] = float(low), float(high)
    return found


def _require_blocks(library: Library, path: Path) -> None:
    """Refuse a file that a person named and that is not of timed blocks.

    Raises:
        RecordError: it lacks a column, which is named.
    """
    from posmat.summary import check_rows

    try:
        check_rows(library.read(path))
    except ValueError as error:
        raise RecordError(f"{library.say(path)}: {error}") from None


def _compare_files(
    library: Library, one: Path, other: Path, names: tuple[str, ...], title: str
) -> str:
    a, b = library.read(one), library.read(other)
    if not is_timed(a) or not is_timed(b):
        return ""
    try:
        table = compare_rows(a, b)
    except ValueError as error:
        sides = f"{library.say(one)} and {library.say(other)}"
        raise RecordError(f"{sides} cannot be compared: {error}") from None
    return f"{title}: A = {names[0]}, B = {names[1]}\n{_as_text(table)}"


def _as_text(table: "pd.DataFrame") -> str:
    import pandas as pd

    from posmat.summary import format_figures

    def span(line: "pd.Series", name: str) -> str:
        if pd.isna(line[name]):
            return ""
        ends = (format_figures(line[f"{name}_{end}"]) for end in ("low", "high"))
        return f"{format_figures(line[name])} ({' to '.join(ends)})"

    shown = pd.DataFrame(index=table.index)
    for name in ("a_ms", "b_ms"):
        shown[name] = [format_figures(value) for value in table[name]]
    shown["times B/A"] = [span(line, "time") for _, line in table.iterrows()]
    shown[""] = table["time_is"]
    for name in ("ratio_a", "ratio_b"):
        shown[name] = [format_figures(value) for value in table[name]]
    shown["ratios B/A"] = [span(line, "ratio") for _, line in table.iterrows()]
    shown[" "] = table["ratio_is"].fillna("")
    return shown.reset_index().to_string(index=False)


def _side(root: Path, word: str) -> Path | list[Result]:
    """What A or B names: a file of rows, or the results of a machine."""
    if word.endswith(".csv"):
        path = Path(word).resolve()
        if not path.is_file():
            raise UsageError(f"{word} is not there: give a machine in data/ or a file of rows.")
        return path
    machine, _, device = word.partition("/")
    results = find_results(root)
    own = [one for one in results if one.machine == machine and device in ("", one.device)]
    if not own:
        names = sorted({r.machine for r in results} | {f"{r.machine}/{r.device}" for r in results})
        if not names:
            raise RecordError("there are no rows in data/: run 'posmat report' first.")
        near = difflib.get_close_matches(word, names, n=3, cutoff=0.4) or names
        raise UsageError(f"data/ has no machine {word!r}: did you mean {' or '.join(near)}?")
    return own


def _pairs(left: list[Result], right: list[Result]) -> list[tuple[Result, Result]]:
    """What belongs side by side: the same notebook and parameters, on the same device if it can."""
    shared = {one.device for one in left} & {other.device for other in right}
    same_machine = {one.rows for one in left} & {other.rows for other in right}
    return [
        (one, other)
        for one in left
        for other in right
        if one.stem == other.stem
        and one.rows != other.rows
        and (one.device == other.device or not shared or same_machine)
    ]
