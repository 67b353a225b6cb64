"""How posmat and its figures are cited."""

import json
import re

import jsonschema
import pytest
import yaml

from posmat.measure.files import rows_hash
from posmat.report import cli
from posmat.report.cite import cite_figure, cite_software, latex
from posmat.report.derive import derive_run
from posmat.report.store import chosen, find_drawings, find_results, in_detail
from posmat.tests.sample import MACHINES, PICTURE, ROOT, keep, make_project, make_rows

ROWS = "data/alpha/cpu/05_positive_matrix_product"
CAPTION = "The sign-magnitude form of a fully connected layer beside the layer itself."
SCHEMA = json.loads((ROOT / "posmat/tests/cff-1.2.0.schema.json").read_text())


def test_citation_cff_holds_to_the_published_schema_and_says_our_version():
    facts = yaml.load((ROOT / "CITATION.cff").read_text(), Loader=yaml.BaseLoader)
    validator = jsonschema.Draft7Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    assert [error.message for error in validator.iter_errors(facts)] == []
    for wrong in ({"licence": "MIT"}, {"authors": []}, {"cff-version": "9"}, {"doi": "none"}):
        assert not validator.is_valid(facts | wrong), wrong
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert facts["version"] == version[1]
    # The page of the gallery and the data's description name the seed, too.
    seed, work = facts["references"]
    for path in ("data/README.md", "posmat/report/templates/lead.txt"):
        text = (ROOT / path).read_text()
        assert seed["repository-code"] in text and f"https://doi.org/{work['doi']}" in text


def test_the_software_is_cited_from_citation_cff(tmp_path):
    entry = cite_software(ROOT)
    assert entry.startswith("@misc{posmat,\n") and "The posmat developers" in entry
    assert re.search(r"year = \{20\d\d\},", entry)
    (tmp_path / "CITATION.cff").write_text(
        "title: A & B_1 {~^\\}\nversion: 2\nauthors:\n- {family-names: Doe, given-names: Jo}\n"
        "date-released: 2027-01-02\n"
    )
    entry = cite_software(tmp_path)
    latex = r"A \& B\_1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}"
    assert f"title = {{{{{latex}}}}}," in entry and "author = {Doe, Jo}," in entry
    assert "year = {2027}," in entry and "Software, version 2" in entry and "license" not in entry


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = make_project(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: root)
    return root


def test_a_figure_is_cited_with_its_rows_and_its_machine(project, capsys):
    assert cli.main(["cite", PICTURE]) == 0
    said = capsys.readouterr().out
    digest = rows_hash(project / f"{ROWS}.csv")
    assert said.startswith(f"Figure 2. The positive matrix product ({PICTURE})\n")
    assert f"path     reports/figures/{PICTURE}.pdf (not drawn yet: run 'posmat draw')\n" in said
    assert f"sha256   {digest}\n" in said
    assert f"@misc{{posmat:{PICTURE},\n" in said and "year = {2026}," in said
    note = next(line for line in said.splitlines() if "note = " in line)
    assert f"rows sha256 {digest}" in note
    details = in_detail(json.loads((project / f"{ROWS}.json").read_text())["host"])
    assert f"alpha, cpu (A Processor; {latex(details)})" in note
    assert f"caption  {CAPTION}" in said
    assert f"howpublished = {{Figure reports/figures/{PICTURE}.pdf of posmat " in said
    assert r"05\_positive\_matrix\_product.csv" in note
    assert said.count("{") == said.count("}")


def test_an_id_gives_every_published_machine(project, capsys):
    keep(project, "05_positive_matrix_product", make_rows({"a": 1.0}, "local", "cpu", "Mine"))
    assert cli.main(["cite", "positive-matrix-product"]) == 0
    said = capsys.readouterr().out
    assert said.count("@misc") == len(MACHINES) and "local" not in said


@pytest.mark.parametrize("asked", ["positive-matrix-product-alpha", "zzz"])
def test_an_unknown_figure_is_refused_with_near_ones(project, capsys, asked):
    assert cli.main(["cite", asked]) == 1
    error = capsys.readouterr().err
    assert f"no figure has the id {asked!r}: did you mean " in error
    assert asked == "zzz" or "positive-matrix-product-alpha-cpu or" in error
    assert error.count("\n") == 1 and error.count(" or ") == 2  # three, however far


def test_what_is_not_there_is_not_said(project, capsys):
    assert cli.main(["cite", "linear-vs-manual"]) == 1
    assert "run 'posmat report 02_linear_vs_manual'" in capsys.readouterr().err
    keep(project, "02_linear_vs_manual", make_rows({"nn.Linear": 1.0}, *MACHINES[0]))
    assert cli.main(["cite", "linear-vs-manual"]) == 0
    said = capsys.readouterr().out
    assert "\ncaption  A fully connected layer beside the same" in said and "finding" not in said
    (project / "data/alpha/cpu/02_linear_vs_manual.json").unlink()
    assert cli.main(["cite", "linear-vs-manual"]) == 1
    said = capsys.readouterr()
    assert "02_linear_vs_manual.json is missing" in said.err and not said.out


@pytest.mark.parametrize(
    ("host", "device", "note"),
    [
        ({"processor": "Host(R) CPU"}, {}, "alpha, cpu (Host CPU)"),
        ({"processor": "A CPU"}, {"gpu": "A_GPU"}, r"alpha, cpu (A\_GPU)"),
        ({}, {}, "Measured on alpha, cpu"),
    ],
)
def test_rows_without_a_processor_have_that_of_their_provenance(project, host, device, note):
    rows = make_rows({"W @ x": 1.0, "W * x": 2.0}, *MACHINES[0])
    path = keep(project, "01_matvec_vs_elementwise", rows.assign(processor=None))
    provenance = path.with_suffix(".json")
    facts = {"host": {"host_identity": "alpha"} | host, "device": device}
    facts["sources"] = {"commit": "1" * 40}
    provenance.write_text(json.dumps(json.loads(provenance.read_text()) | facts))
    drawings = find_drawings(find_results(project))
    (drawing,) = chosen(drawings, ["matvec-vs-elementwise-alpha-cpu"])
    entry = cite_figure(drawing, derive_run(drawing.run).said[drawing])
    assert f"{note} at the commit 1111111111; " in entry
