"""The gallery: what was drawn, on a page for a browser and on one for a code host.

`reports/index.html` and `reports/README.md` show the published machines, `reports/local/` the
user's own runs beside them; an executed notebook has a page of its own. Nothing in them is fetched
from a network, and nothing tells when they were made: the same rows give the same bytes.
"""

import hashlib
import os
import re
from functools import cache
from html import escape
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from urllib.parse import quote

from posmat.measure.files import replacing
from posmat.report.cite import cite_figure
from posmat.report.store import KINDS, OWN, Drawing, Result, Said, holding, in_detail, name_in

_VERSIONS = {"Python": "python", "PyTorch": "torch", "CUDA": "cuda", "driver": "driver"}
_VERSIONS |= {"oneDNN": "onednn", "numpy": "numpy", "pandas": "pandas"}
_LETTERS = [*ascii_lowercase, *map("".join, product(ascii_lowercase, repeat=2))]
_BLOCK = re.compile(r"(<!-- posmat:figure (\S+) -->\n)(.*?)(<!-- /posmat:figure -->)", re.DOTALL)
_FOUND = "#What-we-found"  # where a notebook says what its figures show, as Jupyter names it


def render_pages(
    root: Path, said: dict[Drawing, Said], results: list[Result], own: str | None = None
) -> tuple[dict[Path, bytes], list[str]]:
    """The pages of what is there now, by their paths, and lines of what they cannot show.

    They are the published machines' with the project's README, and those of own runs; with `own`
    (local, quick) only the pages of these runs.
    """
    published = [one for one in said if one.run.machine not in OWN]
    shown = {name: [one for one in said if one.run.machine == name] for name in OWN}
    shown = {name: mine + published for name, mine in shown.items() if mine} | {"": published}
    pages, problems = {}, []
    for name in ("", *OWN) if own is None else (own,):
        if shown.get(name):
            folder = root / "reports" / name
            facts = _describe_page(folder, name, shown[name], said, results)
            for page in ("index.html", "README.md"):
                pages[folder / page] = _render(page, **facts).encode()
    readme = root / "README.md"
    if readme.exists() and own is None:
        text, problems = with_figures(readme.read_text(encoding="utf-8"), said)
        pages[readme] = text.encode()
    return pages, problems


def _describe_page(
    folder: Path, own: str, shown: list[Drawing], said: dict[Drawing, Said], results: list[Result]
) -> dict:
    from posmat.charts.catalogue import FIGURES

    figures = []
    numbered = sorted(enumerate(FIGURES, 1), key=lambda one: one[1].notebook)
    for number, spec in numbered:  # a number is kept, and the notebooks' order shown
        pictures = [_picture(one, said[one], folder) for one in shown if one.id == spec.id]
        for letter, picture in zip(_LETTERS, pictures, strict=False):
            picture["letter"] = letter if len(pictures) > 1 else ""
        title = f"{spec.title} (notebook {spec.notebook[:2]})"
        anchor = re.sub(r"[^\w\- ]", "", f"Figure {number}. {title}".lower())  # as hosts do
        figure = {"id": spec.id, "number": number, "title": title, "pictures": pictures}
        figures += [figure | {"anchor": anchor.replace(" ", "-")}] * bool(pictures)
    digests = sorted(f"{one.name} {said[one].digest}" for one in shown)
    machines = dict.fromkeys((one.run.machine, one.run.device) for one in shown)
    return {
        "digest": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        "title": "posmat: your own runs" if own else "posmat: figures of the published machines",
        "own": bool(own),
        "elsewhere": bool(own) and any(one.run.machine not in OWN for one in shown),
        "machines": [_machine(*where, results) for where in machines],
        "figures": figures,
    }


def _picture(drawing: Drawing, said: Said, folder: Path) -> dict:
    """What a page says of one picture, its links from the page's folder."""
    run = drawing.run
    files = {"executed notebook": run.report("html"), ".ipynb": run.report("ipynb")}
    files |= {kind.upper(): drawing.picture(kind) for kind in KINDS}
    first, *others = drawing.sources
    files |= {"rows (CSV)": first} | {name_in(path, run.root): path for path in others}
    files |= {"table (CSV)": run.report("table.csv"), "provenance": run.data("json")}
    files["source notebook"] = run.root / "notebooks" / f"{run.notebook}.ipynb"
    variant = run.variant.strip("-").replace("-", ", ").replace("=", " = ")
    return {
        "name": drawing.name,
        "where": " · ".join(filter(None, (run.machine, run.device, variant))),
        "said": said,
        "rows": name_in(run.folder, run.root),
        "size": _size(drawing.picture("svg")),
        "found": {
            path.suffix[1:]: _link(path, folder) + _FOUND if path.exists() else ""
            for path in (run.report("html"), run.report("ipynb"))
        },
        "links": {kind: _link(drawing.picture(kind), folder) for kind in KINDS},
        "files": {text: _link(path, folder) for text, path in files.items() if path.exists()},
        "bibtex": cite_figure(drawing, said),
    }


