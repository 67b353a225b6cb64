"""Kernels and drivers that really end: what is said, what is kept, what still runs."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest

from posmat.report import kernel as kernels
from posmat.report.kernel import NotebookFailure, run_notebook
from posmat.tests.tiny import KEEP, is_gone, make_notebook, report, start, wait_for

# What a notebook's second code cell does, and what is said of it.
CASES = {
    "01_raises": ("raise ValueError('of the test')", ": ValueError: of the test"),
    "02_exits": ("import sys; sys.exit(0)", "it called sys.exit(0)"),
    "03_killed": ("import os; os.kill(os.getpid(), 9)", "ended (-9: killed, out of memory?)"),
    "04_crashes": ("import ctypes; ctypes.string_at(0)", "ended (-11: crashed, SIGSEGV)"),
    "05_leaves": ("import os; os._exit(3)", "the kernel ended (exit code 3)"),
    "06_is_slow": ("import time; time.sleep(60)", "over its time limit of 2 s"),
}


def states_of(failed: Path) -> list:
    """(execution count, papermill's status, kind of output) of each code cell."""
    notebook = nbformat.read(failed, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("**This run failed** in cell")
    states = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        kinds = "".join(output.output_type for output in cell.outputs)
        kind = "error" if "error" in kinds else kinds
        states.append((cell.execution_count, cell.metadata.papermill.status, kind))
    return states


def test_each_failure_is_one_true_sentence_and_the_rest_still_runs(tmp_path):
    for name, (source, _) in CASES.items():
        make_notebook(tmp_path, name, "'before'", source, "'after'")
    make_notebook(tmp_path, "07_keeps_nothing", "1")
    make_notebook(tmp_path, "08_is_good", KEEP)
    reports = tmp_path / "reports" / "local" / "all"
    reports.mkdir(parents=True)
    for name in CASES:
        (reports / f"{name}.ipynb").write_text("the last good report")

    code, out, err = report(tmp_path, "--cell-timeout", "2")

    assert code == 1 and "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("posmat: ")]
    assert len(err.splitlines()) == len(said) + 8, "one line as each begins, one as it fails"
    for (name, (source, cause)), line in zip(CASES.items(), said, strict=False):
        assert line.startswith(f"posmat: {name} failed in cell 3 ({source[:20]}") and cause in line
        assert (reports / f"{name}.ipynb").read_text() == "the last good report"
        truth = states_of(reports / f"{name}.failed.ipynb")
        done = (2, "completed", "execute_result")
        assert truth[1:] == [done, (3, "failed", "error"), (None, "pending", "")]
    assert "07_keeps_nothing failed after its last cell: it kept no rows" in said[6]
    assert (reports / "08_is_good.html").exists()
    assert out.splitlines()[-1] == f"1 done, 7 failed, 0 skipped. Look at {reports}"


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_signal_ends_the_kernel_keeps_what_is_done_and_starts_no_more(tmp_path, number, name):
    make_notebook(tmp_path, "01_is_good", KEEP)
    flag = tmp_path / "reached"
    waits = f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(60)"
    make_notebook(tmp_path, "02_is_slow", waits, "'after'")
    make_notebook(tmp_path, "03_is_not_started", KEEP)
    driver = start(tmp_path)
    wait_for(flag.exists)
    (kernel,) = psutil.Process(driver.pid).children()
    driver.send_signal(number)
    out, err = driver.communicate(timeout=30)
    assert driver.returncode == 1 and "Traceback" not in err
    assert "02_is_slow failed in cell 2 (import pathlib, time; " in err
    assert f"stopped by {name}; the kernel was ended" in err
    assert "\n1 done, 1 failed, 0 skipped, 1 not started. Look at " in out
    assert not kernel.is_running()
    reports = tmp_path / "reports" / "local" / "all"
    assert (reports / "01_is_good.html").exists()
    truth = states_of(reports / "02_is_slow.failed.ipynb")
    assert [status for _, status, _ in truth] == ["completed", "failed", "pending"]
    assert "posmat: local is not drawn (stopped); its rows are kept: 'posmat draw'" in err
    assert not list((tmp_path / ".posmat").iterdir())


def test_a_killed_kernel_leaves_no_child_beside_the_next_notebook(tmp_path):
    child = tmp_path / "child"
    busy = f"import os, pathlib; pathlib.Path({str(child)!r}).write_text(str(os.getpid()))"
    make_notebook(
        tmp_path,
        "01_has_a_child",
        "import os, subprocess, sys, time",
        f"subprocess.Popen([sys.executable, '-c', {busy + '; import time; time.sleep(60)'!r}])\n"
        f"while not os.path.exists({str(child)!r}): time.sleep(0.01)\nos.kill(os.getpid(), 9)",
    )
    code, _, err = report(tmp_path)
    assert code == 1 and "the kernel ended (-9" in err
    wait_for(child.read_text)
    wait_for(lambda: is_gone(int(child.read_text())))


def test_a_signal_while_it_draws_is_told_as_that(tmp_path):
    make_notebook(tmp_path, "01_is_good", KEEP)
    flag = tmp_path / "drawing"
    driver = start(tmp_path, POSMAT_TEST_DRAWS=str(flag))
    wait_for(flag.exists)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=30)
    assert driver.returncode == 1 and "Traceback" not in err
    assert "posmat: local is not drawn (" in err and "its rows are kept: 'posmat draw'" in err
    assert "1 done, 0 failed, 0 skipped. Look" in out


@contextmanager
def mounted(place: Path, option: str):
    """A small disk of its own at a place; skip where none can be mounted."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_cannot_be_written_to_is_known_before(tmp_path):
    make_notebook(tmp_path, "01_is_good", "raise RuntimeError('it ran')")
    with mounted(tmp_path / "reports" / "local" / "all", "ro") as place:
        code, _, err = report(tmp_path, "--quiet")
    assert code == 1 and err.count("\n") == 1
    assert f"before its first cell: {place} cannot be written to" in err


def test_folders_that_vanish_while_a_notebook_runs(tmp_path):
    remove = "import shutil; shutil.rmtree({!r})"
    make_notebook(tmp_path, "01_staging", remove.format(str(tmp_path / ".posmat")), KEEP)
    reports = tmp_path / "reports"
    block = f"import pathlib; pathlib.Path({str(reports)!r}).write_text('')"
    make_notebook(tmp_path, "02_blocked", KEEP, f"{remove.format(str(reports))}\n{block}")
    make_notebook(tmp_path, "03_again", KEEP, f"{block}\npathlib.Path({str(reports)!r}).unlink()")
    code, out, err = report(tmp_path)
    first, second, third = [line for line in err.splitlines() if line.startswith("posmat: ")]
    assert code == 1 and "Traceback" not in err
    assert "01_staging failed in cell 3 (import hashlib" in first and "FileNotFoundError" in first
    assert "02_blocked ran to its end, but the folder " in second
    assert "03_again failed before its first cell: the folder " in third
    assert out.splitlines()[-1].startswith("0 done, 3 failed, 0 skipped")


def test_a_full_disk_loses_nothing(tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        notebook = make_notebook(disk, "01_grows", KEEP)
        assert report(disk, TMPDIR=str(tmp_path))[0] == 0
        before = {path: path.read_bytes() for path in disk.rglob("01_grows.*")}
        assert len(before) == 5
        # The rows have no room; then the rows have it, and the executed notebook has not.
        code, _, err = report(disk, "-p", "size=400000", "--force", TMPDIR=str(tmp_path))
        assert code == 1 and "failed in cell 3 (import hashlib" in err
        assert "No space left on device" in err and "Traceback" not in err
        make_notebook(disk, notebook.stem, KEEP, "'x' * 900_000")
        code, _, err = report(disk, TMPDIR=str(tmp_path))
        assert code == 1 and "failed after its last cell: OSError" in err
        assert "No space left on device" in err and "Traceback" not in err
        del before[notebook]
        assert {path: path.read_bytes() for path in before} == before


def begin_with(folder: Path, code: str) -> str:
    """A PYTHONPATH with which every Python begins with some code."""
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_a_missing_ipykernel_is_named(tmp_path):
    make_notebook(tmp_path, "01_is_good", KEEP)
    paths = begin_with(tmp_path, "import sys; sys.modules['ipykernel_launcher'] = None")
    code, _, err = report(tmp_path, "--quiet", PYTHONPATH=paths)
    cause = f"ImportError: ipykernel is missing from {sys.executable}: install it with pip"
    assert (code, err) == (1, f"posmat: 01_is_good failed before its first cell: {cause}\n")


def test_a_kernel_that_does_not_start_in_time_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", begin_with(tmp_path, "import time; time.sleep(2)"))
    notebook = make_notebook(tmp_path, "01_starts_late", "1 + 1")
    executed = run_notebook(notebook, {}, {}, tmp_path)
    assert executed.cells[-1].outputs[0].data["text/plain"] == "2"
    assert kernels.START_TIMEOUT == 300, "papermill waits for 60 s, a slow disk may take longer"
    monkeypatch.setattr(kernels, "START_TIMEOUT", 1)
    with pytest.raises(NotebookFailure, match=r"^before its first cell: .* 1 seconds"):
        run_notebook(notebook, {}, {}, tmp_path)
