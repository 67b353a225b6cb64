"""Workers of a cluster: dask's own, one process per device, and what a job does in one.

Importing this imports nothing of dask.
"""

import getpass
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from threading import Thread

import psutil

from posmat.measure.files import JOB_VARIABLE, SCRATCH, scratch_folder
from posmat.report.exclusive import one_at_a_time
from posmat.report.freshness import describe_installation, job_key
from posmat.report.runner import Job, Outcome, run_in_folder

ANY = "any"  # the machine of a job that no machine has taken yet
_ended: set[str] = set()  # commands that were stopped

# dask watches itself, which costs 8 % of a core by default: too much for a machine that is timed.
QUIET = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__MONITOR_INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__GIL__ENABLED": "False",
}
PARENT = "POSMAT_WORKER"  # tells a worker the process that started it
LOOK_S = 2  # between two looks at what a worker lives for
END_S = 5  # in which a worker ends by itself where that has gone
# No nanny: it sets OMP_NUM_THREADS=1 and malloc's trimming, which would change what is measured.
_WORDS = ("--no-nanny", "--nthreads=1", "--memory-limit=0", "--no-dashboard", "--death-timeout=60")
_WORDS += ("--preload=posmat.report.worker",)
_LOOPBACK = ("127.", "localhost", "[::1]")


def start_workers(address: str, machine: str, devices: list[str]) -> int:
    """Start a worker for each device of this host, and start one again that was killed.

    Returns the exit code of the first that ended by itself, as they do when the scheduler goes.
    """
    running = {device: _start(address, machine, device) for device in devices}
    try:
        while True:
            for device, process in running.items():
                code = process.poll()
                if code is not None and code >= 0:
                    return code
                if code is not None:
                    text = f"posmat: the worker for {device} was killed ({code}); it starts again."
                    print(text, file=sys.stderr, flush=True)
                    running[device] = _start(address, machine, device)
            time.sleep(1)
    finally:
        for process in running.values():
            process.terminate()


def _start(address: str, machine: str, device: str) -> subprocess.Popen:
    local = address.rpartition("//")[2].startswith(_LOOPBACK)
    own = [f"--name={machine}-{device}", f"--resources={device}=1 {device}@{machine}=1"]
    own += ["--host=127.0.0.1"] * local
    return subprocess.Popen(
        [sys.executable, "-m", "dask", "worker", address, *_WORDS, *own],
        env={**QUIET, **os.environ, PARENT: str(os.getpid())},
    )


def dask_setup(worker) -> None:
    """What dask calls in a worker that preloads this module."""
    Thread(target=_end_in_time, args=(worker,), daemon=True).start()


def _end_in_time(worker) -> None:
    """End this process soon after `posmat worker`, or the worker itself, has ended.

    `posmat worker` may be killed; and a worker that is told to stop by its scheduler and by a
    signal at once never comes to its end.
    """
    parent = int(os.environ[PARENT])
    while worker.status.name in ("init", "starting", "running", "paused"):
        if os.getppid() != parent or not psutil.pid_exists(parent):  # Windows gives no other parent
            break
        time.sleep(LOOK_S)
    time.sleep(END_S)
    os._exit(1)


def run_there(job: Job, text: bytes, run: str, number: int) -> tuple[Outcome, dict, dict]:
    """Run a job in this worker's process; its outcome, its files, and who ran it."""
    from distributed import get_worker

    worker, facts = get_worker(), describe_installation()
    offers = (name for name in worker.state.total_resources if "@" in name)
    machine = next(offers).partition("@")[2]

    def tell(*cell: object) -> None:
        worker.log_event(run, {"number": number, "machine": machine, "cell": cell})

    with scratch_folder(Path(gettempdir()) / f"{SCRATCH}-{getpass.getuser()}") as scratch:
        source, results = scratch / job.notebook.name, scratch / run / "results"
        source.write_bytes(text)
        job = replace(job, notebook=source, machine=machine if job.machine == ANY else job.machine)
        with one_at_a_time(job.device, lambda: tell(0, 0, "waits for another run on this device")):
            if run in _ended:
                raise InterruptedError("the command that sent it was stopped")
            tell()
            outcome = run_in_folder(job, results, job_key(job, scratch), tell)
        files = results.iterdir() if results.is_dir() else ()
        return outcome, {path.name: path.read_bytes() for path in files}, facts


def end_kernels(run: str) -> None:
    """End what a stopped command left running in this worker's process."""
    _ended.add(run)
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if run in child.environ().get(JOB_VARIABLE, ""):
                child.kill()
