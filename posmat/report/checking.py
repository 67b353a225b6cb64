"""Check: do figures, tables, pages and provenance belong to the rows beside them?

What can carry a sha256 is held against the one it carries; what is derived is derived again.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.measure.files import LOCAL, QUICK, RecordError, is_read_by
from posmat.measure.run import ask_git
from posmat.report.drawing import (
    ALL,
    KINDS,
    OWN,
    Drawing,
    Library,
    Result,
    Words,
    derive_table,
    find_drawings,
    find_results,
    first_line,
    name_in,
    owner_of,
    page_digest,
    read_provenance,
    words_of_all,
)
from posmat.report.freshness import hash_of_all_rows, sources_key, why_changed
from posmat.report.gallery import links_of, pages_of, render_pages, with_figures

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "10_summary"  # the notebook whose rows are made of all rows
_REPORTS = ("html", "ipynb", "table.csv")  # what a run leaves in reports/


def check_project(root: Path, published: bool = False) -> tuple[list[str], list[str], list[str]]:
    """What does not hold, which rows older sources made, and what else is to be known.

    Each is a list of lines. With `published` a user's own runs are left out.
    """
    results = [one for one in find_results(root) if not published or one.machine not in OWN]
    if not results:
        return ["there are no rows in data/: run 'posmat report' first."], [], []
    library = Library(root)
    problems: list[str] = []
    notes: list[str] = []
    for result in results:
        problems += _check_result(result, library)
        if result.notebook == SUMMARY:
            bad, known = _check_summary(result, results, library)
            problems += bad
            notes += known
    drawings, missing = find_drawings(results)
    problems += missing
    good, bad = words_of_all(drawings, library)
    problems += bad
    for drawing in good:
        problems += _check_pictures(drawing)
    problems += _check_orphans(root, drawings, results, published)
    if not bad:  # a page shows everything: it is judged when what it shows can be read
        problems += _check_pages(root, good, results, library, problems)
    notes += _unknown_commits(results, root)
    return list(dict.fromkeys(problems)), _older_sources(results, root), notes


def _check_result(result: Result, library: Library) -> list[str]:
    """Rows, provenance and table of one run."""
    problems = []
    try:
        rows = library.read(result.rows)
    except RecordError as error:
        return [str(error)]
    name = library.say(result.provenance)
    try:
        facts = read_provenance(result.provenance, result.root)
    except RecordError as error:
        return [str(error)]
    for key, folder in (("machine", result.machine), ("notebook", result.notebook)):
        if facts.get(key) != folder:
            problems.append(f"{name} is of the {key} {facts.get(key)!r}, not of {folder!r}.")
    for column in ("machine", "device"):
        folder = getattr(result, column)
        if column in rows and result.device != ALL:
            others = sorted(set(rows[column].dropna().astype(str)) - {folder})
            if others:
                problems.append(
                    f"{library.say(result.rows)} has rows of the {column} {others[0]!r}, "
                    f"not of {folder!r}."
                )
    problems += _check_host(result, facts, name)
    for what in facts.get("frames_sha256", {}):
        try:
            library.read(result.folder / f"{result.stem}.{what}.csv")
        except RecordError as error:
            problems.append(str(error))
    return problems + _check_table(result, library)


def _check_host(result: Result, facts: dict, name: str) -> list[str]:
    """Whether the run was made on the host that the machine's folder belongs to."""
    mark = result.folder.parent / "host.json"
    said = name_in(mark, result.root)
    try:
        owner = json.loads(mark.read_text(encoding="utf-8"))["host_identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{said} is missing or names no host: the machine's rows have no owner."]
    if facts.get("host", {}).get("host_identity") != owner:
        return [f"{name} was made on another host than the one in {said}."]
    return []


def _check_table(result: Result, library: Library) -> list[str]:
    import pandas as pd

    name = result.table.relative_to(result.root).as_posix()
    try:
        derived = derive_table(result, library)
    except RecordError as error:
        return [str(error)]
    if derived is None:
        return []
    try:
        kept = pd.read_csv(result.table)
    except (OSError, ValueError):
        return [f"{name} is missing or no table: run 'posmat draw'."]
    if not _same(kept, pd.read_csv(io.StringIO(derived))):
        return [f"{name} is not what the rows beside it give: run 'posmat draw'."]
    return []


