"""Draw again from data/ alone: what is there, what is drawn from it, and the drawing itself.

No kernel and no torch: whoever has the rows has the figures, those of a GPU too. A file that does
not hold is told in one sentence, and everything else is still drawn.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from posmat.records import LOCAL, QUICK, RecordError, make_folder, read_rows, replacing, rows_hash

if TYPE_CHECKING:  # these take a second and a half to load, and `posmat --help` needs none of it
    import pandas as pd

    from posmat.figures import FigureSpec

OWN = (LOCAL, QUICK)  # machines whose folders git ignores: a user's own runs
PUBLISHED, ALL = "published", "all"  # machine and device of a figure of several machines
KINDS = ("svg", "pdf", "png")

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
        return self.root / "reports" / self.machine / self.device / f"{self.stem}.table.csv"

    @property
    def notebook(self) -> str:
        return self.stem.partition("-")[0]

    @property
    def variant(self) -> str:
        return self.stem.removeprefix(self.notebook)


@dataclass(frozen=True)
class Drawing:
    """One picture to be made: a figure of the list with the files that it is drawn from."""

    root: Path
    spec: "FigureSpec"
    machine: str
    device: str
    variant: str
    files: tuple[tuple[Path, ...], ...]  # for each pattern of the figure's `reads`

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
    def of_several_machines(self) -> bool:
        return all(pattern.startswith("/") for pattern in self.spec.reads)

    @property
    def sources(self) -> list[Path]:
        return [path for found in self.files for path in found]

    def picture(self, kind: str) -> Path:
        return self.root / "reports" / "figures" / f"{self.name}.{kind}"

    def digest(self) -> str:
        from posmat.figures import rows_digest

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
                frame = _one_sentence(path, self.root, read_rows)
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
        import pandas as pd

        found = []
        for paths in drawing.files:
            frames = [self.read(path) for path in paths]
            found.append(
                frames[0]
                if len(frames) == 1
                else pd.concat(frames, ignore_index=True).convert_dtypes()
            )
        return found

    def say(self, path: Path) -> str:
        """A path as a sentence names it: from the project's root."""
        return path.relative_to(self.root).as_posix()

    def _check(self, path: Path, frame: "pd.DataFrame") -> None:
        try:
            check_frame(frame, is_blocks=not is_frame(path))
        except ValueError as error:
            raise RecordError(f"{self.say(path)}: {error}") from None
        provenance = path.with_suffix(".json")
        if provenance.exists():
            facts = read_provenance(provenance, self.root)
            if facts.get("rows_sha256") != rows_hash(path):
                raise RecordError(
                    f"{self.say(path)} is not the file that its provenance describes "
                    f"({facts.get('rows')} rows then, {len(frame)} now, and another sha256): "
                    "measure again, or restore the file."
                )


def check_frame(frame: "pd.DataFrame", is_blocks: bool) -> None:
    """Refuse a frame that ends in the middle of a line, or blocks that cannot be summarized.

    Raises:
        ValueError: what is wrong, in one sentence.
    """
    from posmat.summary import check_rows

    if {"method", "state"} <= set(frame.columns):
        cut = frame["method"].isna() | frame["state"].isna()
        if cut.any():
            raise ValueError(
                f"row {int(cut.to_numpy().argmax()) + 1} has no method or no state: "
                "was the file cut off?"
            )
    if is_blocks and {"round", "seconds"} & set(frame.columns):
        check_rows(frame)


def is_frame(path: Path) -> bool:
    """Whether a file is a frame of another kind, <stem>.<what>.csv, and not the rows of a run.

    A stem may hold dots of its own; what tells them apart is that provenance bears the stem.
    """
    name = path.name.removesuffix(".csv")
    return any(
        (path.parent / f"{name[:place]}.json").exists()
        for place, letter in enumerate(name)
        if letter == "."
    )


def is_timed(frame: "pd.DataFrame") -> bool:
    """Whether a frame is of timed blocks, so that a table can be made from it."""
    return {"round", "seconds", "method", "state"} <= set(frame.columns)


def groups_of(rows: "pd.DataFrame") -> list[str]:
    """The columns that set groups of rows apart: sizes, clocks, ... that the baseline varies in.

    Raises:
        ValueError: the rows have no baseline.
    """
    from posmat.summary import baseline_of

    base = rows[rows["method"] == baseline_of(rows)]
    return [name for name in _GROUPS if name in base and base[name].nunique() > 1]