def _size(svg: Path) -> tuple[int, int]:
    """Width and height of a picture in CSS pixels, so that a page does not jump as it loads."""
    head = svg.read_text(encoding="utf-8")[:4000] if svg.exists() else ""
    found = re.search(r'<svg[^>]* width="([\d.]+)pt" height="([\d.]+)pt"', head)
    return tuple(round(float(points) * 4 / 3) for points in found.groups()) if found else (480, 320)


def _machine(machine: str, device: str, results: list[Result]) -> list[str]:
    """One line of the table of machines, from the provenance of everything measured there."""
    here = [one for one in results if (one.machine, one.device) == (machine, device)]
    facts = [one.facts for one in holding(here)]

    def every(name: str, *parts: str) -> list[str]:
        values = dict.fromkeys(str(one[part].get(name) or "") for part in parts for one in facts)
        # What a system does not tell is in provenance in words: 'not given', 'not installed'.
        return [value for value in values if value and not value.startswith("not ")]

    memory = every("gpu_memory_bytes", "device") or every("memory_bytes", "host")
    processor = ", ".join(every("gpu", "device") or every("processor", "host"))
    # Beside a GPU its host's processor is named, too.
    details = dict.fromkeys(every("processor", "host") if every("gpu", "device") else ())
    details |= dict.fromkeys(in_detail(one["host"]) for one in facts)
    days = sorted({str(one.get("started", ""))[:10] for one in facts} - {""})
    found = {name: every(key, "device", "libraries") for name, key in _VERSIONS.items()}
    commits = dict.fromkeys(
        f"{str(one['commit'])[:10]}" + ("" if one.get("tree_clean") else ", tree changed")
        for one in (one["sources"] for one in facts)
        if one.get("commit")
    )
    return [
        f"{machine} · {device}",
        processor.replace("(R)", "").replace("(TM)", ""),
        "; ".join(filter(None, details)).replace("(R)", "").replace("(TM)", ""),
        ", ".join(every("cores", "host")),
        ", ".join(f"{int(one) / 2**30:.0f} GiB" for one in memory),
        ", ".join(every("threads", "parameters")),
        ", ".join(f"{name} {', '.join(values)}" for name, values in found.items() if values),
        " to ".join(dict.fromkeys(days[:1] + days[-1:]))
        + (f" (commit {'; '.join(commits)})" if commits else ""),
    ]


def with_figures(text: str, said: dict[Drawing, Said]) -> tuple[str, list[str]]:
    """A README whose `<!-- posmat:figure NAME -->` blocks say what rows say.

    And one line for each block whose figure cannot be drawn: it is left as it was.
    """
    by_name, problems = {drawing.name: drawing for drawing in said}, []

    def block(match: re.Match) -> str:
        drawing = by_name.get(match[2])
        if drawing is None:
            why = "which cannot be drawn from data/: its block is left as it was."
            problems.append(f"README.md shows {match[2]}, {why}")
            return match[0]
        picture = _picture(drawing, said[drawing], drawing.run.root)
        return match[1] + _render("figure.md", **picture) + match[4]

    return _BLOCK.sub(block, text), list(dict.fromkeys(problems))


def write_page(executed: Path, run: Result) -> Path:
    """Write `<stem>.html` beside an executed notebook, its figures being those in reports/figures.

    A picture that is none of the list is put inside.
    """
    import nbconvert  # takes most of a second to load
    import nbformat
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        drawn = re.search(r'draw_figure\("([^"]+)"', cell.source)
        pictures = [one for one in cell.get("outputs", []) if "image/png" in one.get("data", {})]
        for picture in pictures if drawn else []:
            facts = picture["metadata"].get("image/png", {})
            source = f"../../figures/{quote(Drawing(run, drawn[1]).name)}.png"
            size = f'width="{facts.get("width", 525)}"'
            alt = escape(facts.get("alt", drawn[1]))
            picture["data"] = {"text/html": f'<img src="{source}" alt="{alt}" {size}>'}
    # Jupyter looks for templates where Python is; pip's --target puts them beside nbconvert.
    beside = [str(Path(nbconvert.__file__).parents[1] / "share/jupyter/nbconvert/templates")]
    paths = {"extra_template_basedirs": beside, "extra_template_paths": beside}
    exporter = nbconvert.HTMLExporter(template_name="basic", embed_images=True, **paths)
    body, _ = exporter.from_notebook_node(notebook)
    heading = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = _render(
        "notebook.html",
        title=heading.splitlines()[0].lstrip("# "),
        # What scrolls must be reached with the keyboard too.
        body=body.replace("<pre>", '<pre tabindex="0">'),
        light=HtmlFormatter(style="default").get_style_defs(".highlight"),
        dark=HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    )
    page = executed.with_suffix(".html")
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def _render(template: str, **facts) -> str:
    return _templates().get_template(template).render(facts)


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def escape_markdown(text: str) -> str:
    """A text whose letters Markdown takes as they are, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


@cache
def _templates():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("posmat.report"),
        autoescape=lambda name: str(name).endswith(".html"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    return environment
