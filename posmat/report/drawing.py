"""Draw again from data/ alone: what is there, what is drawn from it, and the drawing itself.

No kernel and no torch: whoever has the rows has the figures, those of a GPU too. A file that does
not hold is told in one sentence, and everything else is still drawn.
"""

import gc
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.measure.files import (
    LOCAL,
    QUICK,
    RecordError,
    make_folder,
    read_rows,
    replacing,
    rows_digest,
    rows_hash,
)

if TYPE_CHECKING:  # these take a second and a half to load, and `posmat --help` needs none of it
    import pandas as pd

    from posmat.charts.catalogue import FigureSpec

OWN = (LOCAL, QUICK)  # machines whose folders git ignores: a user's own runs
ALL = "all"  # the device of a notebook that reads the rows of every machine
KINDS = ("svg", "pdf", "png")

# A notebook's measurements of one run, each with methods and a baseline of its own.
_PART = "part"
# Columns that may set groups of rows apart, each group with its own baseline.
_GROUPS = ("dtype", "batch_size", "out_features", "in_features", "threads", "clock", "cache")


@dataclass(frozen=True)
class Result:
    """What one run left in data/: its rows, and by their names what is beside them."""

    root: Path
    machine: str
    device: str
    stem: str

    @property
    def folder(self) -> Path:
        return self.root / "data" / self.machine / self.device

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.stem}.csv"

    @property
    def provenance(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def table(self) -> Path:
        return self.report("table.csv")

    def report(self, kind: str) -> Path:
        """What the run left in reports/: its html, ipynb or table.csv."""
        return self.root / "reports" / self.machine / self.device / f"{self.stem}.{kind}"

    @property
    def notebook(self) -> str:
        return self.stem.partition("-")[0]

    @property
    def variant(self) -> str:
        return self.stem.removeprefix(self.notebook)


@dataclass(frozen=True)
class Drawing:
    """One picture to be made: a figure of the list, of one run."""

    root: Path
    spec: "FigureSpec"
    machine: str
    device: str
    variant: str

    @property
    def suffix(self) -> str:
        return f"{self.variant}-{self.machine}-{self.device}"

    @property
    def name(self) -> str:
        return f"{self.spec.id}{self.suffix}"

    @property
    def stem(self) -> str:
        return f"{self.spec.notebook}{self.variant}"

    @property
    def run(self) -> Result:
        """The run whose rows it shows."""
        return Result(self.root, self.machine, self.device, self.stem)

    @property
    def sources(self) -> list[Path]:
        """The files that it is drawn from, in the order of the figure's `reads`."""
        return [self.run.folder / name.format(stem=self.stem) for name in self.spec.reads]

    def picture(self, kind: str) -> Path:
        return self.root / "reports" / "figures" / f"{self.name}.{kind}"

    def digest(self) -> str:
        return rows_digest(self.sources)


@dataclass
class Library:
    """The frames of one run of a verb: each file is read, and refused, once."""

    root: Path
    frames: "dict[Path, pd.DataFrame]" = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    tables: "dict[Path, pd.DataFrame]" = field(default_factory=dict)

    def read(self, path: Path) -> "pd.DataFrame":
        """The frame of a file, checked against what it must have and against its provenance.

        Raises:
            RecordError: the file does not hold; one sentence says how.
        """
        if path in self.refused:
            raise RecordError(self.refused[path])
        if path not in self.frames:
            try:
                frame = _one_sentence(path, self.root)
                self._check(path, frame)
            except RecordError as error:
                self.refused[path] = str(error)
                raise
            self.frames[path] = frame
        return self.frames[path]

    def table(self, path: Path) -> "pd.DataFrame":
        """The summary of a file of timed blocks.

        Raises:
            RecordError: the rows do not hold, or cannot be summarized.
        """
        if path not in self.tables:
            try:
                self.tables[path] = summarize_groups(self.read(path))
            except ValueError as error:
                raise RecordError(f"{self.say(path)}: {first_line(error)}") from None
        return self.tables[path]

    def read_all(self, drawing: Drawing) -> "list[pd.DataFrame]":
        """The frames that a figure's functions are given, in the order of its `reads`.

        Raises:
            RecordError: one of the files does not hold.
        """
        return [self.read(path) for path in drawing.sources]

    def say(self, path: Path) -> str:
        """A path as a sentence names it."""
        return name_in(path, self.root)

    def _check(self, path: Path, frame: "pd.DataFrame") -> None:
        provenance, what = owner_of(path)
        try:
            check_frame(frame, is_blocks=not what)
        except ValueError as error:
            raise RecordError(f"{self.say(path)}: {error}") from None
        # No run has made data/seed.csv, so it came alone.
        if not provenance.exists() and path.parent.parent.parent != self.root / "data":
            return
        facts = read_provenance(provenance, self.root)
        known = facts.get("frames_sha256", {}).get(what) if what else facts.get("rows_sha256")
        if known != rows_hash(path):
            counts = "" if what else f"{facts.get('rows')} rows then, {len(frame)} now, and "
            raise RecordError(
                f"{self.say(path)} is not the file that its provenance describes "
                f"({counts}another sha256): measure again, or restore the file."
            )


def check_frame(frame: "pd.DataFrame", is_blocks: bool) -> None:
    """Refuse a frame that ends in the middle of a line, or blocks that cannot be summarized.

    Raises:
        ValueError: what is wrong, in one sentence.
    """
    from posmat.measure.summary import check_rows

    if {"method", "state"} <= set(frame.columns):
        cut = frame["method"].isna() | frame["state"].isna()
        if cut.any():
            raise ValueError(
                f"row {int(cut.to_numpy().argmax()) + 1} has no method or no state: "
                "was the file cut off?"
            )
    if is_blocks and {"round", "seconds"} & set(frame.columns):
        check_rows(frame)


def owner_of(path: Path) -> tuple[Path, str]:
    """The provenance that a file of rows belongs to, and what it is of that run: '' for its rows.

    A stem may hold dots of its own; what tells a frame, <stem>.<what>.csv, from rows is that its
    stem has provenance or rows.
    """
    name = path.name.removesuffix(".csv")
    if not (path.parent / f"{name}.json").exists():
        dots = [place for place, letter in enumerate(name) if letter == "."]
        for stem in (name[:place] for place in reversed(dots)):
            if any((path.parent / f"{stem}{end}").exists() for end in (".json", ".csv")):
                return path.parent / f"{stem}.json", name[len(stem) + 1 :]
    return path.parent / f"{name}.json", ""


def is_timed(frame: "pd.DataFrame") -> bool:
    """Whether a frame is of timed blocks, so that a table can be made from it."""
    return {"round", "seconds", "method", "state"} <= set(frame.columns)


def groups_of(rows: "pd.DataFrame") -> list[str]:
    """The columns that set groups of rows apart: parts, sizes, clocks that a baseline varies in.

    Raises:
        ValueError: the rows have no baseline.
    """
    from posmat.measure.summary import baseline_of

    parts = [own for _, own in _parts_of(rows)]
    bases = [own[own["method"] == baseline_of(own)] for own in parts]
    vary = [n for n in _GROUPS if any(n in base and base[n].nunique() > 1 for base in bases)]
    return [_PART] * (len(parts) > 1) + vary


def summarize_groups(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The table of rows, with one group for each part, size, clock, ... that was timed.

    Each part has its own baseline, so that nothing is divided by what was timed in another.

    Raises:
        ValueError: the rows cannot be summarized.
    """
    import pandas as pd

    from posmat.measure.summary import baseline_of, summarize

    by = groups_of(rows)
    if _PART not in by:
        return summarize(rows, baseline_of(rows), by)
    within = [name for name in by if name != _PART]
    tables = {part: summarize(own, baseline_of(own), within) for part, own in _parts_of(rows)}
    return pd.concat(tables, names=[_PART])


def _parts_of(rows: "pd.DataFrame") -> list[tuple]:
    if _PART not in rows:
        return [("", rows)]
    return list(rows.groupby(_PART, sort=False, dropna=False))


# What provenance must be made of where it has it: the readers below rely on it.
_OBJECTS = ("host", "device", "sources", "parameters", "frames_sha256")


def read_provenance(path: Path, root: Path) -> dict:
    """The facts of a provenance file.

    Raises:
        RecordError: it is not there, or no JSON object, or a part of it is not what it should be.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise RecordError(
            f"{name_in(path, root)} is missing or no JSON: the rows beside it have "
            "no provenance; measure again, or restore the file."
        )
    parts = {name: facts.get(name, {}) for name in _OBJECTS}
    if isinstance(parts["sources"], dict):
        parts |= {f"sources.{n}": parts["sources"].get(n, {}) for n in ("modules", "notebooks")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise RecordError(
                f"{name_in(path, root)} has {json.dumps(part)[:40]} as {name!r}, where an object "
                "belongs: measure again, or restore the file."
            )
    return facts


def name_in(path: Path, root: Path) -> str:
    """A path as a sentence names it: from the project's root where it is below it."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def find_results(root: Path) -> list[Result]:
    """Every run in data/, by machine, device and stem."""
    found = []
    for folder in sorted((root / "data").glob("*/*/")):
        names = {path.stem for path in folder.glob("*.csv") if not owner_of(path)[1]}
        names |= {path.stem for path in folder.glob("*.json")}
        found += [Result(root, folder.parent.name, folder.name, name) for name in sorted(names)]
    return found


def find_drawings(results: list[Result]) -> tuple[list[Drawing], list[str]]:
    """Every picture that the list of figures makes of results, and what is missing for others."""
    from posmat.charts.catalogue import FIGURES

    drawings: list[Drawing] = []
    problems: list[str] = []
    for spec in FIGURES:
        for result in (one for one in results if one.notebook == spec.notebook):
            where = result.machine, result.device, result.variant
            drawing = Drawing(result.root, spec, *where)
            missing = [path for path in drawing.sources if not path.is_file()]
            if not missing:
                drawings.append(drawing)
            elif missing[0] != result.rows:  # of rows that are not there the table tells
                name = name_in(missing[0], result.root)
                problems.append(f"{name} is not there, and figure {spec.id} reads it.")
    return drawings, problems


@dataclass(frozen=True)
class Words:
    """What is said of a picture: its caption, and itself for who cannot see it."""

    caption: str
    alt: str


def words_of(drawing: Drawing, frames: "list[pd.DataFrame]") -> Words:
    """Caption and alternative text of a picture, their figures from its rows."""
    from posmat.charts.style import summaries_kept

    with summaries_kept():
        return Words(*drawing.spec.describe(*drawing.spec.shown(*frames)))


def words_of_all(
    drawings: Iterable[Drawing], library: Library
) -> tuple[dict[Drawing, Words], list[str]]:
    """What is said of pictures that are not drawn now; and what their rows do not let be said."""
    said: dict[Drawing, Words] = {}
    problems: list[str] = []
    for drawing in drawings:
        try:
            said[drawing] = words_of(drawing, library.read_all(drawing))
        except RecordError as error:
            problems.append(str(error))
        except Exception as error:  # as in `_draw`
            problems.append(_stumbled(drawing, error))
    return said, problems


def chosen(drawings: Iterable[Drawing], asked: Iterable[str]) -> list[Drawing]:
    """The drawings that were asked for, by a figure's id or by a picture's name; all for none.

    Raises:
        KeyError: neither a figure nor a picture has this name; near ones are suggested.
    """
    import difflib

    from posmat.charts.catalogue import FIGURES

    drawings, asked = list(drawings), list(asked)
    found: list[Drawing] = []
    for word in asked:
        own = [one for one in drawings if word in (one.name, one.spec.id)]
        if not own:
            ids = [spec.id for spec in FIGURES]
            if word in ids:
                raise KeyError(
                    f"figure {word!r} has no rows in data/ yet: run 'posmat report "
                    f"{FIGURES[ids.index(word)].notebook}'."
                )
            names = list(dict.fromkeys([*ids, *(one.name for one in drawings)]))
            near = difflib.get_close_matches(word, names, n=3, cutoff=0)
            raise KeyError(f"no figure has the id {word!r}: did you mean {' or '.join(near)}?")
        found += [one for one in own if one not in found]
    return found if asked else drawings


def draw_all(
    drawings: Iterable[Drawing],
    results: Iterable[Result],
    library: Library,
    workers: int = 1,
) -> tuple[dict[Drawing, Words], int, list[str]]:
    """Draw pictures and write tables; what is said of each, how many tables, and what went wrong.

    Args:
        drawings: the pictures.
        results: the runs whose tables are written.
        library: where their frames come from; the tables are left there.
        workers: processes that share the work; each draws its part as one process would.
    """
    drawings, results = list(drawings), list(results)
    shares = _shares(drawings, results)
    if workers > 1 and len(drawings) > 4:
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(workers, initializer=_begin, initargs=(library.root,)) as pool:
            done = list(pool.map(_draw_share, shares))
    else:
        here = {drawing.name: drawing for drawing in drawings}
        done = [_do_share(share, here, library) for share in shares]
    said = {name: outcome for one, _ in done for name, outcome in one.items()}
    outcomes = {drawing: said[drawing.name] for drawing in drawings}
    made = {path: table for _, tables in done for path, table in tables.items()}
    tables = [made[result.rows] for result in results]
    library.tables |= {path: one for path, one in made.items() if not isinstance(one, str | None)}
    drawn = {drawing: words for drawing, words in outcomes.items() if isinstance(words, Words)}
    problems = [one for one in (*outcomes.values(), *tables) if isinstance(one, str)]
    return drawn, sum(not isinstance(one, str | None) for one in tables), problems


def _shares(drawings: list[Drawing], results: list[Result]) -> list[tuple[list[str], list[Result]]]:
    """The work in shares, the longest first: what is made of one run's rows is one share."""
    shares: dict[tuple[Path, str], tuple[list[str], list[Result]]] = {}
    for drawing in drawings:
        key = (drawing.sources[0].parent, drawing.stem)
        shares.setdefault(key, ([], []))[0].append(drawing.name)
    for result in results:
        shares.setdefault((result.folder, result.stem), ([], []))[1].append(result)
    return sorted(shares.values(), key=lambda share: -len(share[0]))


_of_worker: "tuple[dict[str, Drawing], Library]"


def _begin(root: Path) -> None:
    """Begin a worker; it finds the drawings by their names, since functions do not travel."""
    global _of_worker  # noqa: PLW0603  one project for the life of the process
    gc.set_threshold(100_000)  # a chart is many small objects: a tenth of the time went into these
    drawings = find_drawings(find_results(root))[0]
    _of_worker = {drawing.name: drawing for drawing in drawings}, Library(root)


def _draw_share(share: tuple[list[str], list[Result]]) -> tuple[dict, dict]:
    return _do_share(share, *_of_worker)


def _do_share(
    share: tuple[list[str], list[Result]], drawings: dict[str, Drawing], library: Library
) -> tuple[dict[str, Words | str], "dict[Path, pd.DataFrame | str | None]"]:
    """What a share's pictures say, by name, and its tables, by their rows; or what went wrong."""
    names, results = share
    said = {name: _draw(drawings[name], library) for name in names}
    return said, {result.rows: _write_table(result, library) for result in results}


def _draw(drawing: Drawing, library: Library) -> Words | str:
    """Draw and write one picture; what is said of it, or why it could not be drawn."""
    from posmat.charts.catalogue import draw_figure

    try:
        frames = library.read_all(drawing)
    except RecordError as error:
        return str(error)
    try:
        figure = draw_figure(drawing.spec.id, *frames)
    # Whatever a figure's function stumbles over in rows that somebody edited, the other figures
    # are still to be drawn.
    except Exception as error:
        return _stumbled(drawing, error)
    folder = make_folder(drawing.picture("svg").parent)
    figure.write(drawing.spec.id, drawing.digest(), folder, drawing.suffix)
    return Words(figure.caption, figure.alt)


def _stumbled(drawing: Drawing, error: Exception) -> str:
    source = name_in(drawing.sources[0], drawing.root)
    said = f"{type(error).__name__}: {first_line(error)}"
    # seaborn's word for a column that is not there is a ValueError.
    if isinstance(error, KeyError) or "does not appear in `data`" in str(error):
        names = re.findall(r"['`]([^'`]+)['`]", str(error))
        said = f"it has no column or method {names[0] if names else first_line(error)!r}."
    return f"{drawing.name} cannot be drawn from {source}: {said}"


def _write_table(result: Result, library: Library) -> "pd.DataFrame | str | None":
    """Derive and write the table of a result; the table, or why it could not be made.

    None where its rows are not of timed blocks.
    """
    try:
        text = derive_table(result, library)
    except RecordError as error:
        return str(error)
    if text is None:
        return None
    make_folder(result.table.parent)
    with replacing(result.table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return library.table(result.rows)


def derive_table(result: Result, library: Library) -> str | None:
    """The table of a result as text, or None where its rows are not of timed blocks.

    Raises:
        RecordError: the rows do not hold.
    """
    if not is_timed(library.read(result.rows)):
        return None
    return library.table(result.rows).to_csv(lineterminator="\n")


def page_digest(drawn: Iterable[Drawing]) -> str:
    """The sha256 that a page carries: of the names and the digests of what it shows."""
    lines = sorted(f"{drawing.name} {drawing.digest()}" for drawing in drawn)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """The first line of what an error says; a KeyError without the quotes around it."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return (str(said).splitlines() or [""])[0]


def _one_sentence(path: Path, root: Path) -> "pd.DataFrame":
    if not path.is_file():
        raise RecordError(f"{name_in(path, root)} is missing: measure again, or restore the file.")
    try:
        return read_rows(path)
    except RecordError as error:
        why = str(error).removeprefix(f"{path} cannot be read as rows: ").splitlines()
        raise RecordError(
            f"{name_in(path, root)} cannot be read as rows: {why[0] if why else 'it is no table'}"
        ) from None
