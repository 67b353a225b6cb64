"""Jobs: which notebooks to run with what, and the way of one from its kernels to its folders.

Its kernels leave its files in a folder, and from there they are moved into their places together,
so that the last good report is untouched by a failure. A worker of a cluster does only the first.
"""

import getpass
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import click
import nbformat
import psutil
from filelock import FileLock, Timeout

from posmat.measure.files import (
    ALL_DEVICES,
    PATHS,
    QUICK,
    SCRATCH,
    RecordError,
    claim_machine,
    folder_of,
    make_folder,
    promote,
    scratch_folder,
    variant,
)
from posmat.measure.run import PARAMETER_TYPES, Parameter, read_parameters
from posmat.report import UsageError, near
from posmat.report.freshness import job_key, why_stale
from posmat.report.kernel import NotebookFailure, Tell, run_notebook
from posmat.report.store import Result, read_object

BUSY_CORES = 0.5  # others' work beyond which a measurement is warned of

Say = Callable[..., None]  # (line, always=False): the user is told it, where quiet if always


@dataclass(frozen=True)
class Job(Result):
    """One notebook on one device with its parameters, to be run `runs` times and pooled."""

    source: Path  # the notebook
    parameters: dict  # those that differ from the notebook's defaults
    runs: int = 1
    cell_timeout: int | None = None  # seconds that a cell may take

    @property
    def title(self) -> str:
        return self.stem + (f" on {self.device}" if self.device != ALL_DEVICES else "")


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its state, after how long, and the file to look at."""

    job: Job
    state: str  # "done", "failed", "skipped" (it was up to date) or "not started"
    seconds: float
    path: Path
    message: str = ""
    stopped: bool = False  # the user or the system ended it: nothing more is to be started
    warnings: tuple[str, ...] = ()


def find_notebooks(folder: Path, asked: Iterable[str]) -> list[Path]:
    """The notebooks that were asked for, by number (05, 5), name or path; all of them for none.

    One that is not there, or not the project's, is a UsageError.
    """
    there = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    found = []
    for word in asked:
        name = Path(word).name
        folders = [(start / word).resolve().parent for start in (Path(), folder.parent)]
        if name != word and folder.resolve() not in folders:
            raise UsageError(
                f"{word!r} is none of the project's notebooks, which are in {folder}: give a "
                "number or a name; for a notebook of yours run papermill itself."
            )
        name = name.removesuffix(".ipynb")
        stems = [one for one in there if name in (one, one[3:]) or one[:2] == name.zfill(2)]
        if not stems:
            raise UsageError(f"there is no notebook {word!r}: {near(name, there)}")
        found += [there[stem] for stem in stems if there[stem] not in found]
    return found or list(there.values())


def declared_by(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name; one that cannot be read is a wrong use."""
    try:
        return read_parameters(notebook)
    except RecordError as error:
        raise UsageError(*error.args) from None


def plan(
    notebooks: list[Path],
    devices: list[str],
    machine: str,
    given: Iterable[str] = (),
    runs: int = 1,
    cell_timeout: int | None = None,
) -> list[Job]:
    """The jobs for notebooks and devices, their parameters converted by the declared types.

    A notebook's own metadata says which jobs it has by default, and its sizes for a quick run. A
    parameter that is given with several values, `name=a,b` or more than once, makes a job for each.

    A UsageError where a notebook cannot be read, or does not take what is given.
    """
    jobs = []
    for notebook in notebooks:
        declared = declared_by(notebook)
        defaults = {name: parameter.default for name, parameter in declared.items()}
        own = nbformat.read(notebook, as_version=4).metadata.get("posmat", {})
        quick = own.get("quick", {}) if machine == QUICK else {}
        grid: dict[str, list[str]] = {}
        for word in given:
            name, sign, text = word.partition("=")
            if not sign:
                raise UsageError(f"-p {word!r}: write it as NAME=VALUE.")
            if name in ("device", "output_dir"):
                raise UsageError(
                    f"-p {word}: the device is chosen with --device, and the driver has its own "
                    "folders; for one of yours run papermill itself."
                )
            if name in PATHS:
                if name in grid:
                    raise UsageError(f"-p {word}: {name} is one folder for all jobs; give it once.")
                text = text and str(Path(text).expanduser().absolute())  # a kernel runs elsewhere
            # A text whose default holds a comma has its commas to itself, and so has a path.
            whole = name in PATHS or "," in str(defaults.get(name))
            grid.setdefault(name, []).extend([text] if whole else text.split(","))
        choices = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
        for special, chosen in itertools.product(own.get("jobs", [{}]), choices):
            texts = {name: str(value) for name, value in (quick | special | chosen).items()}
            parameters = {n: _convert(n, texts[n], declared, notebook.stem) for n in texts}
            # A quick run has small sizes by its nature; only what else differs names it.
            named = {n: v for n, v in parameters.items() if n not in quick or n in chosen}
            stem = notebook.stem + variant(named, defaults)
            for device in devices if "device" in declared else [ALL_DEVICES]:
                asked = parameters | ({"device": device} if "device" in declared else {})
                changed = {name: value for name, value in asked.items() if value != defaults[name]}
                place = notebook.parents[1], machine, device, stem
                job = Job(*place, notebook, changed, runs, cell_timeout)
                if job not in jobs:
                    jobs.append(job)
    return jobs


