"""A project of tiny notebooks, and the real driver on it: a kernel start is all that they cost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

# What a driver or a worker begins with, so that it costs little. jsonschema, which nbformat loads,
# compiles a grammar of web addresses for most of a second where that module is there, and does
# without where it is not. And no time is measured here: one short look says how busy the host is.
LIGHT = """
import sys, psutil
sys.modules["rfc3987_syntax"] = None
psutil.cpu_percent = lambda interval=0, look=psutil.cpu_percent: look(interval / 10)
"""

# The real command on another project's folder than the one that the package stands in. It draws
# nothing: tiny notebooks keep rows that no figure shows, and loading seaborn takes seconds. With
# POSMAT_TEST_DRAWS it takes as long as to draw much, and touches that file when it begins.
_DRIVER = f"""{LIGHT}
import os, time
from pathlib import Path
from posmat.report import cli

def redraw(*_, **__):
    if flag := os.environ.get("POSMAT_TEST_DRAWS"):
        Path(flag).touch()
        time.sleep(60)
    return "", []

cli.redraw = redraw
cli.project_root = lambda: Path(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""

# Rows as a notebook keeps them, without loading pandas.
KEEP = """
import hashlib, json, os, pathlib
job = json.loads(os.environ["POSMAT_JOB"])
folder = pathlib.Path(job["output_dir"])
rows = "round,seconds\\n" + "".join(f"{i},{value}\\n" for i in range(size))
(folder / f"{job['stem']}.csv").write_text(rows)
facts = {"rows_sha256": hashlib.sha256(rows.encode()).hexdigest(), "runs": job["run"] + 1}
(folder / f"{job['stem']}.json").write_text(json.dumps(facts | {"duration_s": 7.0}))
"""
PARAMETERS = (
    'value: int = 1  # of every row\nsize: int = 3  # number of rows\nmode: str = "a"  # any'
)


def make_notebook(project: Path, name: str, *sources: str, parameters: str = PARAMETERS) -> Path:
    """Write `<name>.ipynb` with a heading, a parameters cell and one code cell per source."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(f"# {name}"), first, *map(new_code_cell, sources)]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    path = project / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


def start(project: Path, *words: str, **environment: str) -> subprocess.Popen:
    """Start `posmat report` on a project; its locks and temporary folders stay in there."""
    own = project / "tmp"
    own.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(project), "report", *words],
        env={**os.environ, "TMPDIR": str(own), "POSMAT_LOCKS": str(own), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def report(project: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Run `posmat report` to its end: exit code, stdout, stderr."""
    process = start(project, *words, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def wait_for(happened, seconds: float = 60) -> None:
    """Wait until `happened()` is true."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # of an init that reaps late
    except psutil.NoSuchProcess:
        return True
