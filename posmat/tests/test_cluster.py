"""A real scheduler and real workers on loopback, and each fault done for real."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import posmat
from posmat.report import cli
from posmat.tests import tiny
from posmat.tests.tiny import is_gone, wait_for

cluster = pytest.importorskip("posmat.report.cluster", reason="[cluster] is not installed")

NOTE = "open({0!r}, 'a').write(str(os.getpid()) + '\\n')"  # a line for each time it runs
WAIT_S = 60
PACKAGE = Path(posmat.__file__).parent


class Machines:
    """A scheduler and its workers, each a process of its own."""

    def __init__(self, folder: Path):
        self.folder, self.started, self.address = folder, [], ""
        (folder / "tmp").mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(tiny.LIGHT)

    def run(self, *words: str, before: tuple = (), **environment: str) -> subprocess.Popen:
        paths = [self.folder, *before, PACKAGE.parent]
        own = {"TMPDIR": str(self.folder / "tmp"), "PYTHONPATH": os.pathsep.join(map(str, paths))}
        with (self.folder / f"log-{len(self.started)}").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.folder,  # python -m looks there first: not in the checkout
                env=os.environ | own | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def scheduler(self) -> subprocess.Popen:
        file = self.folder / f"scheduler-{len(self.started)}.json"
        words = ("--host=127.0.0.1", "--port=0", "--no-dashboard", f"--scheduler-file={file}")
        process = self.run("dask", "scheduler", *words)
        wait_for(lambda: file.exists() and file.read_text().strip().endswith("}"))
        self.address = json.loads(file.read_text())["address"]
        return process

    def worker(self, machine: str, *before: Path) -> subprocess.Popen:
        """A machine joins, with modules that come before its own. It has locks of its own, as on
        another host, so that jobs run on two machines at once."""
        locks = self.folder / f"locks-{machine}"
        locks.mkdir(exist_ok=True)
        words = ("worker", self.address, "--machine", machine, "--device", "cpu")
        return self.run("posmat.report.cli", *words, before=before, POSMAT_LOCKS=str(locks))

    def wait(self, *names: str) -> None:
        """Wait until these machines, and no others, have joined."""
        with cluster.connected(self.address) as client:
            there = {(name, "cpu") for name in names}
            wait_for(lambda: {*cluster.workers_of(client).values()} == there)


def end(process: subprocess.Popen) -> None:
    """End a process and those that it started; they have a session of their own."""
    if process.poll() is None or process.args[2] == "posmat.report.cli":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """One scheduler with the machines a and b, for all tests that leave it as it is."""
    found = Machines(tmp_path_factory.mktemp("machines") / "own")
    found.scheduler()
    found.worker("a"), found.worker("b")
    found.wait("a", "b")
    yield found
    list(map(end, found.started))


@pytest.fixture
def other(tmp_path):
    """A scheduler for a test that changes who is there; nobody has joined it."""
    found = Machines(tmp_path / "other")
    found.scheduler()
    yield found
    list(map(end, found.started))


def make(project: Path, name: str, *cells: str) -> Path:
    """A tiny notebook that measures on a device and notes each of its runs; returns the notes."""
    notes = project / f"{name}.notes"
    parameters = tiny.PARAMETERS + '\ndevice: str = "cpu"  # where'
    first = f"import os, time\n{NOTE.format(str(notes))}"
    tiny.make_notebook(project, name, first, *cells, tiny.KEEP, parameters=parameters)
    return notes


def runs(notes: Path) -> list[int]:
    """The process ids of the kernels that ran a notebook."""
    return [int(line) for line in notes.read_text().split()] if notes.exists() else []


def report(project: Path, machines: Machines, *words: str) -> tuple[int, str, str]:
    return tiny.report(project, "--scheduler", machines.address, *words)


def test_every_machine_runs_each_job_and_an_error_is_not_tried_again(tmp_path, machines):
    untouched = "assert 'MALLOC_TRIM_THRESHOLD_' not in os.environ"  # as dask's nanny would set it
    good = make(tmp_path, "01_good", untouched)
    bad = make(tmp_path, "02_bad", "raise ValueError('no such number')")
    code, out, err = report(tmp_path, machines, "--every-machine")
    assert code == 1, err
    assert "2 done, 2 failed, 0 skipped" in out
    assert len(runs(good)) == 2 and len(runs(bad)) == 2  # once on each machine
    assert "01_good on cpu (a)" in err and "01_good on cpu (b)" in err
    assert err.count("ValueError: no such number") == 2 and "runs again" not in err
    for machine in "ab":
        data, reports = (tmp_path / kind / machine / "cpu" for kind in ("data", "reports"))
        assert (data / "01_good.csv").read_text().startswith("round,seconds\n0,1\n")
        assert json.loads((data / "01_good.json").read_text())["key"]["device"] == "cpu"
        assert (reports / "01_good.html").exists() and (reports / "01_good.ipynb").exists()
        assert (reports / "02_bad.failed.ipynb").exists() and not (data / "02_bad.csv").exists()
    code, out, _ = report(tmp_path, machines, "01", "--every-machine")
    assert code == 0 and "0 done, 0 failed, 2 skipped" in out
    code, out, _ = report(tmp_path, machines, "01", "--force")
    assert code == 0 and "1 done" in out and len(runs(good)) == 3  # on one of them


def test_what_cannot_be_run_is_refused_before_it_is_sent(tmp_path, machines):
    notes = make(tmp_path, "01_good")
    code, _, err = report(tmp_path, machines, "--device", "cuda")
    assert code == 2 and "no machine offers cuda; a has cpu; b has cpu" in err
    mark = tmp_path / "data" / "b" / "host.json"
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"host_identity": "0123", "processor": "another"}))
    code, _, err = report(tmp_path, machines, "--every-machine")
    assert code == 1 and "belongs to another host (another, identity 0123" in err
    assert not runs(notes)


def test_a_lost_worker_has_its_job_run_again_and_nothing_else(tmp_path, other):
    other.worker("a"), other.worker("b")
    other.wait("a", "b")
    done = make(tmp_path, "01_done")
    again = tmp_path / "again"
    cell = f"if not os.path.exists({str(again)!r}):\n    time.sleep({WAIT_S})"
    slow = make(tmp_path, "02_slow", cell)
    process = tiny.start(tmp_path, "--scheduler", other.address)
    wait_for(lambda: runs(slow))
    kernel = psutil.Process(runs(slow)[0])
    wait_for(lambda: list((tmp_path / "data").glob("*/cpu/01_done.json")))
    again.touch()
    kernel.parent().kill()
    wait_for(lambda: is_gone(kernel.pid))  # it ends with its worker
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert "02_slow on cpu lost its worker on" in err and "it runs again" in err
    assert "2 done, 0 failed" in out and len(runs(done)) == 1 and len(runs(slow)) == 2
    other.wait("a", "b")  # the worker was started again


def test_a_job_that_kills_its_workers_is_given_up_and_named(tmp_path, machines):
    # A worker that is killed may have ended a good job just before, whose result is fetched first.
    kill = "time.sleep(2); os.kill(os.getppid(), 9)"
    killer = make(tmp_path, "01_killer", kill, "time.sleep(60)")
    good = [make(tmp_path, f"0{number}_good") for number in (2, 3, 4)]
    code, out, err = report(tmp_path, machines)
    assert code == 1 and "01_killer on cpu" in err and "two workers were lost" in err
    assert "3 done, 1 failed" in out and len(runs(killer)) == 2
    assert [len(runs(notes)) for notes in good] == [1, 1, 1]
    machines.wait("a", "b")


def test_ctrl_c_ends_the_kernel_on_its_worker(tmp_path, machines):
    slow = make(tmp_path, "01_slow", f"time.sleep({WAIT_S})")
    process = tiny.start(tmp_path, "--scheduler", machines.address)
    wait_for(lambda: runs(slow))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1 and "stopped by Ctrl-C" in err and "1 not started" in out
    wait_for(lambda: is_gone(runs(slow)[0]))
    assert len(runs(slow)) == 1


def test_a_killed_scheduler_leaves_what_is_done_and_the_command_does_the_rest(tmp_path, other):
    other.worker("a")
    other.wait("a")
    done = make(tmp_path, "01_done")
    again = tmp_path / "again"
    slow = make(tmp_path, "02_slow", f"while not os.path.exists({str(again)!r}): time.sleep(0.1)")
    process = tiny.start(tmp_path, "--scheduler", other.address)
    wait_for(lambda: runs(slow))
    end(other.started[0])
    again.touch()
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1 and "the scheduler has gone" in err
    assert "1 done, 0 failed, 0 skipped, 1 not started" in out
    assert (tmp_path / "data" / "a" / "cpu" / "01_done.csv").exists()
    wait_for(lambda: is_gone(runs(slow)[0]))  # its worker ends with the scheduler
    other.scheduler()
    other.worker("a")
    other.wait("a")
    code, out, err = report(tmp_path, other)
    assert code == 0 and "1 done, 0 failed, 1 skipped" in out, err
    assert len(runs(done)) == 1 and len(runs(slow)) == 2


def test_whatever_ends_those_who_started_them_no_worker_is_left(tmp_path, other):
    commands = [other.worker("a"), other.worker("b")]
    other.wait("a", "b")
    children = [child for one in commands for child in psutil.Process(one.pid).children()]
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    commands[0].kill()  # the scheduler stays
    wait_for(lambda: is_gone(workers[0].pid))
    assert not is_gone(workers[1].pid)
    workers[1].suspend()
    for process in (commands[1], other.started[0]):
        process.terminate()
        process.wait(WAIT_S)
    wait_for(lambda: is_gone(workers[1].pid))


def test_another_torch_is_refused_with_both_named(tmp_path, other):
    notes = make(tmp_path, "01_good")
    older = tmp_path / "older" / "torch-2.9.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    other.worker("old", older.parent)
    other.wait("old")
    code, _, err = report(tmp_path, other)
    assert code == 2 and "old has torch 2.9.0 and this machine has torch 2." in err
    assert not runs(notes)


def test_a_first_worker_is_awaited_and_not_for_ever(tmp_path, other, monkeypatch, capsys):
    notes = make(tmp_path, "01_good")
    process = tiny.start(tmp_path, "--scheduler", other.address)
    line = process.stderr.readline()
    assert line == "posmat: no worker has joined yet; one is awaited for up to 60 s.\n"
    worker = other.worker("a")
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0 and "1 done" in out and len(runs(notes)) == 1, err
    end(worker)
    other.wait()
    monkeypatch.setattr(cluster, "JOIN_S", 0.5)
    monkeypatch.setattr(cluster, "ANSWERS_S", 0.5)
    monkeypatch.setattr(cli, "_root", lambda: tmp_path)
    assert cli.main(["report", "--scheduler", other.address]) == 2
    assert "posmat: no machine offers all; none has joined: start" in capsys.readouterr().err
    assert cli.main(["report", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err
