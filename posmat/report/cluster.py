"""Many machines: dask's workers, what a job does in one, and who sends the jobs and keeps the rest.

A notebook's text goes out, its files come back as bytes; no disk is shared. A worker's name says
what it is: NAME-cpu is the CPU of the machine NAME. It runs one job at a time in its own process,
so that a killed worker takes its kernel with it. dask would hand out all jobs at once and blame a
worker's death on all that wait for it: here a job leaves for a worker that is free, and where that
is lost, once more.
"""

import getpass
import importlib.metadata
import logging
import os
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from threading import Thread

import dask
import psutil
from distributed import CancelledError, Client, Future, wait

from posmat.machine import host_identity, processor_name
from posmat.measure.files import JOB_VARIABLE, SCRATCH, RecordError, claim_machine, scratch_folder
from posmat.report import UsageError
from posmat.report.freshness import PACKAGE, hash_of_modules, job_key, why_stale
from posmat.report.jobs import Job, Outcome, Say, about, alone, keep_results, run_in_folder

ANY = "any"  # the machine of a job that no machine has taken yet
ANSWERS_S = 5  # a scheduler that is there answers by then
JOIN_S = 60  # a first worker, who may be starting just now, has joined by then
FETCH_S = 300  # a worker that is there has handed out a job's files by then
LOOK_S = 2  # between two looks at who is there, and at what a worker lives for
GONE_S = 15  # a device that nobody has offered for so long does not come back
END_S = 5  # in which a worker ends by itself where what it lives for has gone
PARENT = "POSMAT_WORKER"  # tells a worker the process that started it

# dask watches itself, which costs 8 % of a core by default: too much for a machine that is timed.
QUIET = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__MONITOR_INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "60s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__GIL__ENABLED": "False",
}
# No nanny: it sets OMP_NUM_THREADS=1 and malloc's trimming, which would change what is measured.
_WORDS = ("--no-nanny", "--nthreads=1", "--memory-limit=0", "--no-dashboard", "--death-timeout=60")
_WORDS += ("--preload=posmat.report.cluster",)
_LOOPBACK = ("127.", "localhost", "[::1]")
_ended: set[str] = set()  # commands that were stopped, known in a worker


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
    own = [f"--name={machine}-{device}", *["--host=127.0.0.1"] * local]
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


def installation() -> dict:
    """What must be the same where jobs are sent from and where they run, and whose host this is."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    code = hash_of_modules(sorted(".".join(one.parts) for one in paths if one.parts[0] != "tests"))
    return {
        "posmat": f"{importlib.metadata.version('posmat')} (code {code[:8]})",
        "torch": importlib.metadata.version("torch"),
        "host_identity": host_identity(),
        "processor": processor_name(),
    }


def run_there(job: Job, text: bytes, run: str) -> tuple[Outcome, dict, dict]:
    """Run a job in this worker's process; its outcome, its files, and who ran it."""
    facts = installation()
    with scratch_folder(Path(gettempdir()) / f"{SCRATCH}-{getpass.getuser()}") as scratch:
        source, results = scratch / job.notebook.name, scratch / run / "results"
        source.write_bytes(text)
        job = replace(job, notebook=source, root=scratch)
        with alone(job):
            if run in _ended:
                raise InterruptedError("the command that sent it was stopped")
            outcome = run_in_folder(job, results, job_key(job))
        files = results.iterdir() if results.is_dir() else ()
        return outcome, {path.name: path.read_bytes() for path in files}, facts


def end_kernels(run: str) -> None:
    """End what a stopped command left running in this worker's process."""
    _ended.add(run)
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if run in child.environ().get(JOB_VARIABLE, ""):
                child.kill()