def _convert(name: str, text: str, declared: dict[str, Parameter], notebook: str) -> object:
    """What `-p name=text` means for a notebook."""
    if name not in declared:
        there = near(name, declared or ["none"])
        raise UsageError(f"{notebook} has no parameter {name!r}: {there}")
    kind = declared[name].type
    try:
        return click.types.convert_type(PARAMETER_TYPES[kind]).convert(text, None, None)
    except click.BadParameter:
        wanted = f"{notebook} wants {name}: {kind} (default {declared[name].default!r})"
        raise UsageError(f"{wanted}, and {text!r} is none.") from None


def devices_here(asked: str, say: Say) -> list[str]:
    """The devices to run on: 'all' is the CPU, and CUDA where PyTorch can use a device.

    PyTorch is asked in a process of its own, and only where there seems to be a device. Where it
    cannot use CUDA and that was asked for by name, a UsageError says why.
    """
    seems_there = shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()
    if asked == "cpu" or (asked == "all" and not seems_there):
        return ["cpu"]
    ask = [sys.executable, "-c", "import posmat; posmat.require_device('cuda')"]
    done = subprocess.run(ask, check=False, capture_output=True, encoding="utf-8", errors="replace")
    if not done.returncode:
        return ["cpu", "cuda"] if asked == "all" else ["cuda"]
    why = done.stderr.strip().splitlines()[-1].removeprefix("ValueError: ")
    if asked == "cuda":
        raise UsageError(why)
    say(f"posmat: nothing is run on CUDA: {why}", always=True)
    return ["cpu"]


def run_job(
    job: Job,
    force: bool = True,
    label: str = "",
    say: Say = lambda *_, **__: None,
    tell: Tell = lambda *_: None,
) -> Outcome:
    """Run a job here and keep what it left; without `force`, only when it is not up to date.

    `say` is told when it begins, after `label`, and when it waits; `tell` when a cell begins.
    """
    began = time.monotonic()
    try:
        with alone(job, say):  # a run that was waited for may have done it
            key = job_key(job)
            why = why_stale(job, key)
            if not (force or why):
                return Outcome(job, "skipped", 0.0, job.report("html"))
            claim_machine(job.root, job.machine)
            # That there is no place for results is better known before than after.
            for folder in (job.reports, job.folder):
                if not os.access(make_folder(folder), os.W_OK):
                    raise RecordError(f"{folder} cannot be written to: make it writable.")
            last = about(job)
            say(f"{label}, {why}{last}" if last and why else label + last)  # why it runs again
            with scratch_folder(job.root / SCRATCH) as scratch:
                outcome = run_in_folder(job, scratch / "results", key, tell)
                outcome = keep_results(outcome, scratch / "results")
    except (RecordError, OSError) as error:
        path = job.reports if job.reports.is_dir() else job.root
        why = f"{job.title} failed before its first cell: {error}"
        outcome = Outcome(job, "failed", 0.0, path, why)
    return replace(outcome, seconds=time.monotonic() - began)


def about(job: Job) -> str:
    """How long a job took the last time, as the end of a line; '' where that is not known."""
    last = read_object(job.data("json")).get("duration_s")
    return f", about {timedelta(seconds=round(last * job.runs))} as last time" if last else ""


