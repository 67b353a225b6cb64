"""The verbs that read what is there: draw, check, cite. None of them starts a kernel."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

Root = Callable[[], Path]  # gives the project's folder
NO_ROWS = "there are no rows in data/: run 'posmat report' first."


def redraw(
    root: Path, asked: list[str] | None = None, workers: int = 1, machine: str | None = None
) -> tuple[str, list[str]]:
    """Draw figures, tables, pages and the README's figures; what was drawn, and what was not.

    Args:
        root: the project.
        asked: figures' ids or pictures' names, to draw these alone; pages and tables show all.
        workers: processes that draw.
        machine: draw what belongs to this one. For a user's own (local, quick) nothing that git
            tracks is written, whatever matplotlib draws here.
    """
    from posmat.report.drawing import (
        OWN,
        Library,
        chosen,
        draw_all,
        find_drawings,
        find_results,
        words_of_all,
    )
    from posmat.report.gallery import write_pages, write_readme

    results = find_results(root)
    if not results:
        return "", [NO_ROWS]
    if machine and machine not in {one.machine for one in results}:
        there = ", ".join(dict.fromkeys(one.machine for one in results))
        return "", [f"data/ has no rows of the machine {machine!r}: there are {there}."]
    library = Library(root)
    drawings, problems = find_drawings(results)
    if asked:
        drawn, _, bad = draw_all(chosen(drawings, asked), [], library, workers)
        return _count(len(drawn), "figure"), list(dict.fromkeys(bad))
    own = machine in OWN
    wanted = [one for one in drawings if machine in (None, one.machine)]
    drawn, tables, bad = draw_all(
        wanted,
        [one for one in results if machine in (None, one.machine)],
        library,
        workers,
    )
    problems += bad
    said, bad = words_of_all([one for one in drawings if one not in wanted], library)
    problems += bad
    shown = {one: (drawn | said)[one] for one in drawings if one in drawn or one in said}
    pages = write_pages(root, shown, results, library, machine if own else None)
    if not own:
        problems += write_readme(root, shown)
    counts = (len(drawn), "figure"), (tables, "table"), (len(pages), "page")
    lines = [", ".join(_count(*count) for count in counts) + " drawn. Open:"]
    lines += [f"  {page}" for page in pages if page.suffix == ".html"]
    return "\n".join(lines), list(dict.fromkeys(problems))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@click.command(short_help="draw every figure, table and page again from data/")
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option(
    "--machine", metavar="NAME", help="only what belongs to this machine (local: your own)"
)
@click.pass_obj
def draw(root: Root, figures: tuple[str, ...], machine: str | None) -> int:
    """Draw figures, tables and gallery pages from data/ alone: no kernel runs.

    FIGURE is an id, or id-machine-device; all of them without one.
    """
    said, problems = redraw(root(), [*figures], min(4, os.cpu_count() or 1), machine)
    if said:
        print(said)
    return _tell(problems)


@click.command(
    short_help="whether figures, tables, pages and provenance belong to the rows beside them"
)
@click.option("--strict", is_flag=True, help="rows of older sources are a failure too")
@click.option("--published", is_flag=True, help="leave out your own runs (local, quick)")
@click.pass_obj
def check(root: Root, strict: bool, published: bool) -> int:
    """Derive again and compare, one line for each file that does not hold."""
    from posmat.report.checking import check_project

    problems, older, notes = check_project(root(), published)
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
    from posmat.report import citation

    if figure is None:
        print(citation.cite_software(root()))
        return 0
    from posmat.charts.catalogue import figure_number
    from posmat.report.drawing import (
        OWN,
        Library,
        chosen,
        find_drawings,
        find_results,
        words_of_all,
    )
    from posmat.report.gallery import measured_on

    project = root()
    results, library = find_results(project), Library(project)
    found = chosen(find_drawings(results)[0], [figure])
    published = [one for one in found if one.machine not in OWN]
    said_of, problems = words_of_all(published or found, library)
    for place, (drawing, words) in enumerate(said_of.items()):
        measured, processors = measured_on(drawing, library)
        entry = citation.cite_figure(project, drawing, measured, processors)
        said = citation.tell_figure(drawing, figure_number(drawing.spec.id), words, entry)
        print(("\n" if place else "") + said)
    return _tell(problems)


def _tell(problems: list[str]) -> int:
    """Say each problem in a line of its own; the exit code."""
    for problem in problems:
        print(f"posmat: {problem}", file=sys.stderr)
    return 1 if problems else 0
