"""Whether a job is up to date: its key is the one in its provenance, and its files are there.

The key holds what the numbers depend on: the notebook's code, the parameters, the modules that
compute and time, the host, the device and PyTorch's version. Comments, docstrings, prose and charts
are not in it. A notebook that reads rows depends on all rows instead.
"""

import ast
import hashlib
import importlib.metadata
import json
from pathlib import Path

import nbformat

import posmat
from posmat.host import host_identity, processor_name
from posmat.records import ALL_DEVICES, is_read_by, rows_hash
from posmat.report.parameters import UsageError

# Modules that show or keep what was measured. What is not named here is arithmetic or timing.
_VIEWS = {"summary", "history"}
_NOT_COUNTED = _VIEWS | {"__init__", "environment", "figures", "host", "records"}


def job_key(job, root: Path, host: str = "", torch: str = "") -> dict:
    """The key of a job, by parts: each a hash or a name.

    Args:
        job: the job.
        root: the project's folder.
        host: the identity of the host that runs it; this one by default.
        torch: the version of PyTorch there; the one installed here by default.
    """
    notebook = nbformat.read(job.notebook, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    reads = notebook.metadata.get("posmat", {}).get("reads")
    modules = {path.stem: path for path in Path(posmat.__file__).parent.glob("*.py")}
    counted = _VIEWS if reads == "rows" else modules.keys() - _NOT_COUNTED
    key = {
        "notebook": _hash(map(code_of, code)),
        "parameters": dict(sorted(job.parameters.items())),
        "modules": _hash(
            [name, code_of(modules[name].read_text(encoding="utf-8"))] for name in sorted(counted)
        ),
        "host": host or host_identity(),
        "device": job.device,
        "torch": torch or importlib.metadata.version("torch"),
    }
    if reads == "rows":
        key["rows"] = hash_of_all_rows(root, job.machine)
    return key


def why_stale(job, root: Path, key: dict) -> str:
    """Why a job is to be run; '' when it is up to date."""
    facts = provenance(job, root)
    if not facts:
        return "no rows yet"
    known = facts.get("key") or {}
    changed = [part for part, value in key.items() if known.get(part) != value]
    if changed:
        what = {"notebook": "the notebook's code", "modules": "the code that computes and times"}
        return (
            ", ".join(what.get(part, part) for part in changed) + " changed" if known else "no key"
        )
    if facts.get("runs", 1) < job.runs:
        return f"{facts.get('runs', 1)} of {job.runs} runs"
    data, reports = (root / kind / job.machine / job.device for kind in ("data", "reports"))
    for path in (data / f"{job.stem}.csv", reports / f"{job.stem}.ipynb"):
        if not path.is_file():
            return f"{path.name} is not there"
    if rows_hash(data / f"{job.stem}.csv") != facts.get("rows_sha256"):
        return "the rows are not those of the provenance"
    return ""


def provenance(job, root: Path) -> dict:
    """The provenance that a job left the last time, or nothing."""
    try:
        path = root / "data" / job.machine / job.device / f"{job.stem}.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def describe_installation() -> dict:
    """What must be the same where jobs are sent from and where they run, and whose host this is."""
    package = Path(posmat.__file__).parent
    sources = sorted([*package.glob("*.py"), *package.glob("report/*.py")])
    code = _hash([path.name, code_of(path.read_text(encoding="utf-8"))] for path in sources)
    return {
        "posmat": f"{importlib.metadata.version('posmat')} (code {code[:8]})",
        "torch": importlib.metadata.version("torch"),
        "host_identity": host_identity(),
        "processor": processor_name(),
    }


def require_same(found: dict, machine: str) -> None:
    """Refuse a machine with other code or another PyTorch than this one.

    Raises:
        UsageError: they differ; both are named.
    """
    own = describe_installation()
    for what in ("posmat", "torch"):
        # 2.13.0+cpu and 2.13.0+cu130 are builds of one version.
        if str(found.get(what)).partition("+")[0] != own[what].partition("+")[0]:
            raise UsageError(
                f"{machine} has {what} {found.get(what, 'not at all')} and this machine has "
                f"{what} {own[what]}: install the same on both, and start the worker again."
            )


def code_of(source: str) -> str:
    """A source without comments, docstrings and its own layout; as it is where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    for node in (node for node in ast.walk(tree) if isinstance(node, documented)):
        # A text that is alone in its place stays: in a notebook's cell it is what is shown.
        if len(node.body) > 1 and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.unparse(tree)


def hash_of_all_rows(root: Path, own: str) -> str:
    """One hash of every file of rows that a summary on the machine `own` reads."""
    return _hash([name, rows_hash(path)] for name, path in _all_rows(root, own))


def _all_rows(root: Path, own: str):
    """Every file of rows of the measuring notebooks; quick ones for a quick run only."""
    for path in sorted((root / "data").glob("*/*/*.csv")):
        machine, device = path.parts[-3:-1]
        if device != ALL_DEVICES and is_read_by(own, machine):
            yield path.relative_to(root).as_posix(), path
    if (root / "data" / "seed.csv").exists():
        yield "seed", root / "data" / "seed.csv"


def _hash(parts) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
