"""One notebook in one fresh kernel, and the truth about how it ended.

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
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.execute import ERROR_MARKER_TAG

from posmat.measure.files import JOB_VARIABLE

# What these log is said by the failure's sentence.
logging.getLogger("papermill").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# What a kernel may take to start. papermill waits for a minute, which a machine that reads its
# packages from a slow disk for the first time may be over.
START_TIMEOUT = 300
_LAUNCHER = ("-m", "ipykernel_launcher", "-f", "{connection_file}")
Tell = Callable[[int, int, str], None]  # (number of the cell, of how many, its first line)


class NotebookFailure(Exception):
    """A notebook did not run to its end; the message names the cell and the cause.

    `notebook` is the notebook as it stood, `stopped` whether the user or the system ended it.
    """

    def __init__(self, message: str, notebook: NotebookNode, stopped: bool = False):
        super().__init__(message)
        self.notebook, self.stopped = notebook, stopped


def run_notebook(
    source: Path,
    parameters: dict,
    order: dict,
    folder: Path,
    cell_timeout: int | None = None,
    tell: Tell = lambda *_: None,
) -> NotebookNode:
    """Run a notebook in a fresh kernel and return it executed.

    `parameters` are those that differ from the defaults, `order` is what the kernel is told in
    POSMAT_JOB, `folder` its working directory, `cell_timeout` in seconds.

    Raises:
        NotebookFailure: it did not run to its end, for whatever reason.
    """
    watch = _Watch(tell)
    try:
        if importlib.util.find_spec("ipykernel_launcher") is None:
            raise ImportError(f"ipykernel is missing from {sys.executable}: install it with pip")
        executed = papermill.execute_notebook(
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
        error = None
    except (Exception, KeyboardInterrupt) as found:  # the user is told, the next notebook runs
        error = found
    watch.end_children()
    if watch.cell is None and error is None:
        return _without_paths(executed, source)
    sentence = f"{watch.where()}: {_cause(error, watch, cell_timeout)}"
    notebook = watch.notebook or nbformat.read(source, as_version=4)
    if watch.cell is not None:  # a kernel may die before it tells the number
        watch.cell.execution_count = watch.number
    truth = _truthful(_without_paths(notebook, source), watch.cell, sentence)
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
        self.tell(self.number, self.total, first_line(cell))

    def cell_ended(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        if execute_reply["content"]["status"] == "ok":
            self.cell = None

    def where(self) -> str:
        if self.cell is not None:
            return f"cell {self.number} ({first_line(self.cell)})"
        return f"after cell {self.number}" if self.number else "before its first cell"

    def end_children(self) -> None:
        """End what cells started and a killed kernel left: it leads a process group of its own."""
        if self.group and hasattr(os, "killpg") and self.group != os.getpgrp():
            with suppress(OSError):  # nobody is left, as it should be
                os.killpg(self.group, signal.SIGKILL)

    def exit_code(self) -> int | None:
        """The kernel's exit code, or None where it did not end by itself."""
        process = getattr(getattr(self.manager, "provisioner", None), "process", None)
        return process.poll() if process else None


def first_line(cell: NotebookNode) -> str:
    """The first line of a cell that is code, so that a reader finds the cell again."""
    lines = [line.strip() for line in cell.source.splitlines()]
    line = next((line for line in lines if line and not line.startswith("#")), "no code")
    return line if len(line) <= 48 else f"{line[:47]}…"


def _manager_class(order: dict, watch: _Watch) -> type[AsyncKernelManager]:
    """A kernel manager that starts this very Python, whatever other kernels the user has.

    PYTHONDONTWRITEBYTECODE is emptied, which Python reads as unset: where packages were installed
    uncompiled it would make every kernel compile them anew, 3 s each time.
    """
    spec = KernelSpec(
        argv=[sys.executable, *_LAUNCHER, "--log-level=ERROR"],
        display_name="Python 3",
        language="python",
        env={JOB_VARIABLE: json.dumps(order), "PYTHONDONTWRITEBYTECODE": ""},
    )

    class Specs(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return spec

    class Manager(AsyncKernelManager):
        def __init__(self, **options):
            super().__init__(kernel_spec_manager=Specs(), **options)
            watch.manager = self

    return Manager


def _cause(error: BaseException | None, watch: _Watch, cell_timeout: int | None) -> str:
    """Why a run ended, in a few words."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {error or 'Ctrl-C'}; the kernel was ended"
    if isinstance(error, CellTimeoutError):
        return f"over its time limit of {cell_timeout} s; the kernel was ended"
    code = watch.exit_code()
    if code is not None or isinstance(error, DeadKernelError):
        return f"the kernel ended ({describe_exit(code)})"
    outputs = watch.cell.outputs if watch.cell is not None else []
    for output in outputs:
        if output.output_type == "error":
            if output.ename == "SystemExit":
                return f"it called sys.exit({output.evalue}), and the cells after it did not run"
            return f"{output.ename}: {output.evalue}".partition("\n")[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0] if error else "it was not done"


def describe_exit(code: int | None) -> str:
    """An exit code with what it usually means: '-9: killed, out of memory?'."""
    if code is None:
        return "exit code not known"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
        meaning = {"SIGKILL": "killed, out of memory?", "SIGSEGV": "crashed, SIGSEGV"}
        return f"{code}: {meaning.get(name, name)}"
    except ValueError:
        return str(code)


def _truthful(notebook: NotebookNode, failed: NotebookNode | None, sentence: str) -> NotebookNode:
    """Mark what was done, what failed and what did not run, whatever papermill noted."""
    notebook.cells = [
        c for c in notebook.cells if ERROR_MARKER_TAG not in c.metadata.get("tags", ())
    ]
    reached = True
    for cell in notebook.cells:
        noted = cell.metadata.get("papermill", {})
        if cell is failed:
            reached = False
            noted.update(status="failed", exception=True)
            if not any(output.output_type == "error" for output in cell.outputs):
                cell.outputs.append(
                    nbformat.v4.new_output(
                        "error", ename="Failed", evalue=sentence, traceback=[sentence]
                    )
                )
        elif not reached or (failed is None and cell.get("execution_count", 0) is None):
            noted.update(status="pending", exception=None)
            noted.update(start_time=None, end_time=None, duration=None)
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
    notebook.metadata.setdefault("papermill", {})["exception"] = True
    text = f"**This run failed** in {sentence}" if failed else f"**This run failed** {sentence}"
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(text + "\n\nLater cells did not run."))
    return notebook


def _without_paths(notebook: NotebookNode, source: Path) -> NotebookNode:
    """Take this machine's paths out of what papermill noted."""
    noted = notebook.metadata.get("papermill", {})
    noted.update(input_path=source.name, output_path=source.name)
    return notebook
