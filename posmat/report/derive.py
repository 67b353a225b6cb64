"""All that is made of rows, as {path: bytes}: `posmat draw` writes it, `posmat check` compares it.

No notebook and no torch: whoever has the rows has the figures, those of a GPU too. A file that does
not hold is told in one sentence, and of everything else the rest is made.
"""

import gc
import io
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from posmat.measure.files import LOCAL, QUICK, RecordError, make_folder, replacing, rows_digest
from posmat.report.freshness import hash_of_all_rows
from posmat.report.store import KINDS, OWN, Drawing, Result, Said, find_drawings, in_detail, name_in

if TYPE_CHECKING:  # these take a second and a half to load, and `posmat --help` needs none of it
    import pandas as pd

SUMMARY = "11_summary"  # the notebook whose rows are made of all rows
# Columns that may set groups of rows apart, each group with its own baseline.
_GROUPS = ("batch_size", "out_features", "in_features", "threads", "clock", "cache")

# What a file must be: all of it, or of a picture that is not drawn now what it must carry.
Files = dict[Path, bytes | tuple[bytes, ...]]


@dataclass
class Derived:
    """What rows give: tables and pictures, what is said of these, and what they do not give."""

    files: Files = field(default_factory=dict)
    said: dict[Drawing, Said] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def derive(results: list[Result], drawn: Collection[str] = (), workers: int = 1) -> Derived:
    """What is made of runs; of pictures that are not in `drawn`, what they must carry."""
    share = partial(derive_run, drawn=drawn)
    if workers > 1 and len(results) > 4:
        # A chart is many small objects: a tenth of the time went into collecting them.
        with ProcessPoolExecutor(workers, None, gc.set_threshold, (100_000,)) as pool:
            made = list(pool.map(share, results))
    else:
        made = list(map(share, results))
    both = Derived()
    for one in made:
        both.files |= one.files
        both.said |= one.said
        both.problems += one.problems
    both.problems = list(dict.fromkeys(both.problems))  # a host that is missing is told once
    both.said = {one: both.said[one] for one in find_drawings(results) if one in both.said}
    return both


def derive_run(result: Result, drawn: Collection[str] = ()) -> Derived:
    """What is made of one run."""
    from posmat.charts.style import summaries_kept
    from posmat.measure.summary import in_milliseconds

    made, frames, numbers = Derived(), {}, None
    try:
        kinds = result.hashes
    except RecordError as error:
        return Derived(problems=[str(error)])
    for kind in kinds:
        try:
            frames[kind] = result.read(kind)
        except RecordError as error:
            made.problems.append(str(error))
    if {"round", "seconds", "method", "state"} <= set(frames.get("csv", ())):  # timed blocks
        try:
            table = summarize_groups(frames["csv"])
            made.files[result.report("table.csv")] = table.to_csv(lineterminator="\n").encode()
            shown = in_milliseconds(table).reset_index()
            shown.insert(0, "method", shown.pop("method"))
            cells = shown.astype(object).where(shown.notna(), "").astype(str)
            numbers = {"columns": list(shown), "lines": cells.to_numpy().tolist()}
        except ValueError as error:
            made.problems.append(f"{name_in(result.data(), result.root)}: {error}")
    with summaries_kept():
        for drawing in find_drawings([result]):
            unknown = [kind for kind in drawing.kinds if kind not in kinds]
            if unknown:
                name = name_in(result.data(unknown[0]), result.root)
                made.problems.append(f"{name} is not there, and figure {drawing.id} reads it.")
            elif set(drawing.kinds) <= set(frames):
                own = [frames[kind] for kind in drawing.kinds]
                lines = numbers if drawing.kinds == ["csv"] else None
                try:
                    made.files |= _draw(drawing, own, lines, drawing.name in drawn, made.said)
                # Whatever it stumbles over in rows that somebody edited, the others are drawn.
                except Exception as error:
                    source = name_in(drawing.sources[0], result.root)
                    said = f"{drawing.name} cannot be drawn from {source}: {_first_line(error)}"
                    made.problems.append(said)
    return made