def summarize_groups(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The table of rows, with one group for each size, clock, ... that the baseline was timed at.

    Raises:
        ValueError: the rows cannot be summarized.
    """
    from posmat.summary import baseline_of, summarize

    return summarize(rows, baseline_of(rows), groups_of(rows))


def read_provenance(path: Path, root: Path) -> dict:
    """The facts of a provenance file.

    Raises:
        RecordError: it is not there, or no JSON object.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise RecordError(
            f"{path.relative_to(root).as_posix()} is missing or no JSON: the rows beside it have "
            "no provenance; measure again, or restore the file."
        )
    return facts


def find_results(root: Path) -> list[Result]:
    """Every run in data/, by machine, device and stem."""
    found = []
    for folder in sorted((root / "data").glob("*/*/")):
        names = {path.name.removesuffix(".csv") for path in folder.glob("*.csv")}
        names |= {path.name.removesuffix(".json") for path in folder.glob("*.json")}
        for name in sorted(names):
            # A frame of another kind is named after its rows: <stem>.<what>.csv.
            if not any(name.startswith(f"{other}.") for other in names):
                found.append(Result(root, folder.parent.name, folder.name, name))
    return found


def find_drawings(results: list[Result]) -> tuple[list[Drawing], list[str]]:
    """Every picture that the list of figures makes of results, and what is missing for others."""
    from posmat.figures import FIGURES

    drawings: list[Drawing] = []
    problems: list[str] = []
    for spec in FIGURES:
        if all(pattern.startswith("/") for pattern in spec.reads):
            drawings += _of_several_machines(spec, results)
        elif any("{stem}" in pattern for pattern in spec.reads):
            for result in results:
                if result.notebook == spec.notebook:
                    drawing, missing = _of_run(spec, result)
                    drawings += [drawing] if drawing else []
                    problems += missing
        else:
            drawings += _of_machine(spec, results)
    return drawings, problems


def _of_run(spec: "FigureSpec", result: Result) -> tuple[Drawing | None, list[str]]:
    from posmat.figures import ROWS

    files = [_files(result.root, result.folder, pattern, result.stem) for pattern in spec.reads]
    for pattern, found in zip(spec.reads, files, strict=True):
        if not found and pattern == ROWS:
            return None, []  # making the table tells of it
        if not found:
            missing = (result.folder / pattern.format(stem=result.stem)).relative_to(result.root)
            return None, [f"{missing.as_posix()} is not there, and figure {spec.id} reads it."]
    machine, device = result.machine, result.device
    return Drawing(result.root, spec, machine, device, result.variant, tuple(files)), []


def _of_machine(spec: "FigureSpec", results: list[Result]) -> list[Drawing]:
    found = []
    for folder in dict.fromkeys(result.folder for result in results):
        root = folder.parents[2]
        files = tuple(_files(root, folder, pattern) for pattern in spec.reads)
        if all(len(own) >= spec.at_least for own in files):
            found.append(Drawing(root, spec, folder.parent.name, folder.name, "", files))
    return found


def _of_several_machines(spec: "FigureSpec", results: list[Result]) -> list[Drawing]:
    if not results:
        return []
    root = results[0].root
    found = []
    machines = {result.machine for result in results}
    for name, left_out in ((PUBLISHED, set(OWN)), (LOCAL, {QUICK})):
        if not machines - left_out or (name == LOCAL and LOCAL not in machines):
            continue
        files = tuple(
            tuple(
                path
                for path in _files(root, root / "data", pattern.lstrip("/"))
                if path.relative_to(root / "data").parts[0] not in left_out
            )
            for pattern in spec.reads
        )
        if all(len(own) >= spec.at_least for own in files):
            found.append(Drawing(root, spec, name, ALL, "", files))
    return found


def _files(root: Path, folder: Path, pattern: str, stem: str = "") -> tuple[Path, ...]:
    """The files that a pattern of `reads` names; '*' stands for no other kind of frame."""
    if pattern.startswith("/"):
        folder, pattern = root / "data", pattern.lstrip("/")
    if "{stem}" in pattern:  # a stem may hold what glob takes for a pattern
        path = folder / pattern.format(stem=stem)
        return (path,) if path.is_file() else ()
    of_frames = "." in Path(pattern).name.removesuffix(".csv")
    return tuple(path for path in sorted(folder.glob(pattern)) if is_frame(path) == of_frames)


@dataclass(frozen=True)
class Words:
    """What is said of a picture."""

    caption: str
    finding: str
    alt: str


def words_of(drawing: Drawing, frames: "list[pd.DataFrame]") -> Words:
    """Caption, finding and alternative text of a picture, their figures from its rows."""
    from posmat.charts.style import summaries_kept

    spec = drawing.spec
    with summaries_kept():
        finding = spec.finding(*frames) if spec.finding else ""
        return Words(spec.caption(*frames), finding, spec.in_words(*frames))


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

    from posmat.figures import FIGURES

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
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.4) or ids
            raise KeyError(f"no figure has the id {word!r}: did you mean {' or '.join(near)}?")
        found += [one for one in own if one not in found]
    return found if asked else drawings


