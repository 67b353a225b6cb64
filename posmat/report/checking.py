"""Check: do figures, tables, pages and provenance belong to the rows beside them?

What can carry a sha256 is held against the one it carries; what is derived is derived again.
"""

import io
import json
import re
from pathlib import Path

from posmat.records import RecordError, describe_sources, rows_hash
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
    page_digest,
    read_provenance,
    words_of_all,
)
from posmat.report.gallery import pages_of, with_findings

# Modules whose change cannot change what was measured.
_NOT_MEASURING = {"__init__", "figures", "records", "summary", "host"}


def check_project(root: Path, published: bool = False) -> tuple[list[str], list[str]]:
    """What does not hold, one line each; and which rows were made by older sources.

    With `published` a user's own runs are left out.
    """
    results = [one for one in find_results(root) if not published or one.machine not in OWN]
    if not results:
        return ["there are no rows in data/: run 'posmat report' first."], []
    library = Library(root)
    problems: list[str] = []
    for result in results:
        problems += _check_result(result, library)
    drawings, missing = find_drawings(results)
    problems += missing
    good, bad = words_of_all(drawings, library)
    problems += bad
    for drawing in good:
        problems += _check_pictures(drawing)
    problems += _check_orphans(root, drawings, published)
    problems += _check_pages(root, good)
    return list(dict.fromkeys(problems)), _older_sources(results, root)


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
    for what, digest in facts.get("frames_sha256", {}).items():
        frame = result.folder / f"{result.stem}.{what}.csv"
        if not frame.exists() or rows_hash(frame) != digest:
            problems.append(
                f"{library.say(frame)} is not the file that its provenance describes: "
                "measure again, or restore the file."
            )
    return problems + _check_table(result, library)


def _check_host(result: Result, facts: dict, name: str) -> list[str]:
    """Whether the run was made on the host that the machine's folder belongs to."""
    mark = result.folder.parent / "host.json"
    said = mark.relative_to(result.root).as_posix()
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
        kept, again = pd.read_csv(result.table), pd.read_csv(io.StringIO(derived))
        # Other versions of numpy may round the last bit of a quantile in another way.
        pd.testing.assert_frame_equal(kept, again, check_dtype=False, rtol=1e-9)
    except (OSError, ValueError):
        return [f"{name} is missing or no table: run 'posmat draw'."]
    except AssertionError:
        return [f"{name} is not what the rows beside it give: run 'posmat draw'."]
    return []


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


def _check_orphans(root: Path, drawings: list[Drawing], published: bool) -> list[str]:
    """Pictures that belong to nothing in data/."""
    expected = {drawing.picture(kind).name for drawing in drawings for kind in KINDS}
    own = tuple(f"-{machine}-" for machine in OWN) if published else ()
    return [
        f"{path.relative_to(root).as_posix()} belongs to no rows in data/: remove it."
        for path in sorted((root / "reports" / "figures").glob("*.*"))
        if path.name not in expected
        and not path.name.startswith(".")
        and not any(name in path.name for name in own)
    ]


def _check_pages(root: Path, good: dict[Drawing, Words]) -> list[str]:
    """Whether the pages carry the sha256 of what they should show, and the README its findings."""
    problems = []
    for folder, shown in pages_of(root, good).items():
        for path in (folder / "index.html", folder / "README.md"):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if f"sha256 {page_digest(shown)}" not in text[:2000]:
                how = "shows other rows than those in data/" if text else "is missing"
                problems.append(f"{name} {how}: run 'posmat draw'.")
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        again, bad = with_findings(text, good)
        problems += bad
        if again != text:
            problems.append("README.md has a finding that its rows do not give: run 'posmat draw'.")
    return problems


def _older_sources(results: list[Result], root: Path) -> list[str]:
    """One line for each machine and device whose rows other sources made than those here."""
    now = describe_sources()
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        try:
            then = read_provenance(result.provenance, root).get("sources", {})
        except RecordError:
            continue
        changed = [
            name
            for name, digest in then.get("modules", {}).items()
            if name not in _NOT_MEASURING and now["modules"].get(name) != digest
        ]
        if then.get("notebooks", {}).get(result.notebook) != now.get("notebooks", {}).get(
            result.notebook
        ):
            changed.append("the notebook")
        if changed:
            place = f"data/{result.machine}/{result.device}"
            found.setdefault(place, {})[result.stem] = changed
    return [
        f"{place}: made by older sources: "
        + "; ".join(f"{stem} ({', '.join(changed)})" for stem, changed in stems.items())
        for place, stems in found.items()
    ]
