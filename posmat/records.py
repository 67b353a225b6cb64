"""Records: rows, tables and figures to files and back, with their provenance and their names.

A notebook begins a `Run` and keeps its results with `Run.save`. Everything that one run leaves has
one stem, the notebook's name and, where parameters differ from the defaults, what differs:

    <stem>.csv            rows, one per timed block        -> data/<machine>/<device>/
    <stem>.<what>.csv     tidy rows of another kind        -> data/<machine>/<device>/
    <stem>.json           provenance                       -> data/<machine>/<device>/
    <stem>.table.csv      the summary                      -> reports/<machine>/<device>/
    <stem>.ipynb .html    the executed notebook            -> reports/<machine>/<device>/
    <figure>.svg .pdf .png                                 -> reports/figures/

Files are written into a scratch folder of the same disk and then moved into their places, so that
none is ever half-written, whatever is killed when. Needs no torch.
"""

import ast
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
import tokenize
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import psutil

from posmat.host import (
    describe_host,
    describe_libraries,
    host_identity,
    read_gpu,
    slow_clock_warnings,
)

if TYPE_CHECKING:  # pandas takes most of a second to load, and `posmat --help` needs none of it
    import pandas as pd

LOCAL = "local"  # the machine's name where no person gave one; git ignores its folders
QUICK = "quick"  # the machine's name of runs at small sizes, whose folders git ignores
ALL_DEVICES = "all"  # the device's folder for a notebook that reads the rows of all of them
JOB_VARIABLE = "POSMAT_JOB"  # what the driver tells a kernel: machine, run, stem, folders
NOT_IN_VARIANT = ("device", "output_dir")  # one is a folder, the other says where folders are
PARAMETER_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
SCRATCH = ".posmat"  # the folder of a checkout where results wait until they are whole

_TABLE = ".table.csv"
_PICTURES = (".svg", ".pdf", ".png")
_REPORTS = (".ipynb", ".html", _TABLE)


class RecordError(Exception):
    """A result cannot be kept or read; the message says which and what to do."""


