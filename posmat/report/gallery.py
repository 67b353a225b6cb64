"""The gallery: what was drawn, on a page for a browser and on one for a code host.

`reports/index.html` and `reports/README.md` show the published machines, `reports/local/` the
user's own runs beside them. Nothing in them is fetched from a network, and nothing tells when they
were made: the same rows give the same bytes.
"""

import os
import re
from functools import cache
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from posmat.measure.files import RecordError, make_folder, replacing
from posmat.report.citation import cite_figure
from posmat.report.drawing import (
    OWN,
    Drawing,
    Library,
    Result,
    Words,
    is_timed,
    page_digest,
    read_provenance,
)

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"

_COLUMNS = ("Machine", "Processor or GPU", "Cores", "Memory", "Threads", "Versions", "Measured")
_BLOCK = re.compile(r"(<!-- posmat:figure (\S+) -->\n)(.*?)(<!-- /posmat:figure -->)", re.DOTALL)
_LINK = re.compile(r'(?:href|src)="([^"#]+)')  # what begins with '#' is on the page itself
_LINK_MD = re.compile(r"\]\(([^)#]+)")
_FOUND = "#What-we-found"  # where a notebook says what its figures show, as Jupyter names it
_LEAD = (
    "Each method was compared with its reference before it was timed. Times are medians over "
    "blocks of calls; a ratio is paired within rounds, and its range is over fresh kernels where "
    "there were several, a 95 % interval otherwise."
)


def write_pages(
    root: Path,
    drawn: dict[Drawing, Words],
    results: list[Result],
    library: Library,
    own: str | None = None,
) -> list[Path]:
    """Write the pages of the published machines and, where there are any, of own runs.

    With `own` (local, quick) only those of these runs.
    """
    pages = render_pages(root, drawn, results, library, own)
    for path, text in pages.items():
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(pages)


def render_pages(
    root: Path,
    drawn: dict[Drawing, Words],
    results: list[Result],
    library: Library,
    own: str | None = None,
) -> dict[Path, str]:
    """The text of each page that `write_pages` writes, by its path."""
    pages = {}
    for folder, shown in pages_of(root, drawn).items():
        if own and folder.name != own:
            continue
        facts = describe_page(folder, shown, drawn, results, library)
        for name in ("index.html", "README.md"):
            pages[folder / name] = _environment().get_template(name).render(facts)
    return pages


def links_of(text: str, page: Path) -> list[Path]:
    """The files that the text of a page links to or shows."""
    form = _LINK if page.suffix == ".html" else _LINK_MD
    targets = dict.fromkeys(unescape(found) for found in form.findall(text))
    return [page.parent / unquote(target) for target in targets if ":" not in target]


def pages_of(root: Path, drawn) -> dict[Path, list[Drawing]]:
    """The folders that get pages, each with what it shows; a user's own before the published."""
    published = [one for one in drawn if one.machine not in OWN]
    pages = {root / "reports": published} if published else {}
    for own in OWN:
        mine = [one for one in drawn if one.machine == own]
        if mine:
            pages[root / "reports" / own] = mine + published
    return pages


def describe_page(
    folder: Path,
    shown: list[Drawing],
    words: dict[Drawing, Words],
    results: list[Result],
    library: Library,
) -> dict:
    """What the templates of a folder's pages need."""
    from posmat.charts.catalogue import FIGURES

    own = folder.name if folder.name in OWN else None
    root = library.root
    figures = []
    for number, spec in enumerate(FIGURES, 1):
        pictures = [_picture(one, words[one], folder, library) for one in shown if one.spec is spec]
        for place, picture in enumerate(pictures):
            picture["letter"] = _letters(place) if len(pictures) > 1 else ""
        if pictures:
            heading = f"Figure {number}. {spec.title}"
            figures.append(
                {"id": spec.id, "number": number, "title": spec.title, "pictures": pictures}
                | {"anchor": _anchor(heading)}
            )
    elsewhere = []
    if own and any(one.machine not in OWN for one in shown):
        elsewhere.append({"href": "../index.html", "text": "The published machines alone"})
    machines = list(dict.fromkeys((one.machine, one.device) for one in shown))
    return {
        "digest": page_digest(shown),
        "title": "posmat: your own runs" if own else "posmat: figures of the published machines",
        "lead": ("Your own runs beside the published ones. " if own else "") + _LEAD,
        "css": _css(),
        "elsewhere": elsewhere,
        "elsewhere_md": [{**one, "href": "../README.md"} for one in elsewhere],
        "machine_columns": _COLUMNS,
        "machines": [_machine(machine, device, results, root) for machine, device in machines],
        "figures": figures,
    }


