"""How to cite: the software from CITATION.cff, a figure with the machine and its rows' sha256."""

from collections.abc import Iterable
from pathlib import Path

from posmat.measure.files import RecordError
from posmat.report.drawing import Drawing, Words

_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def read_citation(root: Path) -> dict:
    """The facts of CITATION.cff.

    Raises:
        RecordError: it is not there, or not what it should be.
    """
    import yaml

    path = root / "CITATION.cff"
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        facts = None
    if not isinstance(facts, dict) or not {"title", "authors", "version"} <= set(facts):
        raise RecordError(
            "CITATION.cff is missing or has no title, authors and version: restore it from the "
            "repository."
        )
    return facts


def cite_software(root: Path) -> str:
    """The BibTeX entry of posmat itself."""
    facts = read_citation(root)
    fields = {
        "title": f"{{{latex(facts['title'])}}}",
        "author": _authors(facts["authors"]),
        "version": latex(str(facts["version"])),
        "note": f"{latex(str(facts.get('license', '')))} license" if "license" in facts else "",
        "year": str(facts.get("date-released", ""))[:4],
        "doi": facts.get("doi", ""),
        "url": facts.get("repository-code", facts.get("url", "")),
    }
    return _entry("software", "posmat", fields)


def cite_figure(root: Path, drawing: Drawing, measured: dict, processors: Iterable[str]) -> str:
    """The BibTeX entry of one picture.

    Args:
        root: the project.
        drawing: the picture.
        measured: the provenance of the run that it shows.
        processors: the names of what was measured.
    """
    software = read_citation(root)
    of = latex(", ".join(_plain(name) for name in processors))
    measured_on = latex(f"{drawing.machine}, {drawing.device}") + (f" ({of})" if of else "")
    rows = latex(", ".join(path.relative_to(root).as_posix() for path in drawing.sources))
    fields = {
        "title": f"{{{latex(drawing.spec.title)}}}",
        "author": _authors(software["authors"]),
        "year": str(measured.get("started", ""))[:4],
        "howpublished": f"Figure {latex(drawing.name)} of posmat {latex(str(software['version']))}",
        "note": f"Measured on {measured_on}; {rows}, rows sha256 {drawing.digest()}",
        "url": software.get("repository-code", software.get("url", "")),
    }
    return _entry("misc", f"posmat:{drawing.name}".replace("=", "-"), fields)


def tell_figure(drawing: Drawing, number: int, words: Words, entry: str) -> str:
    """What `posmat cite FIGURE` prints: caption, paths, rows, and the BibTeX entry."""
    root = drawing.root
    picture = drawing.picture("pdf").relative_to(root).as_posix()
    rows = "\n".join(f"rows     {path.relative_to(root).as_posix()}" for path in drawing.sources)
    missing = "" if drawing.picture("pdf").exists() else " (not drawn yet: run 'posmat draw')"
    return (
        f"Figure {number}. {drawing.spec.title} ({drawing.name})\n"
        f"caption  {words.caption}\n"
        f"path     {picture}{missing}\n"
        f"{rows}\n"
        f"sha256   {drawing.digest()}\n\n"
        f"{entry}"
    )


def latex(text: str) -> str:
    """A text whose letters LaTeX takes as they are."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _plain(processor: str) -> str:
    return processor.replace("(R)", "").replace("(TM)", "")


def _authors(authors: list[dict]) -> str:
    """BibTeX authors; a name of an entity stands in braces, so that none of it is a surname."""
    names = []
    for author in authors:
        if "name" in author:
            names.append(f"{{{latex(author['name'])}}}")
        else:
            given = author.get("given-names", "")
            names.append(latex(f"{author.get('family-names', '')}, {given}".strip(", ")))
    return " and ".join(names)


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