@contextmanager
def connected(address: str):
    """Give a client of the scheduler, or raise UsageError where none answers."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # what it logs is said here
    with dask.config.set({"distributed.comm.timeouts.connect": f"{ANSWERS_S}s"}):
        try:
            client = Client(address, timeout=f"{ANSWERS_S}s")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no scheduler answers at {address} ({str(error).splitlines()[0]}): start one "
                "with 'dask scheduler', or give its address."
            ) from None
        try:
            yield client
        finally:
            with suppress(Exception):  # the scheduler may have gone
                client.close(timeout=2)


def workers_of(client: Client) -> dict[str, tuple[str, str]]:
    """The machine and the device of each worker that has joined, by its address."""
    found = client.scheduler_info(n_workers=-1)["workers"].items()
    names = {address: str(worker["name"]).rpartition("-") for address, worker in found}
    return {at: (name[0], name[2]) for at, name in names.items() if name[2] in ("cpu", "cuda")}


def await_machines(client: Client, device: str, say: Say) -> dict[tuple[str, str], dict]:
    """Who runs each device of each machine, by the two names; a first worker is waited for.

    Raises:
        UsageError: nobody offers the device, or a worker's posmat or PyTorch is another than here.
        RecordError: the scheduler ends meanwhile.
    """

    def describe():  # goes out by value: an older posmat has no such function
        try:
            from posmat.report.cluster import installation
        except ImportError as error:
            return {"posmat": f"none that works on a cluster ({error})"}
        return installation()

    if not workers_of(client):
        say(f"posmat: no worker has joined yet; one is awaited for up to {JOIN_S} s.")
        try:
            client.wait_for_workers(1, timeout=JOIN_S)
        except TimeoutError:  # what is not there is told as for any other device
            pass
        except OSError:
            raise RecordError("the scheduler has gone.") from None
    machines, workers = {}, workers_of(client)
    for address, facts in client.run(describe, workers=[*workers], on_error="return").items():
        machine, _ = workers[address]
        if not isinstance(facts, dict):
            raise UsageError(f"the worker of {machine} at {address} does not answer: {facts}")
        require_same(facts, machine)
        machines[workers[address]] = facts
    if not machines or device not in ("all", *(offered for _, offered in machines)):
        offers = "; ".join(f"{machine} has {offered}" for machine, offered in sorted(machines))
        raise UsageError(
            f"no machine offers {device}; {offers or 'none has joined'}: start a worker with "
            "'posmat worker ADDRESS --machine NAME'."
        )
    return machines


def require_same(found: dict, machine: str) -> None:
    """Refuse a machine with other code or another PyTorch than this one, with UsageError."""
    own = installation()
    for what in ("posmat", "torch"):
        # 2.13.0+cpu and 2.13.0+cu130 are builds of one version.
        if str(found.get(what)).partition("+")[0] != own[what].partition("+")[0]:
            raise UsageError(
                f"{machine} has {what} {found.get(what, 'not at all')} and this machine has "
                f"{what} {own[what]}: install the same on both, and start the worker again."
            )


def place(jobs: list[Job], machines: dict, every: bool, force: bool) -> list[Job | Outcome]:
    """The jobs that are to run, and an outcome "skipped" for those that are up to date.

    Raises:
        RecordError: a machine's folder is another host's.
    """
    placed: list[Job | Outcome] = []
    for job in jobs:
        ones: list[Job | Outcome] = []
        for (machine, device), facts in sorted(machines.items()):
            if device == job.device:
                one = replace(job, machine=machine)
                claim_machine(job.root, machine, facts)
                key = job_key(one, facts["host_identity"], facts["torch"])
                stale = force or why_stale(one, key)
                ones.append(one if stale else Outcome(one, "skipped", 0.0, one.page))
        done = [one for one in ones if isinstance(one, Outcome)]
        placed += ones if every else done[:1] or [replace(job, machine=ANY)]
    return placed


class Cluster:
    """Jobs sent to workers as they become free, and what comes back kept in the project."""

    def __init__(self, client: Client, say: Say):
        self.client, self.say = client, say
        self.run = f"posmat-{uuid.uuid4().hex[:12]}"
        self.sent: dict[str, tuple[int, Job, Future]] = {}  # by the worker's address

    def run_all(self, jobs: list[Job | Outcome]) -> list[Outcome]:
        """Run the jobs among jobs and outcomes; a stop leaves the rest not started."""
        ended = {at: one for at, one in enumerate(jobs) if isinstance(one, Outcome)}
        waiting = {at: one for at, one in enumerate(jobs) if at not in ended}
        lost: set[int] = set()  # the jobs that have lost a worker
        seen = {at: time.monotonic() for at in waiting}  # when its device was last offered
        try:
            while waiting or self.sent:
                if self.client.status != "running":
                    raise ConnectionError
                workers = workers_of(self.client)
                for address, (number, job, future) in list(self.sent.items()):
                    if future.done():
                        ended[number] = self._keep(job, future)
                    elif address in workers:
                        continue
                    elif number in lost:
                        why = "two workers were lost while it ran; it is given up"
                        ended[number] = self._fail(job, why)
                    else:
                        lost.add(number)
                        waiting[number] = jobs[number]
                        why = f"{job.title} lost its worker on {job.machine}; it runs again"
                        self.say(f"posmat: {why}", always=True)
                    # What dask still holds would be computed again when its worker dies.
                    self.sent.pop(address)[2].release()
                for address, (machine, device) in workers.items():
                    fitting = [
                        at
                        for at, job in waiting.items()
                        if job.device == device and job.machine in (ANY, machine)
                    ]
                    seen |= dict.fromkeys(fitting, time.monotonic())
                    if fitting and address not in self.sent:
                        job = replace(waiting.pop(fitting[0]), machine=machine)
                        place = f"[{fitting[0] + 1}/{len(jobs)}]"
                        self.say(f"{place} {job.title} ({machine}){about(job)}")
                        self.sent[address] = fitting[0], job, self._send(job, address)
                for number in [at for at in waiting if time.monotonic() - seen[at] > GONE_S]:
                    why = "no machine offers its device any more"
                    ended[number] = self._fail(waiting.pop(number), why)
                self._wait()
        except KeyboardInterrupt as error:
            self.say(f"posmat: stopped by {error or 'Ctrl-C'}.", always=True)
            with suppress(Exception):
                self.client.cancel([future for *_, future in self.sent.values()])
                self.client.run(end_kernels, self.run, on_error="ignore")
        except (OSError, CancelledError):
            text = "the scheduler has gone; what is done is kept, the same command runs the rest"
            self.say(f"posmat: {text}.", always=True)
        for number in waiting | {number: job for number, job, _ in self.sent.values()}:
            job = jobs[number]
            ended[number] = Outcome(job, "not started", 0.0, job.root / "reports")
        return [ended[number] for number in range(len(jobs))]

    def _send(self, job: Job, address: str) -> Future:
        words = job, job.notebook.read_bytes(), self.run
        return self.client.submit(run_there, *words, workers=[address], pure=False)

    def _wait(self) -> None:
        """Wait until a job has ended, or until it is time to look who is there."""
        if not self.sent:
            time.sleep(LOOK_S)
            return
        with suppress(TimeoutError):
            futures = [future for *_, future in self.sent.values()]
            wait(futures, timeout=LOOK_S, return_when="FIRST_COMPLETED")

    def _keep(self, job: Job, future: Future) -> Outcome:
        """Put a job's files into their places, or say why there are none."""
        try:
            outcome, files, facts = future.result(timeout=FETCH_S)
            require_same(facts, job.machine)  # it may have joined since
            claim_machine(job.root, job.machine, facts)
            with scratch_folder(job.root / SCRATCH) as scratch:
                for name, content in files.items():
                    (scratch / name).write_bytes(content)
                outcome = keep_results(replace(outcome, job=job), scratch)
        except Exception as error:  # of the worker, too; the other jobs go on
            return self._fail(job, str(error) or type(error).__name__)
        if outcome.message:
            self.say(f"posmat: {job.machine}: {outcome.message}", always=True)
        return outcome

    def _fail(self, job: Job, why: str) -> Outcome:
        self.say(f"posmat: {job.title} ({job.machine}) failed: {why}", always=True)
        return Outcome(job, "failed", 0.0, job.root / "reports", why)
