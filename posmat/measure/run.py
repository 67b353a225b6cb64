"""A run: a notebook begins it and keeps its results, with a provenance. Needs no torch."""

import ast
import io
import json
import subprocess
import time
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from posmat import machine
from posmat.measure import files
from posmat.measure.files import ALL_DEVICES, LOCAL, PATHS, SCRATCH, TABLE, RecordError

if TYPE_CHECKING:  # pandas takes most of a second to load, and `posmat --help` needs none of it
    import pandas as pd

ROOMS = ("layer", "multipliers", "network", "measure")  # what computes and times
PARAMETER_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass
class Run:
    """One run of a notebook: what it is called, its tags, and where its results go."""

    notebook: str
    stem: str
    parameters: dict
    tags: dict  # columns that every row of this run carries
    device: object  # the torch.device that it measures on, None where it reads rows only
    output_dir: Path | None  # None: the project's folders
    facts: dict  # what the provenance says of host, libraries and device
    started: float = field(default_factory=time.time)

    def pool(self, rows: "pd.DataFrame", what: str = "") -> "pd.DataFrame":
        """Put the rows of earlier processes before these, where `--runs` asks for several."""
        earlier = self._earlier(self._file(what))
        if earlier is None:
            return rows
        import pandas as pd

        return pd.concat([files.read_rows(earlier), rows], ignore_index=True).convert_dtypes()

    def save(
        self,
        rows: "pd.DataFrame",
        *,
        table: "pd.DataFrame | None" = None,
        figures: Mapping[str, object] | None = None,
        frames: "Mapping[str, pd.DataFrame] | None" = None,
        data: Mapping | None = None,
    ) -> Path:
        """Keep rows, their table, figures and provenance, and give the folder of the rows.

        `figures` are what `draw_figure` gave, by their ids; `frames` tidy rows of other kinds, by
        what they are ("memory"); `data` what `describe_data` said, for the provenance. All is
        kept, or nothing and a RecordError is raised.
        """
        root, where = files.project_root(), (self.tags["machine"], self.tags["device"])
        own = self.output_dir or (None if root else Path.cwd() / "posmat-output")

        def place(file: str) -> Path:
            return own or files.folder_of(root, file, *where)

        tidy = {"": rows} | dict(frames or {})
        with files.scratch_folder(own or root / SCRATCH) as folder:
            for what, frame in tidy.items():
                digits = "%.9g" if what else None  # rows, of which ratios are made, as they are
                frame.to_csv(folder / self._file(what), index=False, float_format=digits)
            digests = {what: files.rows_hash(folder / self._file(what)) for what in tidy}
            known = {"rows": len(rows), "rows_sha256": digests.pop(""), "frames_sha256": digests}
            known |= {"data": data} if data else {}
            if table is not None:
                table.to_csv(folder / f"{self.stem}{TABLE}")
            # What tells this run's figures from another's: the variant, the machine, the device.
            suffix = "-".join([self.stem.removeprefix(self.notebook), *where])
            for name, figure in (figures or {}).items():
                figure.keep(name, folder, self.stem, suffix)
            text = json.dumps(self._provenance(known), indent=2, ensure_ascii=False)
            (folder / f"{self.stem}.json").write_text(text + "\n", encoding="utf-8")
            files.promote(folder, place)
        return place(self._file())

    def _file(self, what: str = "") -> str:
        return f"{self.stem}.{what}.csv" if what else f"{self.stem}.csv"

    def _earlier(self, file: str) -> Path | None:
        """A file that the earlier processes of this run left, where there were any."""
        path = self.output_dir and self.output_dir / file
        return path if self.tags["run"] > 0 and path and path.exists() else None

    def _provenance(self, known: dict) -> dict:
        path = self._earlier(f"{self.stem}.json")
        earlier = json.loads(path.read_text(encoding="utf-8")) if path else {}
        kernel = {
            "run": self.tags["run"],
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 1),
            "load_1min": self.facts["host"]["load_1min"],
        }
        kernels = [*earlier.get("kernels", []), kernel]
        gpu, warnings = self._after_measuring()
        return {
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

    def _after_measuring(self) -> tuple[dict, list[str]]:
        """The fact `gpu_after` and a warning where the SM clock fell too low, on CUDA only."""
        if getattr(self.device, "type", "") != "cuda":
            return {}, []
        from posmat.measure.timing import GPU_STATES  # imports torch

        # Where nothing was timed the device idles and has lowered its clock: that is no warning.
        after = GPU_STATES[-1] if GPU_STATES else machine.read_gpu(machine.gpu_uuid(self.device))
        return {"gpu_after": after}, machine.slow_clock_warnings(GPU_STATES, self.tags["run"])


def start_run(notebook: str, device: object, namespace: Mapping, output_dir: str = "") -> Run:
    """Begin a run: its parameters, its stem, and the columns that all its rows carry.

    Args:
        notebook: its name, without .ipynb.
        device: that it measures on, or None for a notebook that reads rows only. A CUDA device with
            an index becomes the current one, which clocks and controls go by.
        namespace: the notebook's `globals()`; the values of its parameters are read from there.
        output_dir: one folder for all files, or '' for the project's `local` folders.

    Raises:
        ValueError: the device is not there.
        RecordError: the folder cannot be made or belongs to another host, or the notebook has a
            parameter that is no typed literal.
    """
    started, job = time.time(), machine.job_order()
    root = files.project_root()
    source = root and root / "notebooks" / f"{notebook}.ipynb"
    declared = read_parameters(source) if source and source.exists() else {}
    defaults = {name: parameter.default for name, parameter in declared.items()}
    parameters = {n: namespace[n] for n in defaults if n in namespace and n not in PATHS}
    parameters |= {"device": str(device)} if "device" in parameters else {}
    output_dir = output_dir or job.get("output_dir", "")
    folder = files.make_folder(Path(output_dir).expanduser().resolve()) if output_dir else None
    tags = {"run": job.get("run", 0), "notebook": notebook, "machine": job.get("machine", LOCAL)}
    tags["device"] = ALL_DEVICES
    if root and not folder:
        files.claim_machine(root, tags["machine"])
    facts = {"host": machine.describe_host(), "libraries": machine.describe_libraries()}
    if device is not None:
        device = machine.require_device(device)
        machine.make_current(device)
        tags |= machine.describe_environment(device)
        facts["device"] = machine.describe_device(device)
        if device.type == "cuda":
            facts["gpu_before"] = machine.read_gpu(machine.gpu_uuid(device))
    stem = job.get("stem", notebook + files.variant(parameters, defaults))
    return Run(notebook, stem, parameters, tags, device, folder, facts, started)


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # meaning`."""

    name: str
    type: str
    default: object
    meaning: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The declared parameters of a notebook by name, from its own cell.

    Raises:
        RecordError: the notebook cannot be read, or a parameter is no typed literal.
    """
    # papermill's own inspector passes over a line whose comment holds a second `=`.
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
        match line:
            case ast.AnnAssign(ast.Name(name), annotation, ast.expr() as written):
                kind = ast.unparse(annotation).strip("'")
            case ast.Assign([ast.Name(name)], written):
                kind = None
            case _:
                continue
        try:
            value = ast.literal_eval(written)
        except (ValueError, TypeError):
            value = None
        if type(value) is not PARAMETER_TYPES.get(kind):
            raise RecordError(
                f"{notebook.stem} has the parameter '{name}: {kind} = "
                f"{ast.unparse(written)}', which is no {', '.join(PARAMETER_TYPES)} with a "
                "literal of that type: declare it so."
            )
        meaning = (said.get(number) for number in range(line.lineno, line.end_lineno + 1))
        declared[name] = Parameter(name, kind, value, " ".join(filter(None, meaning)))
    return declared


def describe_sources() -> dict:
    """The sources behind a run: git's commit, whether the tree was clean, and a hash per module."""
    package = Path(__file__).resolve().parents[1]
    sources = ("machine.py", *(f"{room}/*.py" for room in ROOMS))
    paths = sorted(path for pattern in sources for path in package.glob(pattern))
    modules = {path.relative_to(package).as_posix(): files.rows_hash(path)[:16] for path in paths}
    facts = {"modules": modules, "commit": None, "tree_clean": None}
    root = files.project_root()
    if root is None:
        return facts
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    facts["notebooks"] = {path.stem: files.rows_hash(path)[:16] for path in notebooks}
    if commit := ask_git(root, "rev-parse", "HEAD"):
        # What runs leave is no source: the first of several would make the tree unclean for all.
        sources = ("--", ".", ":!data", ":!reports", ":!README.md")
        status = ask_git(root, "status", "--porcelain", *sources)
        facts |= {"commit": commit, "tree_clean": status == ""}
    return facts


def ask_git(root: Path, *words: str) -> str | None:
    """What git says of a repository, or None where it fails or is not there."""
    order = ["git", "-C", str(root), *words]
    utf8 = {"encoding": "utf-8", "errors": "replace"}
    try:
        return subprocess.run(order, check=True, capture_output=True, **utf8).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