def draw_figures(
    drawings: list[Drawing], library: Library, workers: int = 1
) -> tuple[dict[Drawing, Words], list[str]]:
    """Draw and write pictures; what is said of each, and what could not be drawn and why.

    Args:
        drawings: what to draw.
        library: where their frames come from.
        workers: processes that share the work; each draws its part as one process would.
    """
    if workers > 1 and len(drawings) > 4:
        from concurrent.futures import ProcessPoolExecutor

        names = [drawing.name for drawing in drawings]
        parts = [names[first::workers] for first in range(workers)]
        with ProcessPoolExecutor(workers) as pool:
            done = list(pool.map(_draw_part, [library.root] * workers, parts))
        said = {name: outcome for part in done for name, outcome in part.items()}
    else:
        said = {drawing.name: _draw(drawing, library) for drawing in drawings}
    outcomes = {drawing: said[drawing.name] for drawing in drawings}
    drawn = {drawing: words for drawing, words in outcomes.items() if isinstance(words, Words)}
    return drawn, [problem for problem in outcomes.values() if isinstance(problem, str)]


def _draw_part(root: Path, names: list[str]) -> dict[str, Words | str]:
    """What a worker does; it finds the drawings by their names, since functions do not travel."""
    library = Library(root)
    drawings = find_drawings(find_results(root))[0]
    return {one.name: _draw(one, library) for one in drawings if one.name in names}


def _draw(drawing: Drawing, library: Library) -> Words | str:
    """Draw and write one picture; what is said of it, or why it could not be drawn."""
    from posmat.charts.style import summaries_kept
    from posmat.figures import draw_figure, write_figure

    try:
        frames = library.read_all(drawing)
    except RecordError as error:
        return str(error)
    try:
        with summaries_kept():
            figure = draw_figure(drawing.spec.id, *frames)
            words = words_of(drawing, frames)
    # Whatever a figure's function stumbles over in rows that somebody edited, the other figures
    # are still to be drawn.
    except Exception as error:
        return _stumbled(drawing, error)
    folder = make_folder(drawing.picture("svg").parent)
    write_figure(figure, drawing.spec.id, drawing.digest(), folder, drawing.suffix)
    return words


def _stumbled(drawing: Drawing, error: Exception) -> str:
    source = drawing.sources[0].relative_to(drawing.root).as_posix()
    kind = type(error).__name__
    return f"{drawing.name} cannot be drawn from {source}: {kind}: {first_line(error)}"


def write_tables(results: Iterable[Result], library: Library) -> tuple[int, list[str]]:
    """Derive and write the table of each result; how many, and what could not be and why."""
    count, problems = 0, []
    for result in results:
        try:
            text = derive_table(result, library)
        except RecordError as error:
            problems.append(str(error))
            continue
        if text is not None:
            make_folder(result.table.parent)
            with replacing(result.table) as temporary:
                temporary.write_text(text, encoding="utf-8")
            count += 1
    return count, problems


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


def _one_sentence(path: Path, root: Path, read) -> "pd.DataFrame":
    try:
        return read(path)
    except RecordError as error:
        why = str(error).partition(": ")[2].splitlines()
        raise RecordError(
            f"{path.relative_to(root).as_posix()} cannot be read as rows: "
            f"{why[0] if why else 'it is no table'}"
        ) from None
