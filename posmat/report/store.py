"""What data/ holds: runs, their rows and frames, held against their hashes, and their figures.

Whatever does not belong there is refused here, in one sentence, and nowhere else. No torch.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.measure.files import ALL_DEVICES, LOCAL, QUICK, RecordError, read_rows, rows_hash
from posmat.measure.run import ask_git

if TYPE_CHECKING:  # these take a second and a half to load, and `posmat --help` needs none of it
    import pandas as pd

    from posmat.charts.catalogue import FigureSpec

OWN = (LOCAL, QUICK)  # machines whose folders git ignores: a user's own runs
KINDS = ("svg", "pdf", "png")
# What is an object in every provenance, be it an empty one.
_OBJECTS = ("host", "device", "libraries", "sources", "parameters", "frames_sha256")
_RESTORE = "measure again, or restore the file."


@dataclass(frozen=True)
class Result:
    """What one run leaves in data/ and reports/: the files of one stem."""

    root: Path  # the project that its files belong to
    machine: str
    device: str
    stem: str  # of the names of its files

    @property
    def notebook(self) -> str:
        return self.stem.partition("-")[0]

    @property
    def variant(self) -> str:
        return self.stem.removeprefix(self.notebook)

    @property
    def folder(self) -> Path:
        return self.root / "data" / self.machine / self.device

    @property
    def reports(self) -> Path:
        return self.root / "reports" / self.machine / self.device

    def data(self, kind: str = "csv") -> Path:
        """Its rows (csv), a frame beside them (<what>.csv) or its provenance (json)."""
        return self.folder / f"{self.stem}.{kind}"

    def report(self, kind: str) -> Path:
        """What it left in reports/: its html, ipynb or table.csv."""
        return self.reports / f"{self.stem}.{kind}"

    @cached_property
    def facts(self) -> dict:
        """Its provenance; a RecordError where it, or a part of it, is no JSON object."""
        name, facts = name_in(self.data("json"), self.root), read_object(self.data("json"))
        why = "" if facts else "is missing or no JSON: the rows beside it have no provenance"
        for part in _OBJECTS:
            if not isinstance(facts.setdefault(part, {}), dict):
                why = f"has {json.dumps(facts[part])[:40]} as {part!r}, where an object belongs"
        if why:
            raise RecordError(f"{name} {why}; {_RESTORE}")
        return facts

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of its rows and frames by their kinds, as its provenance has them.

        A RecordError where that is none, or is of another machine, notebook or host.
        """
        name, facts = name_in(self.data("json"), self.root), self.facts
        for key, own in (("machine", self.machine), ("notebook", self.notebook)):
            if facts.get(key) != own:
                raise RecordError(f"{name} is of the {key} {facts.get(key)!r}, not of {own!r}.")
        mark = self.folder.parent / "host.json"
        said, owner = name_in(mark, self.root), read_object(mark).get("host_identity")
        if not owner:
            raise RecordError(f"{said} is missing or names no host: the rows have no owner.")
        if facts["host"].get("host_identity") != owner:
            raise RecordError(f"{name} was made on another host than the one in {said}.")
        frames = {f"{what}.csv": known for what, known in facts["frames_sha256"].items()}
        return {"csv": facts.get("rows_sha256"), **frames}

    def read(self, kind: str = "csv") -> "pd.DataFrame":
        """Its rows or a frame, held against its provenance; a RecordError says what differs."""
        path, name = self.data(kind), name_in(self.data(kind), self.root)
        if not path.is_file():
            raise RecordError(f"{name} is missing: {_RESTORE}")
        if self.hashes.get(kind) != rows_hash(path):
            raise RecordError(
                f"{name} is not the file that its provenance describes (another sha256): {_RESTORE}"
            )
        frame = read_rows(path)
        for column, own in (("machine", self.machine), ("device", self.device)):
            if column in frame and self.device != ALL_DEVICES:
                for other in sorted(set(frame[column].dropna()) - {own}):
                    raise RecordError(f"{name} has rows of the {column} {other!r}, not of {own!r}.")
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


@dataclass(frozen=True)
class Said:
    """What is said of a picture, of its rows alone."""

    caption: str
    alt: str  # itself, for who cannot see it
    digest: str
    processors: list[str]
    table: dict | None  # the numbers behind it, as a page shows them


