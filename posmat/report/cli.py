"""The command `posmat`: what a person types, checked, and what went wrong in one sentence."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import click

from posmat.measure.files import ALL_DEVICES, LOCAL, QUICK, RecordError, project_root
from posmat.report.parameters import UsageError
from posmat.report.verbs import check, cite, draw, redraw

DONE, FAILED, WRONG_USE = 0, 1, 2
_DEVICES = click.Choice(["cpu", "cuda", "all"])


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 a failure, 2 a wrong use."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what is said has signs that not every system has
            stream.reconfigure(encoding="utf-8", errors=stream.errors)
    words = list(sys.argv[1:] if words is None else words)
    try:
        with verbs.make_context("posmat", words) as context:
            code = verbs.invoke(context)
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as done:  # --help
        return done.exit_code
    except UsageError as error:
        print(f"posmat: {error}", file=sys.stderr)
        return WRONG_USE
    except click.UsageError as error:
        wrong, where = error.format_message().rstrip("."), error.ctx.command_path
        print(f"posmat: {wrong}; see {where} --help.", file=sys.stderr)
        return WRONG_USE
    except (RecordError, KeyError) as error:
        print(f"posmat: {error.args[0]}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as error:
        print(f"posmat: stopped by {error or 'Ctrl-C'}.", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read the output has gone, `head` for one
        # Python flushes once more as it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def verbs(context: click.Context) -> None:
    """The positive matrix product: run the notebooks, keep the rows."""
    context.obj = _root  # the verbs are told where the project is when they ask


for verb in (draw, check, cite):
    verbs.add_command(verb)


@verbs.command(short_help="run notebooks and keep their rows, tables and figures")
@click.argument("notebooks", nargs=-1, metavar="[NOTEBOOK]...")
@click.option(
    "--device",
    type=_DEVICES,
    default="all",
    help="all: the CPU, and CUDA where there is a device (default)",
)
@click.option(
    "-p",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="a parameter of the notebook (see --parameters); NAME=A,B,C is a grid, a run for each. A "
    "comma that belongs to the value is written '\\,', except where the default has one; giving -p "
    "again adds values",
)
@click.option("--parameters", "show_parameters", is_flag=True, help="list them, run nothing")
@click.option(
    "--machine",
    default=LOCAL,
    metavar="NAME",
    help="publish under this name; without it the run is your own (local) and git ignores it",
)
@click.option("--quick", is_flag=True, help="small sizes, into folders of their own (quick)")
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="repeat each notebook in N fresh kernels and pool their rows",
)
@click.option("--force", is_flag=True, help="run what is up to date, too")
@click.option(
    "--cell-timeout",
    type=click.IntRange(1),
    metavar="SECONDS",
    help="a cell that takes longer is a failure",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="run on the workers of this dask scheduler (tcp://host:8786), under their names",
)
@click.option(
    "--every-machine",
    is_flag=True,
    help="with --scheduler: each job once on every machine that has its device",
)
@click.option("--quiet", is_flag=True, help="tell failures and the last line only")
def report(**words) -> int:
    """Run notebooks headless, all or those named by number (05) or name.

    Each goes into data/ and reports/ when it succeeded. One that is up to date is not run again.
    """
    asked = SimpleNamespace(**words)
    from posmat.report import runner  # papermill takes half a second to load
    from posmat.report.parameters import table_of
    from posmat.report.progress import Progress
    from posmat.report.signals import stoppable

    root = _root()
    machine = QUICK if asked.quick else asked.machine
    _check_name(asked.machine)
    if asked.quick and asked.machine != LOCAL:
        raise UsageError("--quick runs are not published: give --machine or --quick, not both.")
    given = [_pair(text) for text in asked.parameters]
    _check_cluster(asked)
    notebooks = runner.find_notebooks(root / "notebooks", asked.notebooks)
    if asked.show_parameters:
        print("\n\n".join(table_of(notebook) for notebook in notebooks))
        return DONE

    def plan(devices: list[str]) -> list:
        return runner.plan(notebooks, devices, machine, given, asked.runs, asked.cell_timeout)

    progress = Progress(asked.quiet)
    with stoppable():
        if asked.scheduler:
            outcomes = _run_on_cluster(asked, plan, root, progress)
        else:
            jobs = plan(runner.devices_asked(asked.device))
            jobs = runner.without_absent_cuda(jobs, root, asked.device, asked.force, progress)
            outcomes = _run_all(jobs, root, asked.force, progress)
        return _conclude(outcomes, root, asked.quiet)


def _conclude(outcomes: list, root: Path, quiet: bool) -> int:
    """Draw what is new, say what became of the jobs, and return the exit code."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    left = _count(outcomes, "not started")
    stopped = bool(left) or any(outcome.stopped for outcome in outcomes)
    pages, problems = _draw_what_is_new(outcomes, root, stopped)
    if not quiet:
        _print_table(outcomes)
        print(*pages, sep="\n", end="\n" * bool(pages))
    for problem in problems:
        print(f"posmat: {problem}", file=sys.stderr)
    counts = [f"{_count(outcomes, state)} {state}" for state in ("done", "failed", "skipped")]
    if left:
        counts.append(f"{left} not started")
    paths = [str(outcome.path) for outcome in failed or outcomes]
    print(f"{', '.join(counts)}. Look at {os.path.commonpath(paths)}")
    return FAILED if failed or stopped or problems else DONE


