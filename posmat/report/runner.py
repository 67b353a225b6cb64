"""Run notebooks: jobs -> executed notebooks, rows, tables and figures in their folders.

Three steps, so that each can be done elsewhere: `run_in_folder` runs a job's kernels and leaves its
files in a folder, or a truthful failed notebook; `keep_results` moves such a folder's files into
place together, so that the last good report is untouched by a failure; `run_job` does both here,
one timing job at a time per device.
"""

import difflib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nbformat

from posmat.measure.files import (
    ALL_DEVICES,
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
from posmat.report.exclusive import busy_warning, one_at_a_time
from posmat.report.freshness import job_key, provenance, why_stale
from posmat.report.gallery import write_page
from posmat.report.kernel import NotebookFailure, Tell, run_notebook
from posmat.report.parameters import UsageError, convert, read_parameters, split_values
from posmat.report.progress import Progress
from posmat.report.signals import held_back


@dataclass(frozen=True)
class Job:
    """One notebook on one device with its parameters, to be run `runs` times and pooled."""

    notebook: Path
    device: str
    machine: str
    stem: str
    parameters: dict
    runs: int = 1
    cell_timeout: int | None = None  # seconds that a cell may take

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def title(self) -> str:
        return self.stem + (f" on {self.device}" if self.device != ALL_DEVICES else "")


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its state, after how long, and the file to look at.

    The state is "done", "failed", "skipped" (it was up to date) or "not started".
    """

    job: Job
    state: str
    seconds: float
    path: Path
    message: str = ""
    stopped: bool = False  # the user or the system ended it: nothing more is to be started
    warnings: tuple[str, ...] = ()


def find_notebooks(folder: Path, asked: Iterable[str]) -> list[Path]:
    """The notebooks that were asked for, by number (05, 5), name or path; all of them for none.

    Raises:
        UsageError: there is no such notebook; near names are suggested. Or a path leads to another
            file than the project's notebook of that name.
    """
    there = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    found = []
    for word in asked:
        name = Path(word).name.removesuffix(".ipynb")
        from_here, from_root = Path(word).resolve(), (folder.parent / word).resolve()
        has_folder = name != word.removesuffix(".ipynb")
        if has_folder and folder.resolve() not in (from_here.parent, from_root.parent):
            raise UsageError(
                f"{word!r} is none of the project's notebooks, which are in {folder}: give a "
                "number or a name; for a notebook of yours run papermill itself."
            )
        matches = [
            stem
            for stem in there
            if stem == name or stem.partition("_")[2] == name or stem[:2] == name.zfill(2)
        ]
        if not matches:
            near = difflib.get_close_matches(name, there, n=2, cutoff=0.3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there)}."
            )
            raise UsageError(f"there is no notebook {word!r}: {hint}")
        found += [there[stem] for stem in matches if there[stem] not in found]
    return found or list(there.values())


def plan(
    notebooks: list[Path],
    devices: list[str],
    machine: str,
    given: Iterable[tuple[str, str]] = (),
    runs: int = 1,
    cell_timeout: int | None = None,
) -> list[Job]:
    """The jobs for notebooks and devices, their parameters converted by the declared types.

    A notebook's own metadata says which jobs it has by default, and its sizes for a quick run. A
    parameter that is given with several values makes a job for each.

    Raises:
        UsageError: a parameter is not declared, its value not of the declared type, or it is one
            that the driver sets.
    """
    jobs = []
    for notebook in notebooks:
        declared = read_parameters(notebook)
        defaults = {name: parameter.default for name, parameter in declared.items()}
        own = nbformat.read(notebook, as_version=4).metadata.get("posmat", {})
        grid: dict[str, list] = {}
        for name, text in given:
            if name in _DRIVERS_OWN and text:
                raise UsageError(f"-p {name}={text}: {_DRIVERS_OWN[name]}.")
            for value in split_values(name, text, declared):
                grid.setdefault(name, []).append(convert(name, value, declared, notebook.stem))
        chosen_ones = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        for special, chosen in itertools.product(own.get("jobs", [{}]), chosen_ones):
            quick = own.get("quick", {}) if machine == QUICK else {}
            parameters = {
                name: convert(name, value, declared, notebook.stem)
                for name, value in (quick | special | chosen).items()
            }
            # A quick run has small sizes by its nature; only what else differs names it.
            named = {name: value for name, value in parameters.items() if name not in quick}
            stem = notebook.stem + variant(named | chosen, defaults)
            for device in devices if "device" in declared else [ALL_DEVICES]:
                job = Job(notebook, device, machine, stem, parameters, runs, cell_timeout)
                if job not in jobs:
                    jobs.append(job)
    return jobs


_DRIVERS_OWN = {
    "device": "the device is chosen with --device",
    "output_dir": "the driver has its own folders; for one of yours run papermill itself",
}


def devices_asked(device: str) -> list[str]:
    """The devices to run on: 'all' is the CPU, and CUDA where there seems to be a device."""
    seems_there = shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()
    if device == "all":
        return ["cpu", "cuda"] if seems_there else ["cpu"]
    if device == "cuda" and not seems_there:
        require_cuda()
    return [device]


def require_cuda() -> None:
    """Ask PyTorch, in a process of its own, whether it can use a CUDA device.

    Raises:
        UsageError: it cannot; the message says what it sees.
    """
    probe = "import posmat; posmat.require_device('cuda')"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise UsageError(done.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def without_absent_cuda(
    jobs: list[Job], root: Path, asked: str, force: bool, progress: Progress
) -> list[Job]:
    """The jobs that this machine can run: PyTorch is asked about CUDA when a CUDA job is to run.

    Where there seems to be a device that PyTorch cannot use, its jobs are left out, and it is said.

    Raises:
        UsageError: CUDA was asked for by name, and PyTorch cannot use it.
    """
    on_cuda = [job for job in jobs if job.device == "cuda"]
    if not any(force or why_stale(job, root, job_key(job, root)) for job in on_cuda):
        return jobs
    try:
        require_cuda()
    except UsageError as error:
        if asked == "cuda":
            raise
        progress.say(f"posmat: nothing is run on CUDA: {error}", always=True)
        return [job for job in jobs if job.device != "cuda"]
    return jobs


def run_job(
    job: Job, root: Path, *, force: bool = True, label: str = "", progress: Progress | None = None
) -> Outcome:
    """Run a job here and keep what it left; without `force`, only when it is not up to date."""
    began = time.monotonic()
    progress = progress or Progress(quiet=True)
    results = root / "reports" / job.machine / job.device
    try:
        with _alone(job, progress):  # a run that was waited for may have done it
            key = job_key(job, root)
            why = why_stale(job, root, key)
            if not (force or why):
                return Outcome(job, "skipped", 0.0, results / f"{job.stem}.html")
            claim_machine(root, job.machine)
            # That there is no place for results is better known before than after.
            for folder in (results, root / "data" / job.machine / job.device):
                if not os.access(make_folder(folder), os.W_OK):
                    raise RecordError(
                        f"the folder {folder} cannot be written to: make it writable."
                    )
            last = provenance(job, root).get("duration_s")
            label += f", {why}" if label and last and why else ""  # why it runs again
            with (
                scratch_folder(root / SCRATCH) as scratch,
                progress.of(label, last and last * job.runs),
            ):
                outcome = run_in_folder(job, scratch / "results", key, progress.cell, root)
                outcome = keep_results(outcome, scratch / "results", root)
    except (RecordError, OSError) as error:
        message = f"{job.title} failed before its first cell: {error}"
        outcome = Outcome(job, "failed", 0.0, results if results.is_dir() else root, message)
    return replace(outcome, seconds=time.monotonic() - began)


def _alone(job: Job, progress: Progress):
    """The lock of the job's device; a notebook that times nothing needs none."""
    if job.device == ALL_DEVICES:
        return nullcontext()
    waiting = f"another run is timing on {job.device}: {job.stem} waits for it"
    return one_at_a_time(job.device, lambda: progress.say(waiting))


def run_in_folder(
    job: Job,
    folder: Path,
    key: dict | None = None,
    tell: Tell = lambda *_: None,
    root: Path | None = None,
) -> Outcome:
    """Run a job's kernels and leave its files in a folder, which is made.

    Args:
        job: the job.
        folder: where to; after a failure it holds the truthful `<stem>.failed.ipynb` alone.
        key: what the results depend on, kept in their provenance.
        tell: is called when a cell begins.
        root: the project's folder, for a notebook that reads rows.
    """
    began = time.monotonic()
    make_folder(folder)
    executed = folder / f"{job.stem}.ipynb"
    parameters = {"device": job.device, **job.parameters}
    declared = read_parameters(job.notebook)
    changed = {
        name: convert(name, value, declared, job.name)
        for name, value in parameters.items()
        if name in declared and value != declared[name].default
    }
    warnings = tuple(filter(None, [busy_warning()])) if job.device != ALL_DEVICES else ()
    message, stopped, notebook = "", False, None
    try:
        for run in range(job.runs):
            order = {"machine": job.machine, "run": run, "stem": job.stem}
            order |= {"output_dir": str(folder), "root": str(root) if root else None}
            told = (
                partial(_tell_run, tell, f"run {run + 1} of {job.runs}, ") if job.runs > 1 else tell
            )
            notebook = run_notebook(
                job.notebook, changed, order, folder.parent, job.cell_timeout, told
            )
        nbformat.write(notebook, executed)
        _add_to_provenance(folder / f"{job.stem}.json", {"key": key, "warnings": list(warnings)})
        write_page(executed)
    except NotebookFailure as failure:
        message, stopped, notebook = str(failure), failure.stopped, failure.notebook
    except KeyboardInterrupt as error:
        message, stopped = f"after its last cell: stopped by {error or 'Ctrl-C'}", True
    except Exception as error:  # a full disk, or a notebook that makes no page
        kind = "" if isinstance(error, RecordError) else f"{type(error).__name__}: "
        message = f"after its last cell: {kind}{error}"
    if message:
        message = f"{job.title} failed {'in ' * message.startswith('cell')}{message}"
        _leave_failed(notebook, folder / f"{job.stem}.failed.ipynb")
    state = "failed" if message else "done"
    return Outcome(job, state, time.monotonic() - began, executed, message, stopped, warnings)


def _tell_run(tell: Tell, run: str, number: int, total: int, line: str) -> None:
    tell(number, total, run + line)


def _add_to_provenance(path: Path, facts: dict) -> None:
    """Put what the driver knows beside what the notebook said of its run.

    Raises:
        RecordError: the notebook kept nothing.
    """
    if not path.exists() or not path.with_suffix(".csv").exists():
        raise RecordError("it kept no rows; a notebook keeps them with run.save(...)")
    known = json.loads(path.read_text(encoding="utf-8"))
    known |= facts | {"warnings": [*known.get("warnings", []), *facts["warnings"]]}
    text = json.dumps(known, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _leave_failed(notebook: nbformat.NotebookNode | None, path: Path) -> None:
    """Leave the failed notebook alone in its folder, or nothing where even that has no room."""
    shutil.rmtree(path.parent, ignore_errors=True)  # which also makes room on a full disk
    try:
        path.parent.mkdir(parents=True)
        if notebook is not None:
            nbformat.write(notebook, path)
    except OSError:
        path.unlink(missing_ok=True)


def keep_results(outcome: Outcome, folder: Path, root: Path) -> Outcome:
    """Move what a job left in a folder into its places: all of it, at one stroke each.

    A failed job's notebook goes beside the last good report, which stays. Where results cannot be
    kept in the project, they are left where the message says.
    """
    job = outcome.job
    reports = root / "reports" / job.machine / job.device
    failed = reports / f"{job.stem}.failed.ipynb"

    def place(file: str) -> Path:
        return folder_of(root, file, job.machine, job.device)

    with held_back() as signals:
        try:
            if any(folder.iterdir()):
                promote(folder, place)
        except (RecordError, OSError) as error:
            message = outcome.message or f"{job.title} ran to its end, but {error}"
            aside, where = _set_aside(folder, job.stem)
            return replace(outcome, state="failed", path=aside or root, message=message + where)
        if outcome.state == "done":
            failed.unlink(missing_ok=True)
            mark_undrawn(root, job.machine)
        elif not failed.exists():
            failed = reports  # a full disk had no room for it
        path = reports / f"{job.stem}.html" if outcome.state == "done" else failed
        return replace(outcome, path=path, stopped=outcome.stopped or bool(signals))


def _set_aside(folder: Path, stem: str) -> tuple[Path | None, str]:
    """Keep what a job left where the system keeps temporary files; the place, and it in words."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=f"posmat-{stem}-"))
        shutil.copytree(folder, aside, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        return None, f" What it left has no place in {tempfile.gettempdir()} either: {error}."
    return aside, f" What it left is in {aside}."


def mark_undrawn(root: Path, machine: str, due: bool = True) -> None:
    """Note that a machine has results which its figures and pages do not show yet, or no more.

    The note outlives a driver that is stopped or killed before it draws, and the next one draws.
    """
    with suppress(OSError):  # a full disk: then `posmat draw` is left to the user
        mark = root / SCRATCH / f"undrawn-{machine}"
        mark.touch() if due else mark.unlink(missing_ok=True)


def undrawn(root: Path, machine: str) -> bool:
    """Whether a machine has results that its figures and pages do not show yet."""
    return (root / SCRATCH / f"undrawn-{machine}").exists()
