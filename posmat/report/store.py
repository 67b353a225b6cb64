"""What data/ holds: runs, their rows and frames, held against their hashes, and their figures.

Whatever does not belong there is refused here, in one sentence, and nowhere else. No torch.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.measure.files import (
    ALL_DEVICES,
    LOCAL,
    QUICK,
    TABLE,
    RecordError,
    read_rows,
    rows_digest,
    rows_hash,
)
from posmat.measure.run import ask_git

if TYPE_CHECKING:  # these take a second and a half to load, and `posmat --help` needs none of it
    import pandas as pd

    from posmat.charts.catalogue import FigureSpec

OWN = (LOCAL, QUICK)  # machines whose folders git ignores: a user's own runs
KINDS = ("svg", "pdf", "png")
ROWS, PROVENANCE = "csv", "json"

# What provenance must be made of where it has it: its readers rely on it.
_OBJECTS = ("host", "device", "sources", "parameters", "frames_sha256")


@dataclass(frozen=True)
class Result:
    """What one run left in data/ and reports/: the files of one stem."""

    root: Path
    machine: str
    device: str
    stem: str

    @property
    def notebook(self) -> str:
        return self.stem.partition("-")[0]

    @property
    def variant(self) -> str:
        return self.stem.removeprefix(self.notebook)

    @property
    def folder(self) -> Path:
        return self.root / "data" / self.machine / self.device

    def data(self, kind: str = ROWS) -> Path:
        """Its rows (csv), a frame beside them (<what>.csv) or its provenance (json)."""
        return self.folder / f"{self.stem}.{kind}"

    def report(self, kind: str) -> Path:
        """What it left in reports/: its html, ipynb or table.csv."""
        return self.root / "reports" / self.machine / self.device / f"{self.stem}.{kind}"

    @property
    def table(self) -> Path:
        return self.report(TABLE[1:])

    @property
    def kinds(self) -> list[str]:
        """Its rows and frames, by its provenance.

        Raises:
            RecordError: the provenance does not hold.
        """
        return [ROWS, *(f"{what}.csv" for what in self.facts.get("frames_sha256", {}))]

    @cached_property
    def facts(self) -> dict:
        """Its provenance.

        Raises:
            RecordError: it is not there, no JSON object, or of another machine, notebook or host.
        """
        name = name_in(self.data(PROVENANCE), self.root)
        facts = _json(self.data(PROVENANCE))
        if facts is None:
            raise RecordError(
                f"{name} is missing or no JSON: the rows beside it have no provenance; measure "
                "again, or restore the file."
            )
        parts = {part: facts.get(part, {}) for part in _OBJECTS}
        for part, value in parts.items():
            if not isinstance(value, dict):
                raise RecordError(
                    f"{name} has {json.dumps(value)[:40]} as {part!r}, where an object belongs: "
                    "measure again, or restore the file."
                )
        for key, folder in (("machine", self.machine), ("notebook", self.notebook)):
            if facts.get(key) != folder:
                raise RecordError(f"{name} is of the {key} {facts.get(key)!r}, not of {folder!r}.")
        mark = self.folder.parent / "host.json"
        said, owner = name_in(mark, self.root), (_json(mark) or {}).get("host_identity")
        if not owner:
            raise RecordError(
                f"{said} is missing or names no host: the machine's rows have no owner."
            )
        if parts["host"].get("host_identity") != owner:
            raise RecordError(f"{name} was made on another host than the one in {said}.")
        return facts

    def read(self, kind: str = ROWS) -> "pd.DataFrame":
        """Its rows or a frame, held against its provenance.

        Raises:
            RecordError: the file does not hold; one sentence says how.
        """
        path = self.data(kind)
        name = name_in(path, self.root)
        if not path.is_file():
            raise RecordError(f"{name} is missing: measure again, or restore the file.")
        frames = self.facts.get("frames_sha256", {})
        known = self.facts.get("rows_sha256") if kind == ROWS else frames.get(kind[: -len(".csv")])
        if known != rows_hash(path):
            raise RecordError(
                f"{name} is not the file that its provenance describes (another sha256): "
                "measure again, or restore the file."
            )
        frame = read_rows(path)
        for column in ("machine", "device") if self.device != ALL_DEVICES else ():
            if column in frame:
                folder = getattr(self, column)
                for other in sorted(set(frame[column].dropna().astype(str)) - {folder}):
                    raise RecordError(
                        f"{name} has rows of the {column} {other!r}, not of {folder!r}."
                    )
        return frame


@dataclass(frozen=True)
class Drawing:
    """One picture to be made: a figure of the list, of one run."""

    run: Result
    id: str

    @property
    def spec(self) -> "FigureSpec":
        from posmat.charts.catalogue import find_figure

        return find_figure(self.id)

    @property
    def suffix(self) -> str:
        return f"{self.run.variant}-{self.run.machine}-{self.run.device}"

    @property
    def name(self) -> str:
        return f"{self.id}{self.suffix}"

    @property
    def kinds(self) -> list[str]:
        """The files of its run that it is drawn from, in the order of the figure's `reads`."""
        return [name.removeprefix("{stem}.") for name in self.spec.reads]

    @property
    def sources(self) -> list[Path]:
        return [self.run.data(kind) for kind in self.kinds]

    def picture(self, kind: str) -> Path:
        return self.run.root / "reports" / "figures" / f"{self.name}.{kind}"

    def digest(self) -> str:
        return rows_digest(self.sources)