def in_detail(host: dict) -> str:
    """What provenance says of a processor beyond its name; '' where that is of older sources."""
    names = ("family", "model", "stepping", "implementer", "part")
    caches = [f"{name} {kib:,} KiB" for name, kib in host.get("caches_kib", {}).items()]
    clocks = {"up to ": host.get("clock_max_mhz"), "": host.get("clock_mhz")}
    clocks = [f"{word}{mhz:,} MHz" for word, mhz in clocks.items() if isinstance(mhz, int)]
    yes, _, vendor = str(host.get("virtual", "")).partition(", ")
    virtual = {"yes": "a virtual machine", "no": "no virtual machine"}.get(yes, "")
    parts = [
        ", ".join(f"{name} {host[name]}" for name in names if name in host),
        *clocks[:1],  # the clock of the moment where no other is known
        ", ".join(caches),
        ", ".join(host.get("instructions", ())),
        virtual + (f" ({vendor})" if vendor else ""),
    ]
    return "; ".join(filter(None, parts))


def name_in(path: Path, root: Path) -> str:
    """A path as a sentence names it: from the project's root."""
    return path.relative_to(root).as_posix()


def find_results(root: Path, published: bool = False) -> list[Result]:
    """Every run in data/, by machine, device and stem; with `published` without a user's own."""
    found = []
    for folder in sorted((root / "data").glob("*/*/")):
        stems, rows = ({path.stem for path in folder.glob(f"*{end}")} for end in (".json", ".csv"))
        both = stems | rows
        # Rows whose provenance is gone; a frame, <stem>.<what>.csv, belongs to its stem.
        stems |= {name for name in rows if not any(name.startswith(f"{one}.") for one in both)}
        found += [Result(root, *folder.parts[-2:], stem) for stem in sorted(stems)]
    return [one for one in found if not published or one.machine not in OWN]


def find_drawings(results: Iterable[Result]) -> list[Drawing]:
    """Every picture that the list of figures makes of results, in the list's order."""
    from posmat.charts.catalogue import FIGURES

    pairs = product(FIGURES, results)
    made = [Drawing(run, spec.id) for spec, run in pairs if run.notebook == spec.notebook]
    return [one for one in made if not one.spec.former or all(s.exists() for s in one.sources)]


def chosen(drawings: Iterable[Drawing], asked: Iterable[str]) -> list[Drawing]:
    """The drawings that were asked for, by a figure's id or a picture's name, or a KeyError."""
    from posmat.charts.catalogue import FIGURES, find_figure, unknown_figure

    by_word: dict[str, list[Drawing]] = {spec.id: [] for spec in FIGURES}
    for one in drawings:
        by_word[one.id].append(one)
        by_word[one.name] = [one]
    for word in asked:
        if word not in by_word:
            raise unknown_figure(word, by_word)
        if not by_word[word]:
            again = f"run 'posmat report {find_figure(word).notebook}'."
            raise KeyError(f"figure {word!r} has no rows in data/ yet: {again}")
    return list(dict.fromkeys(one for word in asked for one in by_word[word]))


def unknown_commits(root: Path, results: Iterable[Result]) -> list[str]:
    """One line for each commit that made rows and that the repository here does not have.

    Nothing where there is no repository, or a shallow one, which does not have most.
    """
    shallow = ask_git(root, "rev-parse", "--is-shallow-repository")
    if not (root / ".git").exists() or shallow != "false":
        return []
    places: dict[str, dict[str, None]] = {}
    for result in holding(results):
        commit = str(result.facts["sources"].get("commit"))
        if re.fullmatch("[0-9a-f]{7,64}", commit):
            places.setdefault(commit, {})[name_in(result.folder, root)] = None
    return [
        f"{', '.join(where)}: made at the commit {commit[:10]}, which this repository does not have"
        for commit, where in places.items()
        if ask_git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None
    ]


def holding(results: Iterable[Result]) -> list[Result]:
    """Those of results whose provenance holds; of the others is told where they are read."""
    found = []
    for result in results:
        with suppress(RecordError):
            found += [result] if result.facts else []
    return found


def read_object(path: Path) -> dict:
    """The JSON object in a file; an empty one where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError):
        return {}