def write_readme(root: Path, drawn: dict[Drawing, Words]) -> list[str]:
    """Write the figures in the project's README.md anew; what could not be, and why."""
    path = root / "README.md"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    new, problems = with_figures(text, drawn)
    if new != text:
        with replacing(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return problems


def with_figures(text: str, drawn: dict[Drawing, Words]) -> tuple[str, list[str]]:
    """A README whose blocks between `<!-- posmat:figure NAME -->` and its end say what rows say."""
    by_name = {drawing.name: drawing for drawing in drawn}
    problems = []

    def block(match: re.Match) -> str:
        drawing = by_name.get(match[2])
        if drawing is None:
            problems.append(
                f"README.md shows {match[2]}, which cannot be drawn from data/: "
                "its block is left as it was."
            )
            return match[0]
        return f"{match[1]}{_block(drawing, drawn[drawing])}{match[4]}"

    return _BLOCK.sub(block, text), problems


def _block(drawing: Drawing, words: Words) -> str:
    """A picture with its caption, as the project's README shows it."""
    root, run = drawing.root, drawing.run
    picture = drawing.picture("png").relative_to(root).as_posix()
    data = run.folder.relative_to(root).as_posix()
    executed = run.report("ipynb")
    measured = ""
    if executed.exists():
        link = quote(executed.relative_to(root).as_posix())
        measured = f", and the notebook that measured them says [what we found]({link}{_FOUND})"
    return (
        f"![{escape_markdown(words.alt)}]({quote(picture)})\n\n"
        f"{escape_markdown(words.caption)} The figure is drawn from the rows in "
        f"[{data}]({quote(data)}){measured}.\n"
    )


def _picture(drawing: Drawing, words: Words, folder: Path, library: Library) -> dict:
    """What a page says of one picture, its links from the page's folder."""
    root = drawing.root
    links = {kind: _link(drawing.picture(kind), folder) for kind in ("svg", "pdf", "png")}
    run = drawing.run
    files = [
        ("executed notebook", "executed notebook", run.report("html")),
        (".ipynb", "executed notebook as .ipynb", run.report("ipynb")),
    ]
    files += [(kind.upper(), kind.upper(), drawing.picture(kind)) for kind in links]
    for path in drawing.sources:
        text = "rows (CSV)" if path == drawing.sources[0] else library.say(path)
        files.append((text, text, path))
    files.append(("table (CSV)", "table", run.table))
    files.append(("provenance", "provenance", run.provenance))
    source = root / "notebooks" / f"{drawing.spec.notebook}.ipynb"
    files.append(("source notebook", "source notebook", source))
    width, height = _size(drawing.picture("svg"))
    facts, processors = measured_on(drawing, library)
    return {
        "name": drawing.name,
        "where": _where(drawing),
        "digest": drawing.digest(),
        "alt": words.alt,
        "caption": words.caption,
        "found": {
            kind: _link(path, folder) + _FOUND if (path := run.report(kind)).exists() else ""
            for kind in ("html", "ipynb")
        },
        "width": width,
        "height": height,
        "links": links,
        "files": [
            {"text": text, "label": label, "href": _link(path, folder)}
            for text, label, path in files
            if path.exists()
        ],
        "table": _numbers(drawing, library),
        "bibtex": cite_figure(root, drawing, facts, processors),
    }


def measured_on(drawing: Drawing, library: Library) -> tuple[dict, list[str]]:
    """The provenance behind a picture, and the names of the processors or GPUs in its rows.

    Rows that were made of rows name none, and a frame may not: there provenance does.
    """
    try:
        facts = read_provenance(drawing.run.provenance, library.root)
    except RecordError:  # `posmat check` tells of it
        facts = {}
    names: dict[str, None] = {}
    for path in drawing.sources:
        frame = library.read(path)
        if "processor" in frame:
            names |= dict.fromkeys(str(name) for name in frame["processor"].dropna().unique())
    known = facts.get("device", {}).get("gpu") or facts.get("host", {}).get("processor")
    return facts, list(names) or ([str(known)] if known else [])


def _numbers(drawing: Drawing, library: Library) -> dict | None:
    """The table under a picture, where its rows are timed blocks of one run."""
    from posmat.measure.summary import in_milliseconds

    if len(drawing.sources) != 1 or not is_timed(library.read(drawing.sources[0])):
        return None
    shown = in_milliseconds(library.table(drawing.sources[0])).reset_index()
    names = [*(n for n in shown if n == "method"), *(n for n in shown if n != "method")]
    lines = [
        ["" if value is None else _cell(value) for value in line] for line in shown[names].values
    ]
    return {"columns": names, "lines": lines}


def _cell(value: object) -> str:
    text = str(value)
    return "" if text in ("<NA>", "nan", "None") else text


def _where(drawing: Drawing) -> str:
    """Machine, device and variant, as a heading says them."""
    variant = drawing.variant.strip("-").replace("-", ", ").replace("=", " = ")
    return " · ".join(filter(None, (drawing.machine, drawing.device, variant)))


def _machine(machine: str, device: str, results: list[Result], root: Path) -> dict:
    """One line of the table of machines, from the provenance of everything measured there."""
    facts = []
    for result in results:
        if (result.machine, result.device) == (machine, device):
            try:
                facts.append(read_provenance(result.provenance, root))
            except RecordError:
                continue

    def every(*path: str) -> str:
        values: dict[str, None] = {}
        for one in facts:
            value: object = one
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            # What a system does not tell is in provenance in words: 'not given', 'not installed'.
            if value not in (None, "") and not str(value).startswith("not "):
                values[str(value)] = None
        return ", ".join(values)

    memory = every("device", "gpu_memory_bytes") or every("host", "memory_bytes")
    memory = ", ".join(f"{int(one) / 2**30:.0f} GiB" for one in memory.split(", ") if one)
    versions = [("Python", every("device", "python")), ("PyTorch", every("device", "torch"))]
    versions += [("CUDA", every("device", "cuda")), ("driver", every("device", "driver"))]
    versions += [("oneDNN", every("device", "onednn"))]
    versions += [(name, every("libraries", name)) for name in ("numpy", "pandas")]
    days = sorted({str(one.get("started", ""))[:10] for one in facts} - {""})
    measured = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""
    commits = dict.fromkeys(
        f"{str(one['sources']['commit'])[:10]}"
        + ("" if one["sources"].get("tree_clean") else ", tree changed")
        for one in facts
        if one.get("sources", {}).get("commit")
    )
    commit = f" (commit {'; '.join(commits)})" if commits else ""
    processor = every("device", "gpu") or every("host", "processor")
    return {
        "name": f"{machine} · {device}",
        "cells": [
            processor.replace("(R)", "").replace("(TM)", ""),
            every("host", "cores"),
            memory,
            every("parameters", "threads"),
            ", ".join(f"{name} {value}" for name, value in versions if value),
            measured + commit,
        ],
    }


def _size(svg: Path) -> tuple[int, int]:
    """Width and height of a picture in CSS pixels, so that a page does not jump as it loads."""
    head = svg.read_text(encoding="utf-8")[:4000] if svg.exists() else ""
    found = re.search(r'<svg[^>]* width="([\d.]+)pt"[^>]*>', head)
    tall = re.search(r'<svg[^>]* height="([\d.]+)pt"', head)
    if not found or not tall:
        return 480, 320
    return round(float(found[1]) * 4 / 3), round(float(tall[1]) * 4 / 3)


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _letters(place: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    tens, ones = divmod(place, 26)
    return (_letters(tens - 1) if tens else "") + chr(ord("a") + ones)


def _anchor(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def escape_markdown(text: str) -> str:
    """A text whose letters Markdown takes as they are, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


@cache
def _css() -> str:
    from markupsafe import Markup

    return Markup((TEMPLATES / "gallery.css").read_text(encoding="utf-8"))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: str(name).endswith(".html"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    return environment