@dataclass(frozen=True)
class Said:
    """What is said of a picture, of its rows alone."""

    caption: str
    alt: str  # itself, for who cannot see it
    digest: str
    processors: list[str]
    table: dict | None  # the numbers behind it, as a page shows them


def name_in(path: Path, root: Path) -> str:
    """A path as a sentence names it: from the project's root."""
    return path.relative_to(root).as_posix()


def find_results(root: Path, published: bool = False) -> list[Result]:
    """Every run in data/, by machine, device and stem; with `published` without a user's own."""
    found = []
    for folder in sorted((root / "data").glob("*/*/")):
        stems = [path.stem for path in folder.glob("*.json")]
        for name in sorted(path.stem for path in folder.glob("*.csv")):
            # Rows whose provenance is gone; a frame, <stem>.<what>.csv, belongs to its stem.
            if not any(name == stem or name.startswith(f"{stem}.") for stem in stems):
                stems.append(name)
        found += [Result(root, folder.parent.name, folder.name, stem) for stem in sorted(stems)]
    return [one for one in found if not published or one.machine not in OWN]


def find_drawings(results: Iterable[Result]) -> list[Drawing]:
    """Every picture that the list of figures makes of results, in the list's order."""
    from posmat.charts.catalogue import FIGURES

    results = list(results)
    return [
        Drawing(result, spec.id)
        for spec in FIGURES
        for result in results
        if result.notebook == spec.notebook
    ]


def chosen(drawings: Iterable[Drawing], asked: Iterable[str]) -> list[Drawing]:
    """The drawings that were asked for, by a figure's id or by a picture's name.

    Raises:
        KeyError: neither a figure nor a picture has this name; near ones are suggested.
    """
    import difflib

    from posmat.charts.catalogue import FIGURES

    drawings = list(drawings)
    notebooks = {spec.id: spec.notebook for spec in FIGURES}
    names = [*notebooks, *(one.name for one in drawings)]
    found: dict[Drawing, None] = {}
    for word in asked:
        own = [one for one in drawings if word in (one.name, one.id)]
        if not own and word in notebooks:
            raise KeyError(
                f"figure {word!r} has no rows in data/ yet: run 'posmat report {notebooks[word]}'."
            )
        if not own:
            near = difflib.get_close_matches(word, dict.fromkeys(names), n=3, cutoff=0)
            raise KeyError(f"no figure has the id {word!r}: did you mean {' or '.join(near)}?")
        found |= dict.fromkeys(own)
    return list(found)


def unknown_commits(results: Iterable[Result]) -> list[str]:
    """One line for each commit that made rows and that the repository here does not have.

    Nothing where there is no repository, or a shallow one, which does not have most.
    """
    places: dict[str, dict[str, None]] = {}
    for result in holding(results):
        root, commit = result.root, str(result.facts.get("sources", {}).get("commit"))
        if re.fullmatch("[0-9a-f]{7,64}", commit) and (root / ".git").exists():
            places.setdefault(commit, {})[name_in(result.folder, root)] = None
    if not places or ask_git(root, "rev-parse", "--is-shallow-repository") != "false":
        return []
    return [
        f"{', '.join(where)}: made at the commit {commit[:10]}, which this repository does not have"
        for commit, where in places.items()
        if ask_git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None
    ]


def older_sources(results: Iterable[Result]) -> list[str]:
    """One line for each machine and device whose rows other sources made than those here.

    Whether that is so is asked as `posmat report` asks, but for host, device and PyTorch's version.
    """
    from posmat.report.freshness import sources_key, why_changed

    found: dict[str, list[str]] = {}
    for result in holding(results):
        notebook = result.root / "notebooks" / f"{result.notebook}.ipynb"
        why = "the notebook is not there"
        if notebook.exists():
            why = why_changed(result.facts.get("key") or {}, sources_key(notebook))
        if why:
            place = name_in(result.folder, result.root)
            found.setdefault(place, []).append(f"{result.stem} ({why})")
    return [f"{place}: made by older sources: {'; '.join(ones)}" for place, ones in found.items()]


def holding(results: Iterable[Result]) -> list[Result]:
    """Those of results whose provenance holds; of the others is told where they are read."""
    found = []
    for result in results:
        try:
            found += [result] if result.facts else []
        except RecordError:
            continue
    return found


def _json(path: Path) -> dict | None:
    """The JSON object in a file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
