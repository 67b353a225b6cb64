"""One notebook in one fresh process, and the truth about how it ended.

papermill executes. It counts a cell that never ran as completed and forgets how a kernel died; here
its hooks note which cell is running, and the kernel's manager how its process ended. A failure
carries the notebook as it really stood: done, failed, not run.
"""

import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.execute import remove_error_markers

from posmat.machine import JOB_VARIABLE

# What these log is said by the failure's sentence.
logging.getLogger("papermill").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# papermill waits for a minute, which is too short where packages come from a slow disk.
START_TIMEOUT = 300
_LAUNCHER = ("-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR")
Tell = Callable[[int, int, str], None]  # (number of the cell, of how many, its first line)


class NotebookFailure(Exception):
    """A notebook did not run to its end; the message names the cell and the cause."""

    def __init__(self, message: str, notebook: NotebookNode, stopped: bool):
        super().__init__(message)
        self.notebook = notebook  # as it stood
        self.stopped = stopped  # by the user or the system


def run_notebook(
    source: Path,
    parameters: dict,
    order: dict,
    folder: Path,
    cell_timeout: int | None = None,
    tell: Tell = lambda *_: None,
) -> NotebookNode:
    """Run a notebook in a fresh process and return it executed.

    `parameters` are those that differ from the defaults, `order` is what the kernel is told in
    POSMAT_JOB, `folder` its working directory, `cell_timeout` in seconds. A NotebookFailure where
    it does not run to its end, for whatever reason.
    """
    watch, error = _Watch(tell), None
    try:
        if importlib.util.find_spec("ipykernel_launcher") is None:
            raise ImportError(f"ipykernel is missing from {sys.executable}: install it with pip")
        papermill.execute_notebook(
            str(source),
            None,
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            resources={"metadata": {"path": str(folder)}},  # its cwd; papermill would change ours
            start_timeout=START_TIMEOUT,
            execution_timeout=cell_timeout,
            kernel_manager_class=_manager_class(order, watch),
            shutdown_kernel="immediate",
            on_notebook_start=watch.notebook_starts,
            on_cell_execute=watch.cell_starts,
            on_cell_executed=watch.cell_ended,
        )
    except (Exception, KeyboardInterrupt) as found:  # the user is told, the next notebook runs
        error = found
    # What cells started and a killed kernel left is ended: it leads a process group of its own.
    if watch.group and hasattr(os, "killpg") and watch.group != os.getpgrp():
        with suppress(OSError):  # nobody is left, as it should be
            os.killpg(watch.group, signal.SIGKILL)
    notebook = watch.notebook or nbformat.read(source, as_version=4)
    # No path of this machine is left in what papermill noted.
    noted = notebook.metadata.get("papermill", {})
    noted.update(input_path=source.name, output_path=source.name)
    if watch.cell is None and error is None:
        return notebook
    where = f"after cell {watch.number}" if watch.number else "before its first cell"
    if watch.cell is not None:
        where = f"cell {watch.number} ({_first_line(watch.cell)})"
        watch.cell.execution_count = watch.number  # a kernel may die before it tells the number
    sentence = f"{where}: {_cause(error, watch, cell_timeout)}"
    truth = _truthful(notebook, watch.cell, sentence)
    raise NotebookFailure(sentence, truth, isinstance(error, KeyboardInterrupt))


class _Watch:
    """What happens in a run: the notebook, the cell that is running, the kernel's manager."""

    def __init__(self, tell: Tell):
        self.tell, self.number, self.total = tell, 0, 0
        self.notebook = self.cell = self.manager = self.group = None

    def notebook_starts(self, notebook: NotebookNode) -> None:
        self.notebook = notebook
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        self.total = sum(bool(cell.source.strip()) for cell in code)

    def cell_starts(self, cell: NotebookNode, cell_index: int) -> None:
        self.cell, self.number = cell, self.number + 1
        self.group = getattr(getattr(self.manager, "provisioner", None), "pgid", None)
        self.tell(self.number, self.total, _first_line(cell))

    def cell_ended(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        if execute_reply["content"]["status"] == "ok":
            self.cell = None


def _first_line(cell: NotebookNode) -> str:
    """The first line of a cell that is code, so that a reader finds the cell again."""
    lines = [line.strip() for line in cell.source.splitlines()]
    line = next((line for line in lines if line and not line.startswith("#")), "no code")
    return line if len(line) <= 48 else f"{line[:47]}…"


def _manager_class(order: dict, watch: _Watch) -> type[AsyncKernelManager]:
    """A kernel manager that starts this very Python, whatever other kernels the user has.

    PYTHONDONTWRITEBYTECODE is emptied, which Python reads as unset: where packages were installed
    uncompiled it would make every kernel compile them anew, 3 s each time.
    """
    env = {JOB_VARIABLE: json.dumps(order), "PYTHONDONTWRITEBYTECODE": ""}
    spec = KernelSpec(argv=[sys.executable, *_LAUNCHER], language="python", env=env)

    class Manager(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **options):
            super().__init__(**options)
            watch.manager = self

    return Manager


def _cause(error: BaseException | None, watch: _Watch, cell_timeout: int | None) -> str:
    """Why a run ended, in a few words."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {error or 'Ctrl-C'}; the kernel was ended"
    if isinstance(error, CellTimeoutError):
        return f"over its time limit of {cell_timeout} s; the kernel was ended"
    process = getattr(getattr(watch.manager, "provisioner", None), "process", None)
    code = process.poll() if process else None  # None: it did not end by itself
    if code is not None or isinstance(error, DeadKernelError):
        meant = {-one: f"{-one}: {one.name}" for one in signal.Signals}
        meant |= {-9: "-9: killed, out of memory?", -11: "-11: crashed, SIGSEGV"}
        known = "exit code not known" if code is None else f"exit code {code}"
        return f"the kernel ended ({meant.get(code, known)})"
    for output in watch.cell.outputs if watch.cell is not None else ():
        if output.output_type == "error":
            if output.ename == "SystemExit":
                return f"it called sys.exit({output.evalue}), and the cells after it did not run"
            return f"{output.ename}: {output.evalue}".partition("\n")[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0] if error else "it was not done"


def _truthful(notebook: NotebookNode, failed: NotebookNode | None, sentence: str) -> NotebookNode:
    """Mark what was done, what failed and what did not run, whatever papermill noted."""
    reached = True
    for cell in remove_error_markers(notebook).cells:
        noted = cell.metadata.get("papermill", {})
        if cell is failed:
            reached = False
            noted.update(status="failed", exception=True)
            if not any(output.output_type == "error" for output in cell.outputs):
                told = {"ename": "Failed", "evalue": sentence, "traceback": [sentence]}
                cell.outputs.append(nbformat.v4.new_output("error", **told))
        elif not reached or (failed is None and cell.get("execution_count", 0) is None):
            none = dict.fromkeys(("exception", "start_time", "end_time", "duration"))
            noted.update(none, status="pending")
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
    notebook.metadata.setdefault("papermill", {})["exception"] = True
    text = f"**This run failed** in {sentence}" if failed else f"**This run failed** {sentence}"
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(text + "\n\nLater cells did not run."))
    return notebook