def _same(kept: "pd.DataFrame", derived: "pd.DataFrame") -> bool:
    """Whether two tables say the same, however their files or dtypes write it."""
    import pandas as pd

    one, other = (pd.read_csv(io.StringIO(table.to_csv(index=False))) for table in (kept, derived))
    try:
        # Other versions of numpy may round the last bit of a quantile in another way.
        pd.testing.assert_frame_equal(one, other, check_dtype=False, rtol=1e-9)
    except AssertionError:
        return False
    return True


def _check_pictures(drawing: Drawing) -> list[str]:
    """Whether each file of a picture is there and carries its id and the sha256 of its rows."""
    problems = []
    for kind in KINDS:
        path = drawing.picture(kind)
        name = path.relative_to(drawing.root).as_posix()
        if not path.exists():
            problems.append(f"{name} is missing: run 'posmat draw'.")
            continue
        content = path.read_bytes()
        found = re.search(rb"rows sha256 ([0-9a-f]{64})", content)
        if found is None or drawing.spec.id.encode() not in content:
            problems.append(
                f"{name} does not carry its id and its rows' sha256: run 'posmat draw'."
            )
        elif found[1].decode() != drawing.digest():
            problems.append(
                f"{name} was drawn from other rows (sha256 {found[1].decode()[:12]}..., now "
                f"{drawing.digest()[:12]}...): run 'posmat draw'."
            )
    return problems


def _check_summary(
    result: Result, results: list[Result], library: Library
) -> tuple[list[str], list[str]]:
    """Whether notebook 10 read the rows that are there now: what does not hold, and what to know.

    A machine's summary is made when the machine is published, and only its own host can make it
    again. So its own lines must be what its rows give today; that other machines came or measured
    again since then is no fault of it, and is told. So is a key of other rows that changed no line.
    """
    import pandas as pd

    from posmat.measure.seed import THEN, rankings, read_seed, then_and_now

    name = library.say(result.rows)
    try:
        facts = read_provenance(result.provenance, result.root)
        kept = library.read(result.rows)
        read = [one for one in results if one.device != ALL]
        read = [one.rows for one in read if is_read_by(result.machine, one.machine)]
        frames = [library.read(path).assign(stem=path.stem) for path in read]
        rows = pd.concat(frames, ignore_index=True)
        if asked := facts.get("parameters", {}).get("machines"):
            rows = rows[rows["machine"].isin(name.strip() for name in str(asked).split(","))]
        seed = read_seed(result.root / "data" / "seed.csv")
        derived = then_and_now(rows, seed), rankings(rows, seed).reset_index()
        ranked = pd.read_csv(result.table)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError):
        return [f"{library.say(result.table)} is missing or no table: restore it."], []
    except RecordError:  # told where the file itself is checked
        return [], []
    except (KeyError, ValueError) as error:
        return [f"{name} cannot be made again: {first_line(error)}"], []
    own = [result.machine, THEN]
    again = f"run 'posmat report 10{_of(result.machine)}'."
    problems = []
    for path, old, new in zip((result.rows, result.table), (kept, ranked), derived, strict=True):
        # Older sources said less of each line.
        pair = (one.loc[one["machine"].isin(own), old.columns] for one in (old, new))
        if not _same(*pair):
            what = f"was made from other rows of {result.machine} than there are"
            problems.append(f"{library.say(path)} {what}: {again}")
    rows_now = hash_of_all_rows(result.root, result.machine)
    if problems or (facts.get("key") or {}).get("rows") == rows_now:
        return problems, []
    return [], [
        f"{name} was made when data/ held other rows; what it says of {result.machine} still "
        f"holds, and to read all that are there now, {again}"
    ]


def _of(machine: str) -> str:
    """What the command line of a machine's runs says of it."""
    return {LOCAL: "", QUICK: " --quick"}.get(machine, f" --machine {machine}")