def project_root() -> Path | None:
    """The checkout that this package stands in, or None where it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "notebooks").is_dir() and (root / "pyproject.toml").is_file() else None


def variant(parameters: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """What is added to a name because parameters differ: '' or '-batch_size=64-dtype=int8'."""
    changed = [
        f"-{name}={_for_a_name(value)}"
        for name, value in parameters.items()
        if name not in NOT_IN_VARIANT and value != defaults.get(name)
    ]
    text = "".join(changed)  # a file's name may have 255 bytes, with what else stands in it
    return text if len(text) <= 150 else f"{text[:143]}~{_short_hash(text)}"


def folder_of(root: Path, file: str, machine: str, device: str) -> Path:
    """The folder that a file of a run belongs in, by the end of its name."""
    if file.endswith(_PICTURES):
        return root / "reports" / "figures"
    kind = "reports" if file.endswith(_REPORTS) else "data"
    return root / kind / machine / device


def claim_machine(root: Path, machine: str, host: Mapping | None = None) -> None:
    """Make data/<machine>/ a host's, or refuse it when another host has filled it.

    Args:
        root: the project's folder.
        machine: the name that a person gave.
        host: the `host_identity` and `processor` of the host; this one by default.

    Raises:
        RecordError: the folder carries the identity of another host, or cannot be made.
    """
    folder = make_folder(root / "data" / machine)
    mark = folder / "host.json"
    own = {"host_identity": host["host_identity"] if host else host_identity()}
    if mark.exists():
        found = _read_mark(mark)
        if found.get("host_identity") != own["host_identity"]:
            raise RecordError(
                f"{folder} belongs to another host ({found.get('processor', 'not named')}, "
                f"identity {found.get('host_identity')}; the one that asks is "
                f"{own['host_identity']}): give it a name of its own with --machine NAME, or "
                "remove the folder."
            )
        return
    own["processor"] = (host or describe_host())["processor"]
    with scratch_folder(root / SCRATCH) as scratch:
        (scratch / mark.name).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        promote(scratch, lambda _: folder)


def _read_mark(mark: Path) -> dict:
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{mark}, which says whose the folder is, cannot be read ({error}): remove it if the "
            "folder is this host's."
        ) from None
    return found


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it.

    Raises:
        RecordError: a file stands in its place, or the system does not let us.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"the folder {folder} cannot be made ({error.strerror}): remove what stands in its "
            "place, or give another folder."
        ) from None
    return folder


@contextmanager
def scratch_folder(parent: Path):
    """Give a folder of this process below `parent`, and remove it at the end.

    It bears the host and the process in its name: what a killed process left is removed by the
    next one that comes by.

    Raises:
        RecordError: the folder cannot be made.
    """
    own = f".{host_identity()}-"
    for left in make_folder(parent).glob(f"{own}*"):
        process = left.name.removeprefix(own).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=parent))
    except OSError as error:
        raise RecordError(f"{parent} cannot be written to ({error.strerror}).") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path):
    """Give a path to write to, and move it into place when all went well."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rows_hash(path: Path) -> str:
    """sha256 of a file of rows, as figures and provenance carry it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_rows(path: Path) -> "pd.DataFrame":
    """Read rows back with the dtypes they were written with.

    Raises:
        RecordError: the file is not there or is no table.
    """
    import pandas as pd

    try:
        # Python's own parser: before pandas 3.1 the faster one lost the last bit of some numbers.
        return pd.read_csv(path, engine="python").convert_dtypes()
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as rows: {error}") from None


def is_read_by(own: str, machine: str) -> bool:
    """Whether a summary for the machine `own` reads a machine's rows: published ones, and its own.

    A user's rows beside published ones are for that user. What is published must be traceable by
    everyone, so it reads nothing that git does not track.
    """
    return machine == own or machine not in (LOCAL, QUICK)


def read_all_rows(own: str = LOCAL, root: Path | None = None) -> "pd.DataFrame":
    """The rows of every notebook of every machine, published and own, with their `stem`.

    A user's own rows are for that user (see `is_read_by`), and what was made of rows is left out.

    Raises:
        RecordError: there is not one row, or a file cannot be read.
    """
    import pandas as pd

    asked = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("root")
    root = root or (Path(asked) if asked else project_root()) or Path.cwd()
    frames = []
    for provenance in sorted((root / "data").glob("*/*/*.json")):
        rows = provenance.with_suffix(".csv")
        machine, device = provenance.parts[-3:-1]
        if rows.exists() and device != ALL_DEVICES and is_read_by(own, machine):
            frames.append(read_rows(rows).assign(stem=provenance.stem))
    if not frames:
        raise RecordError(f"there are no rows below {root / 'data'}: run `posmat report` first.")
    return pd.concat(frames, ignore_index=True).convert_dtypes()


@dataclass
class Run:
    """One run of a notebook: what it is called, its tags, and where its results go."""

    notebook: str
    stem: str
    parameters: dict
    tags: dict  # columns that every row of this run carries
    device: object  # the torch.device that it measures on, None where it reads rows only
    output_dir: Path | None  # None: the project's folders
    facts: dict = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def pool(self, rows: "pd.DataFrame", what: str = "") -> "pd.DataFrame":
        """Put the rows of earlier runs before these, where the driver repeats a notebook.

        With `--runs N` a notebook runs in N fresh kernels; the table, the chart and the sentences
        of the last one then speak of all of them.
        """
        if self.tags["run"] == 0 or self.output_dir is None:
            return rows
        earlier = self.output_dir / self._file(what)
        if not earlier.exists():
            return rows
        import pandas as pd

        return pd.concat([read_rows(earlier), rows], ignore_index=True).convert_dtypes()

    def save(
        self,
        rows: "pd.DataFrame",
        *,
        table: "pd.DataFrame | None" = None,
        figures: Mapping[str, object] | None = None,
        frames: "Mapping[str, pd.DataFrame] | None" = None,
    ) -> Path:
        """Keep rows, table, figures and provenance; all of them, or none.

        Args:
            rows: one per timed block.
            table: the summary of the rows.
            figures: matplotlib figures by the id of the list in `posmat.figures`.
            frames: tidy rows of other kinds, by what they are ("memory").

        Returns:
            The folder that holds the rows.

        Raises:
            RecordError: a folder cannot be made, or belongs to another host.
        """
        machine, device = self.tags["machine"], self.tags["device"]
        root = project_root()
        one_folder = self.output_dir or (None if root else Path.cwd() / "posmat-output")
        with scratch_folder(one_folder or root / SCRATCH) as folder:
            rows.to_csv(folder / self._file(), index=False)
            digest = rows_hash(folder / self._file())
            digests = {}
            for what, frame in (frames or {}).items():
                frame.to_csv(folder / self._file(what), index=False)
                digests[what] = rows_hash(folder / self._file(what))
            if table is not None:
                table.to_csv(folder / f"{self.stem}{_TABLE}")
            for name, figure in (figures or {}).items():
                from posmat.figures import save_figure  # draws with seaborn, which takes a second

                save_figure(figure, name, rows, digest, folder, self._suffix())
            known = {"rows": len(rows), "rows_sha256": digest, "frames_sha256": digests}
            self._write_provenance(folder / f"{self.stem}.json", known)
            if one_folder:
                return promote(folder, lambda _: one_folder)
            claim_machine(root, machine)
            promote(folder, lambda file: folder_of(root, file, machine, device))
            return folder_of(root, self._file(), machine, device)

    def _file(self, what: str = "") -> str:
        return f"{self.stem}.{what}.csv" if what else f"{self.stem}.csv"

    def _suffix(self) -> str:
        """What tells this run's figures from another's: the variant, the machine, the device."""
        changed = self.stem.removeprefix(self.notebook)
        return f"{changed}-{self.tags['machine']}-{self.tags['device']}"

    def _write_provenance(self, path: Path, known: dict) -> None:
        earlier = self._earlier_provenance()
        own = {
            "run": self.tags["run"],
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 1),
            "load_1min": self.facts["host"]["load_1min"],
        }
        kernels = [*earlier.get("kernels", []), own]
        gpu, warnings = self._after_measuring()
        facts = {
            "notebook": self.notebook,
            "machine": self.tags["machine"],
            "parameters": self.parameters,
            "runs": self.tags["run"] + 1,
            **known,
            "started": kernels[0]["started"],
            "duration_s": round(fmean(kernel["duration_s"] for kernel in kernels), 1),
            "kernels": kernels,
            "sources": describe_sources(),
            **self.facts,
            **gpu,
            "warnings": [*earlier.get("warnings", []), *warnings],
        }
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def _earlier_provenance(self) -> dict:
        """What the earlier fresh kernels of this run left, as `pool` takes their rows."""
        path = self.output_dir and self.output_dir / f"{self.stem}.json"
        if self.tags["run"] == 0 or not path or not path.exists():
            return {}
        return json.loads(path.read_text(encoding="utf-8"))

    def _after_measuring(self) -> tuple[dict, list[str]]:
        """The fact `gpu_after` and a warning where the SM clock fell too low, on CUDA only.

        The state is the last that `time_methods` read under load. Where nothing was timed it is
        read here, from a device that idles and has lowered its clock: that warns of nothing.
        """
        if getattr(self.device, "type", "") != "cuda":
            return {}, []
        from posmat.environment import gpu_uuid
        from posmat.timing import GPU_STATES

        after = GPU_STATES[-1] if GPU_STATES else read_gpu(gpu_uuid(self.device))
        return {"gpu_after": after}, slow_clock_warnings(GPU_STATES, self.tags["run"])


def start_run(notebook: str, device: object, namespace: Mapping, output_dir: str = "") -> Run:
    """Begin a run: its parameters, its stem, and the columns that all its rows carry.

    Args:
        notebook: the notebook's name, without .ipynb.
        device: the device it measures on, or None for a notebook that reads rows only; the host
            and the device are described at the start, before the measuring loads them. A CUDA
            device with an index becomes the current one, which clocks and controls go by.
        namespace: the notebook's `globals()`; the values of its parameters are read from there.
        output_dir: one folder for all files, or '' for the project's `local` folders.

    Raises:
        ValueError: the device is not there.
        RecordError: the folder cannot be made, or belongs to another host; or the notebook has a
            parameter that is no typed literal.
    """
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    machine = job.get("machine", LOCAL)
    root = project_root()
    defaults = {}
    if root is not None and (root / "notebooks" / f"{notebook}.ipynb").exists():
        declared = read_parameters(root / "notebooks" / f"{notebook}.ipynb")
        defaults = {name: parameter.default for name, parameter in declared.items()}
    parameters = {name: namespace[name] for name in defaults if name in namespace}
    parameters |= {"device": str(device)} if "device" in parameters else {}
    # The driver's staging folder is no parameter: a report would carry the path of one machine.
    output_dir = output_dir or job.get("output_dir", "")
    folder = make_folder(Path(output_dir).expanduser().resolve()) if output_dir else None
    if folder is None and root is not None:
        claim_machine(root, machine)
    tags = {"run": job.get("run", 0), "notebook": notebook, "machine": machine}
    run = Run(
        notebook=notebook,
        stem=job.get("stem", notebook + variant(parameters, defaults)),
        parameters=parameters,
        tags=tags | {"device": ALL_DEVICES},
        device=None,
        output_dir=folder,
        facts={"host": describe_host(), "libraries": describe_libraries()},
    )
    if device is not None:
        # Imports torch, which a notebook that reads rows does without.
        from posmat.environment import (
            describe_device,
            describe_environment,
            gpu_uuid,
            make_current,
            require_device,
        )

        run.device = require_device(device)
        make_current(run.device)
        run.tags |= describe_environment(device)
        run.facts["device"] = describe_device(device)
        if run.device.type == "cuda":
            run.facts["gpu_before"] = read_gpu(gpu_uuid(run.device))
    return run


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # meaning`."""

    name: str
    type: str
    default: object
    meaning: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The declared parameters of a notebook by name, from its own cell.

    The cell is Python and is read as such: papermill's inspector goes line by line with a pattern,
    and passes over a line whose comment holds a second `=`.

    Raises:
        RecordError: the notebook cannot be read, or a parameter is no typed literal.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [one for one in cells if "parameters" in one["metadata"].get("tags", ())]
        source = "".join(tagged[0]["source"]) if tagged else ""
        body = ast.parse(source).body
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SyntaxError) as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RecordError(f"{notebook} cannot be read as a notebook: {text}") from None
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    said = {one.start[0]: one.string[1:].strip() for one in tokens if one.type == tokenize.COMMENT}
    declared = {}
    for line in body:
        if not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
            continue
        annotated = isinstance(line, ast.AnnAssign)
        targets = [line.target] if annotated else line.targets
        if len(targets) > 1 or not isinstance(targets[0], ast.Name):
            continue
        name = targets[0].id
        kind = ast.unparse(line.annotation).strip("'") if annotated else None
        try:
            value = ast.literal_eval(line.value)
        except (ValueError, TypeError):
            value = None
        if type(value) is not PARAMETER_TYPES.get(kind):
            raise RecordError(
                f"{notebook.stem} has the parameter '{name}: {kind} = "
                f"{ast.unparse(line.value)}', which is no {', '.join(PARAMETER_TYPES)} with a "
                "literal of that type: declare it so."
            )
        meaning = (said.get(number) for number in range(line.lineno, line.end_lineno + 1))
        declared[name] = Parameter(name, kind, value, " ".join(filter(None, meaning)))
    return declared


