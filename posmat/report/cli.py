"""The command `posmat`: what a person types, checked, and what went wrong in one sentence."""

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import click
from tqdm import tqdm

from posmat.measure.files import ALL_DEVICES, LOCAL, QUICK, RecordError, project_root
from posmat.report import UsageError
from posmat.report.verbs import check, cite, draw, redraw

FAILED, WRONG_USE = 1, 2
_DEVICES = click.Choice(["cpu", "cuda", "all"])
_COUNT = click.IntRange(1)
_SIGNALS = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 a failure, 2 a wrong use."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what is said has signs that not every system has
            stream.reconfigure(encoding="utf-8", errors=stream.errors)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        return verbs.main(words, "posmat", standalone_mode=False)
    except click.UsageError as error:
        wrong, where = error.format_message().rstrip("."), error.ctx.command_path
        code, text = WRONG_USE, f"{wrong}; see {where} --help."
    except UsageError as error:
        code, text = WRONG_USE, error
    except (RecordError, KeyError) as error:
        code, text = FAILED, error.args[0]
    except ModuleNotFoundError as error:
        code, text = WRONG_USE, f"{error.name} is missing: pip install 'posmat[cluster]' has dask."
    except click.Abort as error:
        code, text = FAILED, f"stopped by {error.__cause__ or 'Ctrl-C'}."
    print(f"posmat: {text}", file=sys.stderr)
    return code


