"""Many machines: dask's workers, what a job does in one, and who sends the jobs and keeps the rest.

A notebook's text goes out, its files come back as bytes; no disk is shared. A worker's name says
what it is: NAME-cpu is the CPU of the machine NAME. It runs one job at a time in its own process,
which takes its kernel with it. dask would hand out all jobs at once and blame a worker's death on
all that wait for it: here a job leaves for a worker that is free, and where that is lost, again.
"""

import asyncio
import getpass
import logging
import os
import tempfile
import time
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import dask
import psutil
from distributed import CancelledError, Client, Future, Nanny, wait

from posmat.machine import host_identity, processor_name
from posmat.measure.files import SCRATCH, RecordError, claim_machine, scratch_folder
from posmat.report import UsageError
from posmat.report.freshness import PACKAGE, hash_of_modules, job_key, why_stale
from posmat.report.jobs import Job, Outcome, Say, about, alone, keep_results, run_in_folder

ANY = "any"  # the machine of a job that no machine has taken yet
ANSWERS_S = 5  # a scheduler that is there answers by then
JOIN_S = 60  # a first worker, who may be starting just now, has joined by then
FETCH_S = 300  # a worker that is there has handed out a job's files by then
LOOK_S = 2  # between two looks at who is there
GONE_S = 15  # a device that nobody has offered for so long does not come back
NO_SCHEDULER = "no scheduler answers at {}: start one with 'dask scheduler', or give its address."

# dask watches itself, which costs 8 % of a core by default: too much for a machine that is timed.
# And its nanny sets OMP_NUM_THREADS=1 and malloc's trimming, which would change what is measured.
QUIET = {
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "60s",
    "distributed.admin.tick.interval": "60s",
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.system-monitor.gil.enabled": False,
}


async def offer(address: str, machine: str, devices: list[str]) -> None:
    """Be a worker for each device of this host, in a process of its own, until one ends.

    dask's nanny starts one again that was killed, and lets none outlive this process.
    """
    local = address.rpartition("//")[2].startswith(("127.", "localhost", "[::1]"))
    own = {"nthreads": 1, "memory_limit": 0, "death_timeout": JOIN_S}
    own["host"] = "127.0.0.1" if local else None
    try:
        with dask.config.set(QUIET):
            async with AsyncExitStack() as stack:
                nannies = [Nanny(address, name=f"{machine}-{device}", **own) for device in devices]
                try:
                    for nanny in nannies:
                        await stack.enter_async_context(nanny)
                except Exception:  # dask's own are of many kinds
                    raise UsageError(NO_SCHEDULER.format(address)) from None
                ends = [asyncio.create_task(nanny.finished()) for nanny in nannies]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:  # a nanny that is interrupted may leave a worker that hears nothing
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def installation() -> dict[str, str]:
    """What must be the same where jobs are sent from and where they run, and whose host this is."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    code = hash_of_modules(sorted(".".join(one.parts) for one in paths if one.parts[0] != "tests"))
    same = {"posmat": f"{version('posmat')} (code {code[:8]})", "torch": version("torch")}
    return same | {"host_identity": host_identity(), "processor": processor_name()}


def require_same(found: dict[str, str], machine: str) -> None:
    """Refuse a machine with other code or another PyTorch than this one, with UsageError."""
    own = installation()
    for what in ("posmat", "torch"):
        # 2.13.0+cpu and 2.13.0+cu130 are builds of one version.
        if found[what].partition("+")[0] != own[what].partition("+")[0]:
            raise UsageError(
                f"{machine} has {what} {found[what]} and this machine has {what} {own[what]}: "
                "install the same on both, and start the worker again."
            )


def run_there(job: Job, text: bytes) -> tuple[Outcome, dict, dict]:
    """Run a job in this worker's process; its outcome, its files, and who ran it."""
    facts = installation()
    temporary = Path(tempfile.gettempdir()) / f"{SCRATCH}-{getpass.getuser()}"
    with scratch_folder(temporary) as scratch:
        source, results = scratch / job.source.name, scratch / "results"
        source.write_bytes(text)
        job = replace(job, source=source, root=scratch)
        with alone(job):
            outcome = run_in_folder(job, results, job_key(job))
        files = results.iterdir() if results.is_dir() else ()
        return outcome, {path.name: path.read_bytes() for path in files}, facts


