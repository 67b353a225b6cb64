"""Many machines: the same jobs on dask's workers, their files brought back and kept here.

A notebook's text goes out, its files come back as bytes; no disk is shared. A worker runs one job
at a time on one device, in its own process, so that a killed worker takes its kernel with it. Its
resources say what it is: `cpu=1 cpu@NAME=1` is the CPU of the machine NAME. dask would hand out all
jobs at once and blame a worker's death on all that wait for it: here a job leaves for a free one.
"""

import asyncio
import logging
import queue
import time
import uuid
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import dask
from distributed import Client, Future, KilledWorker

from posmat.measure.files import QUICK, SCRATCH, RecordError, claim_machine, scratch_folder
from posmat.report.freshness import job_key, provenance, require_same, why_stale
from posmat.report.parameters import UsageError
from posmat.report.progress import Progress
from posmat.report.runner import Job, Outcome, keep_results
from posmat.report.worker import ANY, end_kernels, run_there

ANSWERS_S = 5  # a scheduler that is there answers by then
JOIN_S = 60  # a first worker, who may be starting just now, has joined by then
LOOK_S = 2  # between two looks at who is there
GONE_S = 15  # a device that nobody has offered for so long does not come back


@contextmanager
def connected(address: str):
    """Give a client of the scheduler, or raise UsageError where none answers."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # what it logs is said here
    with dask.config.set({"distributed.comm.timeouts.connect": f"{ANSWERS_S}s"}):
        try:
            client = Client(address, timeout=f"{ANSWERS_S}s", set_as_default=False)
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


def await_worker(client: Client, progress: Progress) -> None:
    """Wait for the first worker, where none has joined yet.

    Raises:
        RecordError: the scheduler ends meanwhile.
    """
    if client.scheduler_info()["workers"]:
        return
    progress.say(f"posmat: no worker has joined yet; one is awaited for up to {JOIN_S} s.")
    try:
        client.wait_for_workers(1, timeout=JOIN_S)
    except TimeoutError:  # what is not there is told as for any other device
        return
    except OSError:
        raise RecordError("the scheduler has gone.") from None


def machines_of(client: Client, device: str) -> dict[str, dict]:
    """The machines that joined, as they describe themselves, with their `devices`.

    Raises:
        UsageError: nobody offers the device, a machine's posmat or PyTorch is another than here,
            or two hosts bear one name.
    """

    def describe():  # goes out by value: an older posmat has no such function
        try:
            from posmat.report.freshness import describe_installation as found
        except ImportError as error:
            return {"posmat": f"none that works on a cluster ({error})"}
        return found()

    machines: dict[str, dict] = {}
    facts = client.run(describe, on_error="return")
    for address, worker in client.scheduler_info()["workers"].items():
        for has, machine in (name.split("@") for name in worker["resources"] if "@" in name):
            found = facts.get(address)
            if not isinstance(found, dict):
                raise UsageError(f"the worker of {machine} at {address} does not answer: {found}")
            require_same(found, machine)
            known = machines.setdefault(machine, {**found, "devices": set()})
            if known["host_identity"] != found["host_identity"]:
                raise UsageError(f"two hosts have joined as {machine}: give each its own name.")
            known["devices"].add(has)
    if not any(device == "all" or device in known["devices"] for known in machines.values()):
        offers = [f"{name} has {', '.join(sorted(m['devices']))}" for name, m in machines.items()]
        offers = "; ".join(sorted(offers)) or "none has joined"
        start = "start a worker with 'posmat worker ADDRESS --machine NAME'"
        raise UsageError(f"no machine offers {device}; {offers}: {start}.")
    return machines


def place(jobs: list[Job], machines: dict, root: Path, every: bool, force: bool) -> list:
    """The jobs that are to run, and an outcome "skipped" for those that are up to date.

    Raises:
        RecordError: a machine's folder is another host's.
    """
    placed: list = []
    for job in jobs:
        ones: list = []
        for name, facts in sorted(machines.items()):
            if job.device in facts["devices"]:
                one = replace(job, machine=QUICK if job.machine == QUICK else name)
                claim_machine(root, one.machine, facts)
                key = job_key(one, root, facts["host_identity"], facts["torch"])
                page = root / "reports" / one.machine / one.device / f"{one.stem}.html"
                stale = force or why_stale(one, root, key)
                ones.append(one if stale else Outcome(one, "skipped", 0.0, page))
        done = [one for one in ones if isinstance(one, Outcome)]
        free = job if job.machine == QUICK else replace(job, machine=ANY)
        placed += ones if every else done[:1] or [free]
    return placed


class Cluster:
    """Jobs sent to workers as they become free, and what comes back kept in the project."""

    def __init__(self, client: Client, root: Path, progress: Progress):
        self.client, self.root, self.progress = client, root, progress
        self.run = f"posmat-{uuid.uuid4().hex[:12]}"
        self.arrived: queue.Queue = queue.Queue()  # of events, as dicts, and of ended futures
        self.sent: dict[int, tuple[Job, Future]] = {}
        self.shown: dict[int, tuple[str, Progress, ExitStack]] = {}
        self.seen: dict = defaultdict(time.monotonic)  # when a resource was last offered

    def run_all(self, jobs: list) -> list[Outcome]:
        """Run the jobs among jobs and outcomes; a stop leaves the rest not started."""
        ended = {at: one for at, one in enumerate(jobs) if isinstance(one, Outcome)}
        waiting = {at: one for at, one in enumerate(jobs) if at not in ended}
        self.client.subscribe_topic(self.run, lambda event: self.arrived.put(event[1]))
        self.total, looked = len(jobs), 0.0
        try:
            while waiting or self.sent:
                if self.client.status != "running":
                    raise ConnectionError
                if time.monotonic() - looked > LOOK_S:
                    workers = self.client.scheduler_info()["workers"].values()
                    slots = Counter(name for worker in workers for name in worker["resources"])
                    looked = time.monotonic()
                    self.seen |= dict.fromkeys(slots, looked)
                for number, job in list(waiting.items()):
                    if self._is_free(job, slots):
                        self._send(number, waiting.pop(number))
                with suppress(queue.Empty):
                    self._take(self.arrived.get(timeout=LOOK_S), ended)
                running = {number: job for number, (job, _) in self.sent.items()}
                for number, job in (waiting | running).items():
                    if any(looked - self.seen[need] > GONE_S for need in _needs(job)):
                        self._forget(number) if number in running else waiting.pop(number)
                        ended[number] = self._fail(job, "no machine offers its device any more")
        except KeyboardInterrupt as error:
            self.progress.say(f"posmat: stopped by {error or 'Ctrl-C'}.", always=True)
            with suppress(Exception):
                self.client.cancel([future for _, future in self.sent.values()])
                self.client.run(end_kernels, self.run, on_error="ignore")
        except (OSError, asyncio.CancelledError):
            text = "the scheduler has gone; what is done is kept, the same command runs the rest"
            self.progress.say(f"posmat: {text}.", always=True)
        left = waiting | {number: self._forget(number) for number in list(self.sent)}
        here = self.root / "reports"
        ended |= {at: Outcome(job, "not started", 0.0, here) for at, job in left.items()}
        return [ended[number] for number in range(len(jobs))]

    def _is_free(self, job: Job, slots: Counter) -> bool:
        taken = Counter(need for other, _ in self.sent.values() for need in _needs(other))
        return all(slots[need] > taken[need] for need in _needs(job))

    def _send(self, number: int, job: Job) -> None:
        key, text = f"{self.run}-{number}", job.notebook.read_bytes()

        async def lose_once(dask_scheduler):  # goes out by value: a scheduler needs no posmat
            while key not in dask_scheduler.tasks:
                await asyncio.sleep(0.01)
            # As if it had lost all its workers but one already: the next is the last.
            dask_scheduler.tasks[key].suspicious = max(0, dask_scheduler.allowed_failures - 1)

        needs = dict.fromkeys(_needs(job), 1)
        words = (job, text, self.run, number)
        future = self.client.submit(run_there, *words, key=key, resources=needs, pure=False)
        self.sent[number] = job, future
        self.client.run_on_scheduler(lose_once)
        future.add_done_callback(self.arrived.put)

    def _take(self, found: dict | Future, ended: dict[int, Outcome]) -> None:
        """An event moves the progress; an ended future is kept and released at once.

        A result that dask still holds would be computed again when its worker dies.
        """
        event = isinstance(found, dict)
        number = found["number"] if event else int(found.key.rpartition("-")[2])
        if number in self.sent and event:
            self._show(number, found["machine"], found["cell"])
        elif number in self.sent:
            if found.status not in ("finished", "error"):
                raise ConnectionError
            ended[number] = self._keep(self.sent[number][0], found)
            self._forget(number)
            if ended[number].stopped:
                raise KeyboardInterrupt("a signal")

    def _keep(self, job: Job, future: Future) -> Outcome:
        """Put a job's files into their places, or say why there are none."""
        try:
            outcome, files, facts = future.result()
            require_same(facts, outcome.job.machine)  # it may have joined since
            outcome = replace(outcome, job=replace(outcome.job, notebook=job.notebook))
            claim_machine(self.root, outcome.job.machine, facts)
            with scratch_folder(self.root / SCRATCH) as scratch:
                for name, content in files.items():
                    (scratch / name).write_bytes(content)
                outcome = keep_results(outcome, scratch, self.root)
        except KilledWorker:
            return self._fail(job, "two workers were lost while it ran; it is given up")
        except Exception as error:  # of the worker, too; the other jobs go on
            return self._fail(job, str(error))
        if outcome.message:
            self.progress.say(f"posmat: {outcome.job.machine}: {outcome.message}", always=True)
        return outcome

    def _fail(self, job: Job, why: str) -> Outcome:
        self.progress.say(f"posmat: {job.title} ({job.machine}) failed: {why}", always=True)
        return Outcome(job, "failed", 0.0, self.root / "reports", why)

    def _forget(self, number: int) -> Job:
        """Release a job's future and end its line of progress."""
        job, future = self.sent.pop(number)
        with suppress(Exception):
            future.release()
        if number in self.shown:
            self.shown.pop(number)[2].close()
        return job

    def _show(self, number: int, machine: str, cell: list) -> None:
        job = self.sent[number][0]
        if cell and number in self.shown:
            self.shown[number][1].cell(*cell)
        elif cell:
            self.progress.say(f"{job.title} ({machine}) {cell[2]}")
        else:
            if number in self.shown:
                self.shown[number][2].close()
                lost = f"{job.title} lost its worker on {self.shown[number][0]}"
                self.progress.say(f"posmat: {lost}; it runs again on {machine}", always=True)
            own, line = Progress(self.progress.quiet, self.progress.stream), ExitStack()
            own.terminal = False  # jobs do not share one refreshed line
            last = provenance(replace(job, machine=machine), self.root).get("duration_s")
            label = f"[{number + 1}/{self.total}] {job.title} ({machine})"
            line.enter_context(own.of(label, last and last * job.runs))
            self.shown[number] = machine, own, line


def _needs(job: Job) -> list[str]:
    """The resources that a job's worker has: its device, and its machine where that is settled."""
    return [job.device] + [f"{job.device}@{job.machine}"] * (job.machine not in (ANY, QUICK))
