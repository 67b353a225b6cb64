"""Then and now: the times that the 2020 notebook printed beside rows of today. Needs no torch."""

from itertools import combinations
from pathlib import Path

import pandas as pd

from posmat.measure.files import RecordError, project_root
from posmat.measure.roofline import SIZES
from posmat.measure.summary import format_figures, stands, summarize

THEN = "2020"


def read_seed(path: Path | None = None) -> pd.DataFrame:
    """Every time that the seed printed: data/seed.csv, or a RecordError where it is not."""
    path = path or (project_root() or Path.cwd()) / "data" / "seed.csv"
    if not path.exists():
        raise RecordError(f"{path} is not there: it is part of the checkout; run in one.")
    return pd.read_csv(path, keep_default_na=False).convert_dtypes()


def then_and_now(rows: pd.DataFrame, seed: pd.DataFrame) -> pd.DataFrame:
    """One line for each time of the seed, and for each machine, device and clock of today.

    Rows belong to a time of the seed when notebook, method and dtype agree, at the seed's sizes.
    Of several runs of one notebook the one with the default parameters is taken.

    Returns:
        section, notebook, method, dtype, where ('2020, cuda' or 'h200, cuda'), machine, device,
        clock, milliseconds (the median of the blocks, with their quartiles), `synchronised`,
        processor and torch; blank where 2020 says nothing.
    """
    keys, sizes = ["notebook", "method", "dtype"], list(SIZES.values())
    then = seed.assign(machine=THEN, where=THEN + ", " + seed["device"])
    timed = _default_runs(rows[rows["state"] == "timed"])
    timed = timed.merge(seed[["section", *keys, *sizes]], on=[*keys, *sizes])
    if "synchronised" not in timed:
        timed["synchronised"] = None
    by = ["section", *keys, "machine", "device", "clock", "processor", "torch", "synchronised"]
    blocks = timed.groupby(by, sort=False, dropna=False)["seconds"]
    quartiles = {"milliseconds": 0.5, "q25_milliseconds": 0.25, "q75_milliseconds": 0.75}
    now = pd.DataFrame({name: 1e3 * blocks.quantile(q) for name, q in quartiles.items()})
    now = now.reset_index()
    now["where"] = now["machine"] + ", " + now["device"]
    columns = ["section", *keys, "where", "machine", "device", "clock", *quartiles]
    columns += ["synchronised", "processor", "torch"]
    both = pd.concat([then, now], ignore_index=True).reindex(columns=columns)
    return both.sort_values("section", kind="stable", ignore_index=True).convert_dtypes()


def rankings(rows: pd.DataFrame, seed: pd.DataFrame) -> pd.DataFrame:
    """Each pair of forms within a section of the seed: which was faster then, and now, and where.

    Returns:
        One line per section, pair, machine and device: `faster in 2020` and `slower`, the ratio
        slower / faster then, now, and now by `the seed's way` of timing (its wall time, the median
        over runs), and the `order` by the ratio now: 'order kept', 'order reversed', 'no difference
        beyond the noise', or 'not both timed'. `same device` says whether 2020 used a device of
        this kind, `sound in 2020` whether both its times are of several calls, by a clock that
        waited for the device.
    """
    lines = []
    rows = _default_runs(rows)
    same = ["notebook", "dtype", *SIZES.values()]
    for section, own in seed.groupby("section"):
        for pair in combinations(own.to_dict("records"), 2):
            fast, slow = sorted(pair, key=lambda line: line["milliseconds"])
            here = rows[(rows[same] == pd.Series(fast)[same]).all(axis=1)]
            sound = all(form["synchronised"] != "no" and form["calls"] > 1 for form in pair)
            then = format_figures(slow["milliseconds"] / fast["milliseconds"])
            for (machine, device), group in here.groupby(["machine", "device"], sort=False):
                order, now = _order(group[group["clock"] == "host"], fast["method"], slow["method"])
                loops = group[group["clock"] == "seed (wall)"].groupby("method")["seconds"].median()
                again = loops.get(slow["method"], pd.NA) / loops.get(fast["method"], pd.NA)
                of_a_kind = device == fast["device"] == slow["device"]
                line = (section, fast["method"], slow["method"], then, sound, machine, device)
                lines.append((*line, of_a_kind, now, format_figures(again), order))
    columns = ["section", "faster in 2020", "slower", "ratio then", "sound in 2020", "machine"]
    columns += ["device", "same device", "ratio now", "the seed's way", "order"]
    return pd.DataFrame(lines, columns=columns).set_index("section")


def _default_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one run of each notebook, dtype, machine and device, no variant among them."""
    if "stem" not in rows:
        return rows
    length = rows["stem"].str.len()  # a variant's name is longer
    of_one = [rows[name] for name in ("notebook", "dtype", "machine", "device")]
    return rows[length == length.groupby(of_one, dropna=False).transform("min")]


def _order(group: pd.DataFrame, fast: str, slow: str) -> tuple[str, str]:
    """Whether the order of 2020 holds, as far as the noise of the rows lets us say."""
    states = group.groupby("method")["state"].first()
    if not {fast, slow} <= set(states[states == "timed"].index):
        return "not both timed", ""
    table = summarize(group, baseline=fast)
    now = format_figures(table.loc[slow, "ratio"])
    if not stands(table, slow):
        return "no difference beyond the noise", now
    return ("order kept" if table.loc[slow, "ratio"] > 1 else "order reversed"), now
