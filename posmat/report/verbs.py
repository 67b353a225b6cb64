"""The verbs that read what is there: draw, check, cite. None of them runs a notebook."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from posmat.report.cite import cite_software, tell_figure
from posmat.report.derive import SUMMARY, check_summary, compare, derive, orphans, write
from posmat.report.freshness import older_sources
from posmat.report.gallery import render_pages
from posmat.report.store import KINDS, OWN, chosen, find_drawings, find_results, unknown_commits

Root = Callable[[], Path]  # gives the project's folder
NO_ROWS = "there are no rows in data/: run 'posmat report' first."
WORKERS = min(4, os.cpu_count() or 1)


def redraw(
    root: Path, asked: list[str] | None = None, workers: int = 1, machine: str | None = None
) -> tuple[str, list[str]]:
    """Draw figures, tables, pages and the README's figures; what was drawn, and what was not.

    With `asked`, figures' ids or pictures' names, these figures alone; with `machine` what belongs
    to it. For a user's own (local, quick) nothing that git tracks is written.
    """
    from posmat.charts.style import counted  # which loads matplotlib

    results = find_results(root)
    mine = [one for one in results if machine in (None, one.machine)]
    if not mine:
        there = ", ".join(dict.fromkeys(one.machine for one in results))
        why = f"data/ has no rows of the machine {machine!r}: there are {there}."
        return "", [why if results else NO_ROWS]
    drawings = find_drawings(mine)
    if asked:
        drawings = chosen(drawings, asked)
        results = list(dict.fromkeys(one.run for one in drawings))
    derived = derive(results, {one.name for one in drawings}, workers)
    figures = {one.picture(kind) for one in drawings for kind in KINDS} & derived.files.keys()
    tables = {one.report("table.csv") for one in mine if not asked} & derived.files.keys()
    write({path: derived.files[path] for path in figures | tables})
    said = counted(len(figures) // len(KINDS), "figure")
    if asked:
        return said, derived.problems
    pages, bad = render_pages(root, derived.said, results, machine if machine in OWN else None)
    write(pages)
    shown = [str(page) for page in pages if page.suffix == ".html"]
    said += f", {counted(len(tables), 'table')}, {counted(2 * len(shown), 'page')} drawn. Open:"
    return "\n  ".join([said, *shown]), derived.problems + bad


def check_project(
    root: Path, published: bool = False, workers: int = 1
) -> tuple[list[str], list[str], list[str]]:
    """Lines of what does not hold, of what older sources made, and of what else is to be known."""
    results = find_results(root, published)
    if not results:
        return [NO_ROWS], [], []
    derived = derive(results, workers=workers)
    problems, notes = derived.problems + compare(derived.files, root), []
    if not problems:  # a page shows all of that, and is judged when it holds
        pages, problems = render_pages(root, derived.said, results)
        problems += compare(pages, root)
    for result in results:
        if result.notebook == SUMMARY:
            bad, known = check_summary(result, results)
            problems, notes = problems + bad, notes + known
    problems += orphans(root, results, published)
    return problems, older_sources(results), notes + unknown_commits(root, results)


@click.command(short_help="draw every figure, table and page again from data/")
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--machine", metavar="NAME", help="only what is this machine's (local: your own)")
@click.pass_obj
def draw(root: Root, figures: tuple[str, ...], machine: str | None) -> int:
    """Draw figures, tables and gallery pages from data/ alone: no notebook runs.

    FIGURE is an id, or id-machine-device; all of them without one.
    """
    said, problems = redraw(root(), [*figures], WORKERS, machine)
    if said:
        print(said)
    return _tell(problems)


@click.command(short_help="whether figures, tables, pages and provenance belong to their rows")
@click.option("--strict", is_flag=True, help="rows of older sources are a failure too")
@click.option("--published", is_flag=True, help="leave out your own runs (local, quick)")
@click.pass_obj
def check(root: Root, strict: bool, published: bool) -> int:
    """Derive again and compare, one line for each file that does not hold."""
    problems, older, notes = check_project(root(), published, WORKERS)
    for line in notes:
        print(f"posmat: {line}")
    for line in older:
        print(f"posmat: {line}", file=sys.stderr if strict else sys.stdout)
    if not problems:
        print("Figures, tables, pages and provenance belong to the rows beside them.")
    return _tell(problems) or int(strict and bool(older))


@click.command(short_help="how to cite posmat, or one of its figures")
@click.argument("figure", required=False)
@click.pass_obj
def cite(root: Root, figure: str | None) -> int:
    """Without FIGURE the software; with it caption, path and BibTeX of the figure.

    FIGURE is an id, or id-machine-device.
    """
    if figure is None:
        print(cite_software(root()))
        return 0
    found = chosen(find_drawings(find_results(root())), [figure])
    published = [one for one in found if one.run.machine not in OWN]
    entries, problems = [], []
    for drawing in published or found:
        derived = derive([drawing.run])
        if drawing in derived.said:
            entries.append(tell_figure(drawing, derived.said[drawing]))
        else:
            problems += derived.problems
    if entries:
        print("\n\n".join(entries))
    return _tell(problems)


def _tell(problems: list[str]) -> int:
    """Say each problem on a line; the exit code."""
    for problem in problems:
        print(f"posmat: {problem}", file=sys.stderr)
    return 1 if problems else 0
