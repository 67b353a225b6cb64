"""Whether a job is up to date: its key is the one in its provenance, and its files are there.

The key holds what the numbers depend on: the notebook's code, the parameters, the rooms that it
reaches and that compute or time, the host, the device and PyTorch's version. Comments, docstrings,
prose and charts are not in it. A notebook that reads rows depends on all rows instead. What sources
make of it, `posmat check` holds against the sources that are there.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import posmat
from posmat.machine import host_identity
from posmat.measure.files import ALL_DEVICES, NOT_IN_VARIANT, is_read_by, rows_hash
from posmat.measure.run import ROOMS
from posmat.report.store import Result, holding, name_in, read_object

PACKAGE = Path(posmat.__file__).parent
# Of `measure` the clocks and the counters count: what shows or keeps rows changes no number.
_VIEWS = ("measure.summary", "measure.seed")
_NO_CLOCK = {*_VIEWS, "measure.files", "measure.run"}


def job_key(job, host: str = "", torch: str = "") -> dict:
    """The key of a job, by parts: each a hash or a name.

    For another host, `host` is its identity and `torch` the version of PyTorch there.
    """
    key = sources_key(job.source) | {
        "parameters": {n: job.parameters[n] for n in sorted({*job.parameters} - {*NOT_IN_VARIANT})},
        "host": host or host_identity(),
        "device": job.device,
        "torch": torch or importlib.metadata.version("torch"),
    }
    if set(_VIEWS) <= set(key["rooms"]):
        key["rows"] = hash_of_all_rows(job.root, job.machine)
    return key


def sources_key(notebook: Path) -> dict:
    """The parts of a key that sources make: the notebook's code, and each room that it reaches.

    A public name reaches a room, with those that it imports; to read rows, what shows them.
    """
    read = json.loads(notebook.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == "code"]
    if read["metadata"].get("posmat", {}).get("reads") == "rows":
        rooms = {name: hash_of_modules([name]) for name in _VIEWS}
    else:
        names = re.findall(r"\bpm\.(\w+)|\bposmat\.(\w+)", "\n".join(cells))
        found = {posmat.MODULE_OF.get(a or b, a or b).partition(".")[0] for a, b in names}
        reached, rooms = [room for room in ROOMS if room in found], {}
        for room in reached:
            paths = {f"{room}.{path.stem}": path for path in (PACKAGE / room).glob("*.py")}
            text = "".join(path.read_text(encoding="utf-8") for path in paths.values())
            needed = re.findall(r"^ *from posmat\.(\w+)\.", text, re.MULTILINE)
            reached += [one for one in ROOMS if one in needed and one not in reached]
            rooms[room] = hash_of_modules(sorted(paths.keys() - _NO_CLOCK))
    return {"notebook": _hash(map(code_of, cells)), "rooms": dict(sorted(rooms.items()))}


def hash_of_modules(names: Iterable[str]) -> str:
    """One hash of what modules of the package say, by their names without 'posmat.'."""
    paths = [(name, PACKAGE / f"{name.replace('.', '/')}.py") for name in names]
    return _hash([name, code_of(path.read_text(encoding="utf-8"))] for name, path in paths)


def why_changed(known: dict, key: dict) -> str:
    """What of a key is another than the one that is known; '' when all is the same."""
    if not known:
        return "no key"
    rooms, then = key["rooms"], known.get("rooms")
    changed = [part for part in key if part != "rooms" and key[part] != known.get(part)]
    changed = [part.replace("notebook", "the notebook's code") for part in changed]
    if isinstance(then, dict):
        changed += [f"posmat/{room}" for room in rooms if rooms[room] != then.get(room)]
    else:
        changed.append("the code that computes and times")
    return ", ".join(changed) + " changed" if changed else ""


def why_stale(job, key: dict) -> str:
    """Why a job is to be run; '' when it is up to date."""
    facts = read_object(job.data("json"))
    if not facts:
        return "no rows yet"
    if why := why_changed(facts.get("key") or {}, key):
        return why
    if (runs := facts.get("runs", 1)) < job.runs:
        return f"{runs} of {job.runs} runs"
    for path in (job.data(), job.report("ipynb")):
        if not path.is_file():
            return f"{path.name} is not there"
    if rows_hash(job.data()) != facts.get("rows_sha256"):
        return "the rows are not those of the provenance"
    return ""


def older_sources(results: Iterable[Result]) -> list[str]:
    """One line for each machine and device whose rows other sources made than those here."""
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


@cache
def code_of(source: str) -> str:
    """A source without comments, docstrings and its own layout; as it is where it is no Python.

    The same for every version of Python, which write a tree as text in different ways; the fields
    that a newer one adds are empty in what is written for an older one.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    for node in (node for node in ast.walk(tree) if isinstance(node, documented)):
        # A text that is alone in its place stays: in a notebook's cell it is what is shown.
        if len(node.body) > 1 and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return json.dumps(_without_empty_fields(tree))


def _without_empty_fields(node):
    if isinstance(node, list):
        return [_without_empty_fields(one) for one in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *((name, _without_empty_fields(value)) for name, value in fields)]


def hash_of_all_rows(root: Path, own: str) -> str:
    """One hash of the measuring notebooks' rows that a summary on the machine `own` reads."""
    lines = [
        (path.relative_to(root).as_posix(), rows_hash(path))
        for path in sorted((root / "data").glob("*/*/[!.]*.csv"))
        if path.parts[-2] != ALL_DEVICES and is_read_by(own, path.parts[-3])
    ]
    seed = [("seed", rows_hash(path)) for path in (root / "data").glob("seed.csv")]
    return _hash(lines + seed)


def _hash(parts) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