@contextmanager
def alone(job: Job, say: Say = lambda *_, **__: None):
    """Hold the lock of a job's device on this host; a notebook that times nothing needs none.

    The system releases the lock when its process ends, however it ends. It stands where all
    checkouts and users of a host find it, whatever TMPDIR is; POSMAT_LOCKS names another folder.
    """
    if job.device == ALL_DEVICES:
        yield
        return
    folder = "/tmp" if os.name == "posix" else tempfile.gettempdir()
    path = Path(os.environ.get("POSMAT_LOCKS", folder)) / f"posmat-{job.device}.lock"
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(blocking=False)
    except PermissionError:  # another user's file: a lock among one's own runs is left
        lock = FileLock(path.with_name(f"posmat-{job.device}-{getpass.getuser()}.lock"))
    except Timeout:
        say(f"another run is timing on {job.device}: {job.stem} waits for it")
    if not lock.is_locked:
        lock.acquire(poll_interval=1)
    try:
        yield
    finally:
        lock.release()


def busy_warning() -> str:
    """A sentence when others use the processor now, before the kernel is started; '' if not."""
    cores = psutil.cpu_count()
    busy = psutil.cpu_percent(interval=0.5) / 100 * cores
    said = f"{busy:.1f} of {cores} cores were busy with other work when this run began"
    return f"{said}: trust its ratios before its times." if busy >= BUSY_CORES else ""


def run_in_folder(job: Job, folder: Path, key: dict, tell: Tell = lambda *_: None) -> Outcome:
    """Run a job's kernels and leave its files in a folder, with the key in the provenance.

    After a failure the folder holds the truthful `<stem>.failed.ipynb` alone.
    """
    from posmat.report.gallery import write_page

    began = time.monotonic()
    make_folder(folder)
    executed, failed = (folder / f"{job.stem}{end}" for end in (".ipynb", ".failed.ipynb"))
    busy = "" if job.device == ALL_DEVICES else busy_warning()
    outcome = Outcome(job, "done", 0.0, executed, warnings=(busy,) if busy else ())
    order = {"machine": job.machine, "stem": job.stem, "root": str(job.root)}
    # Paths are told so, and not as parameters: a report would carry those of one machine.
    parameters = {name: job.parameters[name] for name in job.parameters if name not in PATHS}
    order |= {name: job.parameters[name] for name in job.parameters if name in PATHS}
    order["output_dir"] = str(folder)
    notebook, why, stopped = None, "", False
    try:
        for run in range(job.runs):
            words = parameters, order | {"run": run}, folder.parent, job.cell_timeout, tell
            notebook = run_notebook(job.source, *words)
        nbformat.write(notebook, executed)
        _add_to_provenance(executed.with_suffix(".json"), key, outcome.warnings)
        write_page(executed, job)
    except NotebookFailure as failure:
        why = f"{'in ' * str(failure).startswith('cell')}{failure}"
        notebook, stopped = failure.notebook, failure.stopped
    except KeyboardInterrupt as error:
        why, stopped = f"after its last cell: stopped by {error or 'Ctrl-C'}", True
    except Exception as error:  # a full disk, or a notebook that makes no page
        kind = "" if isinstance(error, RecordError) else f"{type(error).__name__}: "
        why = f"after its last cell: {kind}{error}"
    if why:
        outcome = replace(outcome, state="failed", message=f"{job.title} failed {why}")
        shutil.rmtree(folder, ignore_errors=True)  # which also makes room on a full disk
        try:
            folder.mkdir(parents=True)
            if notebook is not None:
                nbformat.write(notebook, failed)
        except OSError:  # even that has no room
            failed.unlink(missing_ok=True)
    return replace(outcome, seconds=time.monotonic() - began, stopped=stopped)


def _add_to_provenance(path: Path, key: dict, warnings: Iterable[str]) -> None:
    if not path.exists() or not path.with_suffix(".csv").exists():
        raise RecordError("it kept no rows; a notebook keeps them with run.save(...)")
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts |= {"key": key, "warnings": [*facts.get("warnings", []), *warnings]}
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep_results(outcome: Outcome, folder: Path) -> Outcome:
    """Move what a job left in a folder into its places; a failed one's beside the last good one."""
    job = outcome.job
    failed = job.report("failed.ipynb")
    try:
        promote(folder, lambda file: folder_of(job.root, file, job.machine, job.device))
    except (RecordError, OSError) as error:
        message = outcome.message or f"{job.title} ran to its end, but {error}"
        return replace(outcome, state="failed", path=job.root, message=message)
    if outcome.state == "done":
        failed.unlink(missing_ok=True)
        return replace(outcome, path=job.report("html"))
    # A full disk had no room for the failed notebook.
    return replace(outcome, path=failed if failed.exists() else job.reports)