def _run_all(jobs: list, root: Path, force: bool, progress) -> list:
    """Run jobs one after the other; after a signal the rest is not started."""
    from posmat.report import runner

    outcomes = []
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.title} ({job.machine})"
        try:
            outcome = runner.run_job(job, root, force=force, label=label, progress=progress)
        except KeyboardInterrupt as error:
            progress.say(f"posmat: stopped by {error or 'Ctrl-C'}.", always=True)
            break
        outcomes.append(outcome)
        if outcome.message:
            progress.say(f"posmat: {outcome.message}", always=True)
        if outcome.stopped:
            break
    return outcomes + [
        runner.Outcome(job, "not started", 0.0, root / "reports" / job.machine / job.device)
        for job in jobs[len(outcomes) :]
    ]


def _check_cluster(asked: SimpleNamespace) -> None:
    if asked.every_machine and not asked.scheduler:
        raise UsageError("--every-machine needs --scheduler ADDRESS: which machines, otherwise?")
    if asked.scheduler and asked.machine != LOCAL:
        raise UsageError(
            "--machine and --scheduler exclude each other: workers have names of their own, "
            "given with 'posmat worker ADDRESS --machine NAME'."
        )
    if asked.every_machine and asked.quick:
        raise UsageError("--quick has one folder for all machines: leave out --every-machine.")


def _run_on_cluster(asked: SimpleNamespace, plan, root: Path, progress) -> list:
    """Run the jobs on workers; a notebook that reads rows reads them here, at the end."""
    try:
        from posmat.report import cluster
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--scheduler needs {error.name}: install it with pip install 'posmat[cluster]'."
        ) from None

    with cluster.connected(asked.scheduler) as client:
        cluster.await_worker(client, progress)
        machines = cluster.machines_of(client, asked.device)
        there = sorted({device for facts in machines.values() for device in facts["devices"]})
        jobs = plan(there if asked.device == "all" else [asked.device])
        sent = [job for job in jobs if job.device != ALL_DEVICES]
        placed = cluster.place(sent, machines, root, asked.every_machine, asked.force)
        outcomes = cluster.Cluster(client, root, progress).run_all(placed)
    here = [job for job in jobs if job.device == ALL_DEVICES]
    if any(outcome.state == "not started" for outcome in outcomes):
        from posmat.report.runner import Outcome

        return outcomes + [Outcome(job, "not started", 0.0, root / "reports") for job in here]
    return outcomes + _run_all(here, root, asked.force, progress)


@verbs.command(short_help="offer this machine's devices to a dask scheduler")
@click.argument("address")
@click.option("--machine", required=True, metavar="NAME", help="its name in all results")
@click.option("--device", type=_DEVICES, default="all")
def worker(address: str, machine: str, device: str) -> int:
    """Start dask's own worker for each device of this machine, at ADDRESS: tcp://host:8786.

    A scheduler runs what it is sent: join one that you trust.
    """
    from posmat.report import runner
    from posmat.report.signals import stoppable
    from posmat.report.worker import start_workers

    _check_name(machine)
    if importlib.util.find_spec("distributed") is None:
        raise UsageError("this needs dask: install it with pip install 'posmat[cluster]'.")
    devices = runner.devices_asked(device)
    if "cuda" in devices:
        try:
            runner.require_cuda()
        except UsageError:
            if device == "cuda":
                raise
            devices.remove("cuda")
    with stoppable():
        return start_workers(address, machine, devices)


def _check_name(machine: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", machine):
        raise UsageError(
            f"--machine {machine!r} is no name: use small letters, digits, '.', '_' and '-'."
        )
    # reports/figures is every machine's, and git ignores figures of names that end as its own do.
    kept = (QUICK, "published", "any", ALL_DEVICES, "figures")
    if machine in kept or machine.endswith((f"-{LOCAL}", f"-{QUICK}")):
        raise UsageError(
            f"--machine {machine} is a name that posmat keeps for itself: give another."
        )


def _draw_what_is_new(outcomes: list, root: Path, stopped: bool) -> tuple[list[str], list[str]]:
    """Bring tables, figures and pages up to date with the rows; what was drawn, what was not.

    That goes by the notes that kept results leave, of this command or of one that was killed.
    """
    from posmat.report.runner import mark_undrawn, undrawn

    machines = dict.fromkeys(outcome.job.machine for outcome in outcomes)
    due = [machine for machine in machines if undrawn(root, machine)]
    told, problems = [], []
    for machine in due * (not stopped):
        try:
            said, bad = redraw(root, machine=machine)
            mark_undrawn(root, machine, due=False)
            told += filter(None, [said])
            problems += bad
        except (OSError, KeyboardInterrupt) as error:  # a full disk, or a signal
            problems.append(f"{machine} is not drawn: {error or 'stopped by Ctrl-C'}.")
    if any(undrawn(root, machine) for machine in due):
        problems.append("what was measured is kept; the next run or 'posmat draw' draws it.")
    return told, problems


def _print_table(outcomes: list) -> None:
    width = max(len("notebook"), *(len(outcome.job.stem) for outcome in outcomes)) + 2
    print(f"{'notebook':<{width}}{'machine':<14}{'device':<8}{'seconds':>8}  state")
    for outcome in outcomes:
        job = outcome.job
        print(
            f"{job.stem:<{width}}{job.machine:<14}{job.device:<8}{outcome.seconds:>8.1f}  "
            f"{outcome.state}{' (up to date)' * (outcome.state == 'skipped')}"
        )
        for warning in outcome.warnings:
            print(f"  {warning}")
    print()
    for outcome in outcomes:
        if outcome.state in ("done", "failed"):
            print(f"  {outcome.path}")


def _count(outcomes: list, state: str) -> int:
    return sum(outcome.state == state for outcome in outcomes)


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UsageError(f"-p {text!r}: write it as NAME=VALUE.")
    return name, value


def _root() -> Path:
    root = project_root()
    if root is None:
        raise UsageError(
            "the notebooks are not beside this package: install it from a checkout with "
            "'pip install -e .', and run posmat there."
        )
    return root


if __name__ == "__main__":
    sys.exit(main())