def _check_orphans(
    root: Path, drawings: list[Drawing], results: list[Result], published: bool
) -> list[str]:
    """Pictures, rows and reports that belong to nothing in data/."""
    expected = {drawing.picture(kind) for drawing in drawings for kind in KINDS}
    for result in results:
        expected |= {result.rows, result.provenance, *map(result.report, _REPORTS)}
        expected |= {result.folder / f"{result.stem}.{what}.csv" for what in _frames(result)}
    own = tuple(f"-{machine}-" for machine in OWN) if published else ()
    pictures = [
        path
        for path in sorted((root / "reports" / "figures").glob("*.*"))
        if not any(name in path.name for name in own)
    ]
    files = [
        path
        for kind in ("data", "reports")
        for path in sorted((root / kind).glob("*/*/*"))
        if path.is_file() and not (published and path.parents[1].name in OWN)
    ]
    return [
        f"{name_in(path, root)} belongs to no rows in data/: remove it."
        for path in pictures + files
        if path not in expected
        and not path.name.startswith(".")
        and not path.name.endswith(".failed.ipynb")  # of a run that has left no rows, perhaps
    ]


def _frames(result: Result) -> list[str]:
    """What a run's frames are called: by its provenance or, where that cannot be read, as found."""
    try:
        return list(read_provenance(result.provenance, result.root).get("frames_sha256", {}))
    except RecordError:
        owned = ((owner_of(path), path) for path in result.folder.glob("*.csv"))
        return [what for (owner, what), _ in owned if what and owner == result.provenance]


def _check_pages(
    root: Path,
    good: dict[Drawing, Words],
    results: list[Result],
    library: Library,
    told: list[str],
) -> list[str]:
    """Whether the pages and the README say what rows say, and link to what is there.

    What was told of a missing file is not told again.
    """
    problems = []
    shown = pages_of(root, good)
    for path, again in render_pages(root, good, results, library).items():
        name = name_in(path, root)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        gone = [one for one in links_of(text, path) if not one.exists()]
        if not text:
            problems.append(f"{name} is missing: run 'posmat draw'.")
        elif f"sha256 {page_digest(shown[path.parent])}" not in text[:2000]:
            problems.append(f"{name} shows other rows than those in data/: run 'posmat draw'.")
        elif text != again and not gone:
            problems.append(f"{name} does not say what its rows give: run 'posmat draw'.")
        for target in (name_in(Path(os.path.normpath(one)), root) for one in gone):
            if not any(target in line for line in told):
                problems.append(
                    f"{name} links to {target}, which is not there: restore it, or run "
                    "'posmat draw'."
                )
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        again, bad = with_figures(text, good)
        problems += bad
        if again != text:
            problems.append("README.md does not say what its rows give: run 'posmat draw'.")
    return problems


def _unknown_commits(results: list[Result], root: Path) -> list[str]:
    """One line for each commit that made rows and that the repository here does not have.

    Nothing where there is no repository, or a shallow one, which does not have most.
    """
    places: dict[str, dict[str, None]] = {}
    for result in results:
        try:
            sources = read_provenance(result.provenance, root).get("sources", {})
        except RecordError:
            continue
        commit = str(sources.get("commit"))
        if re.fullmatch("[0-9a-f]{7,64}", commit):
            places.setdefault(commit, {})[name_in(result.folder, root)] = None
    if (
        not (root / ".git").exists()
        or ask_git(root, "rev-parse", "--is-shallow-repository") != "false"
    ):
        return []
    return [
        f"{', '.join(where)}: made at the commit {commit[:10]}, which this repository does not have"
        for commit, where in places.items()
        if ask_git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None
    ]


def _older_sources(results: list[Result], root: Path) -> list[str]:
    """One line for each machine and device whose rows other sources made than those here.

    Whether that is so is asked as `posmat report` asks, but for host, device and PyTorch's version.
    """
    found: dict[str, list[str]] = {}
    for result in results:
        try:
            known = read_provenance(result.provenance, root).get("key") or {}
        except RecordError:
            continue
        notebook = root / "notebooks" / f"{result.notebook}.ipynb"
        gone = "the notebook is not there"
        if why := why_changed(known, sources_key(notebook)) if notebook.exists() else gone:
            place = f"data/{result.machine}/{result.device}"
            found.setdefault(place, []).append(f"{result.stem} ({why})")
    return [f"{place}: made by older sources: {'; '.join(ones)}" for place, ones in found.items()]