def _stop(number: int, frame) -> None:
    """Stop as for Ctrl-C; the signals after the first change nothing."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name.replace("SIGINT", "Ctrl-C"))


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def verbs(context: click.Context) -> None:
    """The positive matrix product: run the notebooks, keep the rows."""
    context.obj = _root  # the verbs are told where the project is when they ask


@verbs.result_callback()
def end(code: int) -> int:
    """Flush while click hears that whoever read the output has gone, `head` for one."""
    sys.stdout.flush()
    return code


for verb in (draw, check, cite):
    verbs.add_command(verb)


class Progress(tqdm):
    """What runs, on stderr: lines that stay and, on a terminal, the cell that is running."""

    def __init__(self, quiet: bool = False):
        off = True if quiet else None  # None: where stderr is no terminal
        super().__init__(bar_format="  {desc}", leave=False, dynamic_ncols=True, disable=off)
        self.quiet = quiet

    def say(self, text: str, always: bool = False) -> None:
        """One line that stays."""
        self.set_description_str("", refresh=False)
        if always or not self.quiet:
            self.write(text, file=sys.stderr)

    def tell(self, number: int, total: int, line: str) -> None:
        """A cell begins."""
        self.set_description_str(f"cell {number} of {total} ({line})")


@verbs.command(short_help="run notebooks and keep their rows, tables and figures")
@click.argument("notebooks", nargs=-1, metavar="[NOTEBOOK]...")
@click.option("--device", type=_DEVICES, default="all", help="all: the CPU, and CUDA if there")
@click.option(
    "-p",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="a parameter of the notebook; NAME=A,B,C is a grid, a run for each, except where the "
    "default has a comma itself; giving -p again adds values",
)
@click.option("--parameters", "show_parameters", is_flag=True, help="list them, run nothing")
@click.option("--machine", default=LOCAL, metavar="NAME", help="publish under this name")
@click.option("--quick", is_flag=True, help="small sizes, into folders of their own (quick)")
@click.option("--runs", type=_COUNT, default=1, metavar="N", help="fresh processes, rows pooled")
@click.option("--force", is_flag=True, help="run what is up to date, too")
@click.option("--cell-timeout", type=_COUNT, metavar="SECONDS", help="that a cell may take")
@click.option("--scheduler", metavar="ADDRESS", help="of dask, tcp://host:8786: run on its workers")
@click.option("--every-machine", is_flag=True, help="with --scheduler: each job on each machine")
@click.option("--quiet", is_flag=True, help="tell failures and the last line only")
def report(**words) -> int:
    """Run notebooks headless, all or those named by number (05) or name.

    Each goes into data/ and reports/ when it succeeded; without --machine the run is your own
    (local) and git ignores it. One that is up to date is not run again.
    """
    asked = SimpleNamespace(**words)
    from posmat.report import jobs  # papermill takes half a second to load

    root = _root()
    _check_name(asked.machine)
    if (asked.machine != LOCAL) + asked.quick + bool(asked.scheduler) > 1:
        raise UsageError(
            "--machine, --quick and --scheduler exclude each other: each says whose the folders of "
            "the results are. Workers are named with 'posmat worker ADDRESS --machine NAME'."
        )
    if asked.every_machine and not asked.scheduler:
        raise UsageError("--every-machine needs --scheduler ADDRESS: which machines, otherwise?")
    notebooks = jobs.find_notebooks(root / "notebooks", asked.notebooks)
    if asked.show_parameters:
        tables = [_table_of(one.stem, jobs.declared_by(one).values()) for one in notebooks]
        print(*tables, sep="\n\n")
        return 0

    def plan(devices: list[str]) -> list[jobs.Job]:
        machine = QUICK if asked.quick else asked.machine
        words = asked.parameters, asked.runs, asked.cell_timeout
        return jobs.plan(notebooks, devices, machine, *words)

    with Progress(asked.quiet) as progress:
        if asked.scheduler:
            outcomes = _run_on_cluster(asked, plan, progress)
        else:
            planned = plan(jobs.devices_here(asked.device, progress.say))
            outcomes = _run_all(planned, asked.force, progress)
    return _conclude(outcomes, root, asked.quiet)


def _check_name(machine: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", machine):
        raise UsageError(
            f"--machine {machine!r} is no name: use small letters, digits, '.', '_' and '-'."
        )
    # reports/figures is every machine's, and git ignores figures of names that end as its own do.
    kept = (QUICK, "published", "any", ALL_DEVICES, "figures")
    if machine in kept or machine.endswith((f"-{LOCAL}", f"-{QUICK}")):
        raise UsageError(f"--machine {machine} is a name that posmat keeps for itself.")


def _root() -> Path:
    root = project_root()
    if root is None:
        raise UsageError(
            "the notebooks are not beside this package: install it from a checkout with pip's -e."
        )
    return root


def _table_of(notebook: str, parameters: Iterable) -> str:
    """The parameters of a notebook as a table to read."""
    lines = [("name", "type", "default", "meaning")]
    lines += [(one.name, one.type, repr(one.default), one.meaning) for one in parameters]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n  ".join([notebook, *rows])


def _run_all(planned: list, force: bool, progress: Progress, stopped: bool = False) -> list:
    """Run jobs one after the other; after a signal the rest is not started."""
    from posmat.report.jobs import Outcome, run_job

    outcomes = []
    for number, job in enumerate(planned, 1):
        outcome = Outcome(job, "not started", 0.0, job.reports)
        label = f"[{number}/{len(planned)}] {job.title} ({job.machine})"
        try:
            if not stopped:
                outcome = run_job(job, force, label, progress.say, progress.tell)
                stopped = outcome.stopped
        except KeyboardInterrupt as error:
            progress.say(f"posmat: stopped by {error or 'Ctrl-C'}.", always=True)
            stopped = True
        if outcome.message:
            progress.say(f"posmat: {outcome.message}", always=True)
        outcomes.append(outcome)
    return outcomes


def _run_on_cluster(asked: SimpleNamespace, plan, progress: Progress) -> list:
    """Run the jobs on workers; a notebook that reads rows reads them here, at the end."""
    from posmat.report import cluster

    with cluster.connected(asked.scheduler) as client:
        machines = cluster.await_machines(client, asked.device, progress.say)
        there = sorted({device for _, device in machines})
        planned = plan(there if asked.device == "all" else [asked.device])
        sent = [job for job in planned if job.device != ALL_DEVICES]
        placed = cluster.place(sent, machines, asked.every_machine, asked.force)
        outcomes = cluster.run_all(client, placed, progress.say)
    here = [job for job in planned if job.device == ALL_DEVICES]
    stopped = any(outcome.state == "not started" for outcome in outcomes)
    return outcomes + _run_all(here, asked.force, progress, stopped)


def _conclude(outcomes: list, root: Path, quiet: bool) -> int:
    """Draw what is new, say what became of the jobs, and return the exit code."""
    counts = Counter(outcome.state for outcome in outcomes)
    stopped = counts["not started"] or any(outcome.stopped for outcome in outcomes)
    pages, problems = [], []
    undrawn = "{} is not drawn ({}); its rows are kept: 'posmat draw' draws it."
    for machine in dict.fromkeys(one.job.machine for one in outcomes if one.state == "done"):
        if stopped:
            problems.append(undrawn.format(machine, "stopped"))
            continue
        try:
            said, bad = redraw(root, machine=machine)
            pages += filter(None, [said])
            problems += bad
        except (OSError, KeyboardInterrupt) as error:  # a full disk, or a signal
            problems.append(undrawn.format(machine, error))
    if not quiet:
        _print_table(outcomes)
        print(*pages, sep="\n", end="\n" * bool(pages))
    for problem in problems:
        print(f"posmat: {problem}", file=sys.stderr)
    states = ["done", "failed", "skipped", *["not started"] * bool(counts["not started"])]
    failed = [str(outcome.path) for outcome in outcomes if outcome.state == "failed"]
    place = os.path.commonpath(failed or [str(outcome.path) for outcome in outcomes])
    print(", ".join(f"{counts[state]} {state}" for state in states) + f". Look at {place}")
    return FAILED if failed or stopped or problems else 0


def _print_table(outcomes: list) -> None:
    width = max(len("notebook"), *(len(outcome.job.stem) for outcome in outcomes)) + 2
    print(f"{'notebook':<{width}}{'machine':<14}{'device':<8}{'seconds':>8}  state")
    for outcome in outcomes:
        job, state = outcome.job, outcome.state.replace("skipped", "skipped (up to date)")
        line = f"{job.stem:<{width}}{job.machine:<14}{job.device:<8}{outcome.seconds:>8.1f}"
        print(f"{line}  {state}", *outcome.warnings, sep="\n  ")
    looked_at = [outcome.path for outcome in outcomes if outcome.state in ("done", "failed")]
    print("", *(f"  {path}" for path in looked_at), sep="\n")


@verbs.command(short_help="offer this machine's devices to a dask scheduler")
@click.argument("address")
@click.option("--machine", required=True, metavar="NAME", help="its name in all results")
@click.option("--device", type=_DEVICES, default="all")
def worker(address: str, machine: str, device: str) -> int:
    """Start dask's own worker for each device of this machine, at ADDRESS: tcp://host:8786.

    A scheduler runs what it is sent: join one that you trust.
    """
    from posmat.report import cluster
    from posmat.report.jobs import devices_here

    _check_name(machine)
    asyncio.run(cluster.offer(address, machine, devices_here(device, Progress().say)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