def promote(folder: Path, place) -> Path:
    """Move every file of a folder to the folder that `place(name)` gives, each at one stroke.

    Nothing is moved before everything lies on the disk of its place, so that a disk that runs full
    changes nothing. Rows go first and the provenance last: where a kill comes between two moves,
    the provenance does not fit the rows, and the run does not pass for a finished one. Returns the
    last folder written to.

    Raises:
        RecordError: a folder cannot be made, or the files cannot be written.
    """
    moves = []
    try:
        for source in sorted((path for path in folder.iterdir() if path.is_file()), key=_order):
            target = make_folder(place(source.name)) / source.name
            waiting = source
            if source.stat().st_dev != target.parent.stat().st_dev:  # a rename stays on one disk
                waiting = target.with_name(f".{os.getpid()}-{target.name}")
                shutil.copyfile(source, waiting)
            moves.append((waiting, target))
        for waiting, target in moves:
            os.replace(waiting, target)
    except OSError as error:
        raise RecordError(
            f"the results cannot be written ({error.strerror}: {error.filename}): "
            "what was there before is untouched."
        ) from None
    finally:
        for waiting, target in moves:
            if waiting.parent == target.parent:
                waiting.unlink(missing_ok=True)
    return moves[-1][1].parent


def _order(path: Path) -> tuple:
    """The order of promotion: rows, then their views, and the provenance at the end."""
    rows = path.suffix == ".csv" and not path.name.endswith(_TABLE)
    return (path.suffix == ".json", not rows, path.name)


def describe_sources() -> dict:
    """The sources behind a run: git's commit, whether the tree was clean, and a hash per module."""
    package = Path(__file__).resolve().parent
    modules = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(package.glob("*.py"))
    }
    root = project_root()
    facts = {"modules": modules, "commit": None, "tree_clean": None}
    if root is None:
        return facts
    notebooks = root / "notebooks"
    facts["notebooks"] = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(notebooks.glob("*.ipynb"))
    }
    # What runs leave is no source: the first of several would make the tree unclean for the rest.
    sources = ("--", ".", ":!data", ":!reports", ":!README.md")
    commit, status = (
        ask_git(root, "rev-parse", "HEAD"),
        ask_git(root, "status", "--porcelain", *sources),
    )
    if commit:
        facts |= {"commit": commit, "tree_clean": status == ""}
    return facts


def ask_git(root: Path, *words: str) -> str | None:
    """What git says of a repository, or None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _for_a_name(value: object) -> str:
    """A parameter's value as part of a file's name; two values have two names.

    A hash follows where the value itself cannot stand in a name.
    """
    text = str(value)
    safe = "".join(c if c.isalnum() or c in "._+" else "_" for c in text)[:40] or "none"
    return safe if safe == text else f"{safe}~{_short_hash(text)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