def _draw(drawing: Drawing, frames: list, numbers: dict | None, drawn: bool, said: dict) -> Files:
    """The files of a picture, or what they must carry; what is said of it goes into `said`."""
    from posmat.charts.catalogue import draw_figure

    digest = rows_digest(drawing.sources)
    if drawn:
        chart = draw_figure(drawing.id, *frames)
        words = chart.caption, chart.alt
        with TemporaryDirectory() as folder:
            chart.write(drawing.id, digest, Path(folder), drawing.suffix)
            written = {kind: Path(folder, f"{drawing.name}.{kind}").read_bytes() for kind in KINDS}
    else:
        words = drawing.spec.describe(*drawing.spec.shown(*frames))
        written = dict.fromkeys(KINDS, (drawing.id.encode(), f"rows sha256 {digest}".encode()))
    names = [frame["processor"].dropna().unique() for frame in frames if "processor" in frame]
    processors = dict.fromkeys(str(name) for of_frame in names for name in of_frame)
    # Rows that were made of rows name none, and a frame may not: there provenance does.
    facts = drawing.run.facts
    known = facts["device"].get("gpu") or facts["host"].get("processor")
    names = [*processors] or [str(known)] * bool(known)
    if names and drawing.run.device == "cpu" and (more := in_detail(facts["host"])):
        names[0] += f"; {more}"
    said[drawing] = Said(*words, digest, names, numbers)
    return {drawing.picture(kind): content for kind, content in written.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def summarize_groups(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The table of rows, with a group for each size, clock, ... and each part with its baseline.

    A part is one of a notebook's measurements, with methods of its own. A ValueError where rows
    cannot be summarized or have no baseline.
    """
    import pandas as pd

    from posmat.measure.summary import baseline_of, summarize

    parts = {"": rows}
    if "part" in rows:
        parts = dict(list(rows.groupby("part", sort=False, dropna=False)))
    bases = [own[own["method"] == baseline_of(own)] for own in parts.values()]
    by = [n for n in _GROUPS if any(n in base and base[n].nunique() > 1 for base in bases)]
    tables = {part: summarize(own, baseline_of(own), by) for part, own in parts.items()}
    return pd.concat(tables, names=["part"]) if len(tables) > 1 else tables.popitem()[1]


def write(files: Files) -> None:
    """Put files in place, each at one stroke."""
    for path, content in files.items():
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def compare(files: Files, root: Path) -> list[str]:
    """One line for each file that is not there, or is not what rows give."""
    problems = []
    for path, given in files.items():
        content = path.read_bytes() if path.is_file() else b""
        if isinstance(given, tuple):
            holds = all(mark in content for mark in given)
        else:
            holds = content == given or (path.suffix == ".csv" and _same_table(content, given))
        if not holds:
            what = "is not what its rows give" if content else "is missing"
            problems.append(f"{name_in(path, root)} {what}: run 'posmat draw'.")
    return problems


def _same_table(content: bytes, given: bytes) -> bool:
    """Whether tables say the same; versions of numpy round a quantile's last bits otherwise."""
    import pandas as pd

    try:
        one, other = (pd.read_csv(io.BytesIO(table)) for table in (content, given))
        pd.testing.assert_frame_equal(one, other, check_dtype=False, rtol=1e-9)
    except (AssertionError, ValueError):
        return False
    return True


def orphans(root: Path, results: list[Result], published: bool) -> list[str]:
    """Pictures, rows and reports that belong to nothing in data/; one line for each."""
    expected = {one.picture(kind) for one in find_drawings(results) for kind in KINDS}
    for result in results:
        expected |= {result.report(kind) for kind in ("table.csv", "html", "ipynb")}
        try:
            expected |= {result.data(kind) for kind in ("json", *result.hashes)}
        except RecordError:  # which are its frames nothing says: whatever bears its name
            expected |= {*result.folder.glob(f"{result.stem}.*")}
    places = ("reports/figures/*.*", "data/*/*/*.*", "reports/*/*/*.*")
    found = {path for place in places for path in root.glob(place)} - expected
    own = tuple(f"{mark}{machine}{mark}" for machine in OWN for mark in "/-") if published else ()
    # A failed notebook is of a run that has left no rows, perhaps.
    ignored = (*own, "/.", ".failed.ipynb")
    names = sorted(name_in(path, root) for path in found)
    names = [name for name in names if not any(mark in name for mark in ignored)]
    return [f"{name} belongs to no rows in data/: remove it." for name in names]


def check_summary(result: Result, results: Iterable[Result]) -> tuple[list[str], list[str]]:
    """Whether notebook 11 read the rows that are there now: what does not hold, and what to know.

    Only a machine's own host can make its summary again. So its own lines must be what its rows
    give today; that other machines came or measured again since then is no fault, and is told.
    """
    import pandas as pd

    from posmat.measure.seed import THEN, rankings, read_seed, then_and_now

    root, machine = result.root, result.machine
    paths = result.data(), result.report("table.csv")
    names = [name_in(path, root) for path in paths]
    try:
        kept = result.read(), pd.read_csv(paths[1])
        # Its own lines are made of its own rows, where it has any.
        asked = str(result.facts["parameters"].get("machines") or machine).replace(" ", "")
        read = [one for one in results if one.device != result.device]
        read = [one for one in read if one.machine in asked.split(",")] or read
        rows = pd.concat([one.read().assign(stem=one.stem) for one in read], ignore_index=True)
        seed = read_seed(root / "data" / "seed.csv")
        derived = then_and_now(rows, seed), rankings(rows, seed).reset_index()
    except RecordError:  # told where the file itself is checked
        return [], []
    except (OSError, KeyError, ValueError) as error:
        return [f"{names[0]} or its table cannot be made again: {_first_line(error)}"], []
    where = {LOCAL: "", QUICK: " --quick"}.get(machine, f" --machine {machine}")
    again = f"run 'posmat report 11{where}'."
    problems = []
    for name, old, new in zip(names, kept, derived, strict=True):
        shared = [column for column in old if column in new]  # older sources said other things
        pair = (one.loc[one["machine"].isin([machine, THEN]), shared] for one in (old, new))
        if not _same_table(*(one.to_csv(index=False).encode() for one in pair)):
            problems.append(f"{name} was made from other rows of {machine} than there are: {again}")
    known = (result.facts.get("key") or {}).get("rows")
    note = (
        f"{names[0]} was made when data/ held other rows; what it says of {machine} still "
        f"holds, and to read all that are there now, {again}"
    )
    return problems, [] if problems or known == hash_of_all_rows(root, machine) else [note]
