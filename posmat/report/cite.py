"""How to cite: the software from CITATION.cff, a figure with the machine and its rows' sha256."""

from pathlib import Path

from posmat.measure.files import RecordError
from posmat.report.store import Drawing, Said, name_in

_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _read_citation(root: Path) -> dict:
    import yaml

    try:
        facts = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        facts = None
    if not isinstance(facts, dict) or not {"title", "authors", "version"} <= set(facts):
        why = "is missing or has no title, authors and version"
        raise RecordError(f"CITATION.cff {why}: restore it from the repository.")
    return facts


def cite_software(root: Path) -> str:
    """The BibTeX entry of posmat itself; a RecordError where CITATION.cff does not hold."""
    facts = _read_citation(root)
    fields = {
        "title": f"{{{latex(facts['title'])}}}",
        "author": _authors(facts["authors"]),
        "howpublished": latex(f"Software, version {facts['version']}"),
        "note": f"{latex(facts['license'])} license" if "license" in facts else "",
        "year": str(facts.get("date-released", ""))[:4],
        "doi": facts.get("doi", ""),
        "url": facts.get("repository-code", facts.get("url", "")),
    }
    return _entry("posmat", fields)


def cite_figure(drawing: Drawing, said: Said) -> str:
    """The BibTeX entry of one picture: where it was measured, at which commit, and its rows."""
    run = drawing.run
    software = _read_citation(run.root)
    of = ", ".join(said.processors).replace("(R)", "").replace("(TM)", "")
    where = f"{run.machine}, {run.device}" + (f" ({of})" if of else "")
    commit = str(run.facts["sources"].get("commit") or "")[:10]
    at = f" at the commit {commit}" if commit else ""
    picture = name_in(drawing.picture("pdf"), run.root)
    rows = ", ".join(name_in(path, run.root) for path in drawing.sources)
    fields = {
        "title": f"{{{latex(drawing.spec.title)}}}",
        "author": _authors(software["authors"]),
        "year": str(run.facts.get("started", ""))[:4],
        "howpublished": latex(f"Figure {picture} of posmat {software['version']}"),
        "note": latex(f"Measured on {where}{at}; {rows}, rows sha256 {said.digest}"),
        "url": software.get("repository-code", software.get("url", "")),
    }
    return _entry(f"posmat:{drawing.name}".replace("=", "-"), fields)


def tell_figure(drawing: Drawing, said: Said) -> str:
    """What `posmat cite FIGURE` prints: caption, paths, rows, and the BibTeX entry."""
    from posmat.charts.catalogue import figure_number

    root, pdf = drawing.run.root, drawing.picture("pdf")
    missing = "" if pdf.exists() else " (not drawn yet: run 'posmat draw')"
    lines = [
        f"Figure {figure_number(drawing.id)}. {drawing.spec.title} ({drawing.name})",
        f"caption  {said.caption}",
        f"path     {name_in(pdf, root)}{missing}",
        *(f"rows     {name_in(path, root)}" for path in drawing.sources),
        f"sha256   {said.digest}\n",
        cite_figure(drawing, said),
    ]
    return "\n".join(lines)


def latex(text: object) -> str:
    """A text whose letters LaTeX takes as they are."""
    return "".join(_LATEX.get(letter, letter) for letter in str(text))


def _authors(authors: list[dict]) -> str:
    """BibTeX authors; a name of an entity stands in braces, so that none of it is a surname."""
    names = []
    for author in authors:
        person = filter(None, (author.get("family-names"), author.get("given-names")))
        name = latex(author.get("name") or ", ".join(person))
        names.append(f"{{{name}}}" if "name" in author else name)
    return " and ".join(names)


def _entry(key: str, fields: dict[str, str]) -> str:
    """An entry of the one type that styles of plain BibTeX know for software and figures."""
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{key},", *lines, "}"])