@contextmanager
def connected(address: str):
    """Give a client of the scheduler, or raise UsageError where none answers."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # what it logs is said here
    try:
        client = Client(address, timeout=ANSWERS_S)
    except (OSError, ValueError):
        raise UsageError(NO_SCHEDULER.format(address)) from None
    try:
        yield client
    finally:
        with suppress(Exception):  # the scheduler may have gone
            client.close(timeout=2)


def workers_of(client: Client) -> dict[str, tuple[str, str]]:
    """The machine and the device of each worker that has joined, by its address."""
    joined = client.scheduler_info(n_workers=-1)["workers"]
    names = {address: str(worker["name"]).rpartition("-") for address, worker in joined.items()}
    return {at: (name[0], name[2]) for at, name in names.items() if name[2] in ("cpu", "cuda")}


def await_machines(client: Client, device: str, say: Say) -> dict[tuple[str, str], dict]:
    """Who runs each device of each machine, by the two names; a first worker is waited for.

    UsageError where nobody offers the device, or a worker has another posmat or PyTorch than here.
    """
    try:
        if not workers_of(client):
            say(f"posmat: no worker has joined yet; one is awaited for up to {JOIN_S} s.")
            with suppress(TimeoutError):  # what is not there is told as for any other device
                client.wait_for_workers(1, timeout=JOIN_S)
    except OSError:
        raise RecordError("the scheduler has gone.") from None
    machines, workers = {}, workers_of(client)
    found = client.run(installation, workers=[*workers], on_error="return")
    for address, place in workers.items():
        facts = found.get(address)
        if not isinstance(facts, dict):  # of an older posmat, for one
            raise UsageError(f"the worker of {place[0]} at {address} does not answer: {facts}")
        require_same(facts, place[0])
        machines[place] = facts
    if not machines or device not in ("all", *(offered for _, offered in machines)):
        offers = "; ".join(f"{name} has {offered}" for name, offered in sorted(machines))
        raise UsageError(
            f"no machine offers {device}; {offers or 'none has joined'}: start a worker with "
            "'posmat worker ADDRESS --machine NAME'."
        )
    return machines


def place(jobs: list[Job], machines: dict, every: bool, force: bool) -> list[Job | Outcome]:
    """The jobs that are to run, and an outcome "skipped" for those that are up to date."""
    placed: list[Job | Outcome] = []
    for job in jobs:
        ones = []
        for machine in sorted(name for name, device in machines if device == job.device):
            facts, one = machines[machine, job.device], replace(job, machine=machine)
            claim_machine(job.root, machine, facts)
            key = job_key(one, facts["host_identity"], facts["torch"])
            stale = force or why_stale(one, key)
            ones.append(one if stale else Outcome(one, "skipped", 0.0, one.report("html")))
        done = [one for one in ones if isinstance(one, Outcome)]
        placed += ones if every else done[:1] or [replace(job, machine=ANY)]
    return placed


def run_all(client: Client, jobs: list[Job | Outcome], say: Say) -> list[Outcome]:
    """Run the jobs among jobs and outcomes; a stop leaves the rest not started."""
    ended = {at: one for at, one in enumerate(jobs) if isinstance(one, Outcome)}
    waiting = {at: one for at, one in enumerate(jobs) if at not in ended}
    sent: dict[str, tuple[int, Job, Future]] = {}  # by the worker's address
    lost: set[int] = set()  # the jobs that have lost a worker
    seen = dict.fromkeys(waiting, time.monotonic())  # when a job's device was last offered
    try:
        while waiting or sent:
            workers = workers_of(client)
            if client.status != "running" or any(one.cancelled() for *_, one in sent.values()):
                raise ConnectionError
            for address, (at, job, future) in list(sent.items()):
                if future.done():
                    ended[at] = _keep(job, future)
                elif address in workers:
                    continue
                elif at in lost:
                    ended[at] = _fail(job, "two workers were lost while it ran")
                else:
                    lost.add(at)
                    waiting[at] = jobs[at]
                    text = f"{job.title} lost its worker on {job.machine}; it runs again"
                    say(f"posmat: {text}.", always=True)
                # What dask still holds would be computed again when its worker dies.
                sent.pop(address)[2].release()
                if at in ended and ended[at].message:
                    say(f"posmat: {job.machine}: {ended[at].message}", always=True)
            for address, (machine, device) in workers.items():
                wanted = {(device, ANY), (device, machine)}
                fit = [at for at, job in waiting.items() if (job.device, job.machine) in wanted]
                seen |= dict.fromkeys(fit, time.monotonic())
                if fit and address not in sent:
                    job = replace(waiting.pop(fit[0]), machine=machine)
                    say(f"[{fit[0] + 1}/{len(jobs)}] {job.title} ({machine}){about(job)}")
                    words = job, job.source.read_bytes()
                    future = client.submit(run_there, *words, workers=address, pure=False)
                    sent[address] = fit[0], job, future
            for at in [at for at in waiting if time.monotonic() - seen[at] > GONE_S]:
                ended[at] = _fail(waiting.pop(at), "no machine offers its device any more")
                say(f"posmat: {ended[at].message}", always=True)
            if sent:
                with suppress(TimeoutError):
                    wait([one for *_, one in sent.values()], LOOK_S, "FIRST_COMPLETED")
            elif waiting:
                time.sleep(LOOK_S)
    except KeyboardInterrupt as error:
        say(f"posmat: stopped by {error or 'Ctrl-C'}.", always=True)
        with suppress(Exception):  # a worker ends and its kernel with it, and another is started
            client.cancel([one for *_, one in sent.values()])
            client.run(os._exit, 1, workers=[*sent], on_error="ignore")
    except (OSError, CancelledError, asyncio.CancelledError):
        text = "the scheduler has gone; what is done is kept, the same command runs the rest"
        say(f"posmat: {text}.", always=True)
    left = {at: Outcome(jobs[at], "not started", 0.0, jobs[at].reports) for at in waiting}
    left |= {at: Outcome(job, "not started", 0.0, job.reports) for at, job, _ in sent.values()}
    return [(left | ended)[at] for at in range(len(jobs))]


def _keep(job: Job, future: Future) -> Outcome:
    """Put a job's files into their places, or say why there are none."""
    try:
        outcome, files, facts = future.result(timeout=FETCH_S)
        require_same(facts, job.machine)  # it may have joined since
        claim_machine(job.root, job.machine, facts)
        with scratch_folder(job.root / SCRATCH) as scratch:
            for name, content in files.items():
                (scratch / name).write_bytes(content)
            return keep_results(replace(outcome, job=job), scratch)
    except Exception as error:  # of the worker, too; the other jobs go on
        return _fail(job, str(error) or type(error).__name__)


def _fail(job: Job, why: str) -> Outcome:
    return Outcome(job, "failed", 0.0, job.root / "reports", f"{job.title} failed: {why}")
