"""Files of a run: their names and hashes, whose folder they lie in, and how they get there.

Everything that one run leaves has one stem, the notebook's name and, where parameters differ from
the defaults, what differs:

    <stem>.csv .json      rows, one per timed block, and provenance -> data/<machine>/<device>/
    <stem>.<what>.csv     tidy rows of another kind                 -> data/<machine>/<device>/
    <stem>.table.csv      the summary                               -> reports/<machine>/<device>/
    <stem>.ipynb .html    the executed notebook                     -> reports/<machine>/<device>/
    <figure>.svg .pdf .png                                          -> reports/figures/

Files are written into a scratch folder and then moved into their places, so that none is ever
half-written. Needs no torch.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from posmat.machine import describe_host, host_identity, job_order

if TYPE_CHECKING:  # pandas takes most of a second to load, and `posmat --help` needs none of it
    import pandas as pd

LOCAL = "local"  # the machine's name where no person gave one; git ignores its folders
QUICK = "quick"  # the machine's name of runs at small sizes, whose folders git ignores
ALL_DEVICES = "all"  # the device's folder for a notebook that reads the rows of all of them
PATHS = ("output_dir", "data_dir")  # where files lie on this machine: in no name, key or provenance
NOT_IN_VARIANT = ("device", *PATHS)  # the device has folders of its own
SCRATCH = ".posmat"  # the folder of a checkout where results wait until they are whole

TABLE = ".table.csv"
_PICTURES = (".svg", ".pdf", ".png")
_REPORTS = (".ipynb", ".html", TABLE)


class RecordError(Exception):
    """A result cannot be kept or read; the message says which and what to do."""


def project_root() -> Path | None:
    """The checkout that this package stands in, or None where it was installed without one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "notebooks").is_dir() and (root / "pyproject.toml").is_file() else None


def variant(parameters: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """What is added to a name because parameters differ: '' or '-batch_size=64-dtype=int8'."""
    text = "".join(
        f"-{name}={_for_a_name(value)}"
        for name, value in parameters.items()
        if name not in NOT_IN_VARIANT and value != defaults.get(name)
    )
    # A file's name may have 255 bytes, with what else stands in it.
    return text if len(text) <= 150 else f"{text[:143]}~{_short_hash(text)}"


def folder_of(root: Path, file: str, machine: str, device: str) -> Path:
    """The folder that a file of a run belongs in, by the end of its name."""
    if file.endswith(_PICTURES):
        return root / "reports" / "figures"
    kind = "reports" if file.endswith(_REPORTS) else "data"
    return root / kind / machine / device


def claim_machine(root: Path, machine: str, host: Mapping | None = None) -> None:
    """Make data/<machine>/ a host's, this one by default; a RecordError where it is another's."""
    folder = make_folder(root / "data" / machine)
    mark = folder / "host.json"
    own = host["host_identity"] if host else host_identity()
    if not mark.exists():
        facts = {"host_identity": own, "processor": (host or describe_host())["processor"]}
        with scratch_folder(root / SCRATCH) as scratch:
            (scratch / mark.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            promote(scratch, lambda _: folder)
        return
    try:
        found = dict(json.loads(mark.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise RecordError(
            f"{mark}, which says whose the folder is, cannot be read ({error}): remove it if the "
            "folder is this host's."
        ) from None
    if found.get("host_identity") != own:
        raise RecordError(
            f"{folder} belongs to another host ({found.get('processor', 'not named')}, "
            f"identity {found.get('host_identity')}; the one that asks is {own}): give it a name "
            "of its own with --machine NAME, or remove the folder."
        )


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, or raise a RecordError."""
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
    next one that comes by. Where none can be made a RecordError is raised.
    """
    own = f".{host_identity()}-"
    for left in make_folder(parent).glob(f"{own}*"):
        process = left.name.removeprefix(own).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{own}{os.getpid()}-"
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise RecordError(f"{parent} cannot be written to ({error.strerror}).") from None
    with folder as name:
        yield Path(name)


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


def rows_digest(files: Iterable[Path]) -> str:
    """The sha256 that a figure carries: that of its file, or of the list of its files' sha256."""
    digests = [rows_hash(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_rows(path: Path) -> "pd.DataFrame":
    """Read rows back with the dtypes they were written with; a RecordError if it is no table."""
    import pandas as pd

    try:
        # Python's own parser: before pandas 3.1 the faster one lost the last bit of some numbers.
        return pd.read_csv(path, engine="python").convert_dtypes()
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as rows: {error}") from None


def is_read_by(own: str, machine: str) -> bool:
    """Whether a summary for the machine `own` reads a machine's rows: published ones, and its own.

    What is published must be traceable by everyone: it reads nothing that git does not track.
    """
    return machine == own or machine not in (LOCAL, QUICK)


def read_all_rows(own: str = LOCAL, root: Path | None = None, what: str = "") -> "pd.DataFrame":
    """The rows of every notebook of every machine, published and own, with their `stem`.

    With `what`, those of its frames of that kind, "predictions", of which there may be none.

    Raises:
        RecordError: there is not one row, or a file cannot be read.
    """
    import pandas as pd

    asked = job_order().get("root")
    root = root or (Path(asked) if asked else project_root()) or Path.cwd()
    frames = []
    for provenance in sorted((root / "data").glob("*/*/[!.]*.json")):  # macOS leaves ._ files
        rows = provenance.with_suffix(f".{what}.csv" if what else ".csv")
        machine, device = provenance.parts[-3:-1]
        if rows.exists() and device != ALL_DEVICES and is_read_by(own, machine):
            frames.append(read_rows(rows).assign(stem=provenance.stem))
    if what and not frames:
        return pd.DataFrame()
    if not frames:
        raise RecordError(f"there are no rows below {root / 'data'}: run `posmat report` first.")
    return pd.concat(frames, ignore_index=True).convert_dtypes()


def promote(folder: Path, place: Callable[[str], Path]) -> None:
    """Move every file of a folder to the folder that `place(name)` gives, each at one stroke.

    Nothing is moved before everything lies on the disk of its place, so that a disk that runs full
    changes nothing but raises a RecordError. Rows go first and the provenance last: where a kill
    comes between two moves, it does not fit the rows, and the run does not pass for a finished one.
    """
    moves = []
    with ExitStack() as copies:
        try:
            for source in sorted(filter(Path.is_file, folder.iterdir()), key=_order):
                waiting, target = source, make_folder(place(source.name)) / source.name
                if source.stat().st_dev != target.parent.stat().st_dev:  # a rename stays on a disk
                    waiting = target.with_name(f".{os.getpid()}-{target.name}")
                    copies.callback(waiting.unlink, missing_ok=True)
                    shutil.copyfile(source, waiting)
                moves.append((waiting, target))
            for waiting, target in moves:
                os.replace(waiting, target)
        except OSError as error:
            raise RecordError(
                f"the results cannot be written ({error.strerror}: {error.filename}): "
                "what was there before is untouched."
            ) from None


def _order(path: Path) -> tuple:
    """The order of promotion: rows, then their views, and the provenance at the end."""
    rows = path.suffix == ".csv" and not path.name.endswith(TABLE)
    return (path.suffix == ".json", not rows, path.name)


def _for_a_name(value: object) -> str:
    """A parameter's value in a file's name, with a hash where it cannot stand there itself."""
    text = str(value)
    safe = "".join(c if c.isalnum() or c in "._+" else "_" for c in text)[:40] or "none"
    return safe if safe == text else f"{safe}~{_short_hash(text)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
