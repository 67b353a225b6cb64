"""`posmat check` finds what does not belong together."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from posmat.measure.files import make_folder, read_all_rows, rows_hash
from posmat.measure.seed import rankings, read_seed, then_and_now
from posmat.report import cli
from posmat.report.checking import check_project
from posmat.report.drawing import OWN, find_results
from posmat.report.freshness import hash_of_all_rows
from posmat.report.verbs import redraw
from posmat.tests.sample import (
    MACHINES,
    PICTURE,
    ROOT,
    TIMES_05,
    keep,
    make_project,
    make_rows,
)

NAME = "05_positive_matrix_product"
DATA, REPORTS = Path("data/alpha/cpu"), Path("reports/alpha/cpu")
PICTURES = Path("reports/figures")

pytestmark = pytest.mark.usefixtures("blank_pictures")  # where a test draws again


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("drawn"), MACHINES[:1])
    assert not redraw(root)[1]
    return root


@pytest.fixture
def project(drawn, tmp_path) -> Path:
    shutil.copytree(drawn, tmp_path / "project")
    return tmp_path / "project"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode()))


def other_rows(root: Path) -> None:
    """A new measurement with its own provenance, and nothing drawn from it yet."""
    memory = pd.read_csv(root / DATA / f"{NAME}.memory.csv")
    keep(root, NAME, make_rows(TIMES_05, *MACHINES[0], seed=7), memory=memory)


def frame_changed(root: Path) -> None:
    facts = root / DATA / f"{NAME}.json"
    known = json.loads(facts.read_text()) | {"frames_sha256": {"memory": "0" * 64}}
    facts.write_text(json.dumps(known))


def without_hash(root: Path) -> None:
    (root / PICTURES / f"{PICTURE}.png").write_bytes(b"a picture from elsewhere")


HARM = {
    "a table's number": (
        lambda root: change(root / REPORTS / f"{NAME}.table.csv", "timed,True,,3", "timed,True,,4"),
        ["reports/alpha/cpu/05_positive_matrix_product.table.csv is not what the rows"],
    ),
    "no table": (
        lambda root: (root / REPORTS / f"{NAME}.table.csv").unlink(),
        ["05_positive_matrix_product.table.csv is missing or no table: run 'posmat draw'."],
    ),
    "another figure's bytes": (
        lambda root: shutil.copy(
            root / PICTURES / "matvec-vs-elementwise-alpha-cpu.pdf",
            root / PICTURES / f"{PICTURE}.pdf",
        ),
        [f"{PICTURE}.pdf does not carry its id"],
    ),
    "a figure without a hash": (without_hash, [f"{PICTURE}.png does not carry its id"]),
    "no figure": (
        lambda root: (root / PICTURES / f"{PICTURE}.svg").unlink(),
        [f"{PICTURE}.svg is missing: run 'posmat draw'."],
    ),
    "a figure of no rows": (
        lambda root: (root / PICTURES / "old-alpha-cpu.svg").write_text("<svg/>"),
        ["reports/figures/old-alpha-cpu.svg belongs to no rows in data/"],
    ),
    "a number in the README": (
        lambda root: change(root / "README.md", " ms (", "0 ms ("),
        ["README.md does not say what its rows give"],
    ),
    "a page that says something else": (
        lambda root: change(root / "reports/index.html", "the paired ratio", "no ratio"),
        ["reports/index.html does not say what its rows give: run 'posmat draw'."],
    ),
    "a page for a code host that says something else": (
        lambda root: change(root / "reports/README.md", "The sign-magnitude", "No sign"),
        ["reports/README.md does not say what its rows give: run 'posmat draw'."],
    ),
    "no source notebook": (
        lambda root: (root / "notebooks/05_positive_matrix_product.ipynb").unlink(),
        [
            f"reports/{page} links to notebooks/05_positive_matrix_product.ipynb, which is not"
            for page in ("index.html", "README.md")
        ],
    ),
    "a report of no run": (
        lambda root: (root / REPORTS / "05_old.html").write_text("<p>"),
        ["reports/alpha/cpu/05_old.html belongs to no rows in data/"],
    ),
    "a report of another machine": (
        lambda root: shutil.copytree(root / REPORTS, root / "reports/gamma/cpu"),
        [
            f"reports/gamma/cpu/{stem}.table.csv belongs to no rows"
            for stem in (
                "01_matvec_vs_elementwise-dtype=int8",
                "01_matvec_vs_elementwise",
                "05_positive_matrix_product",
            )
        ],
    ),
    "what a failed run left": (
        lambda root: (root / REPORTS / "06_gemm_formulations.failed.ipynb").write_text("{}"),
        [],
    ),
    "a frame of no run": (
        lambda root: (root / DATA / f"{NAME}.other.csv").write_text("a\n1\n"),
        [f"data/alpha/cpu/{NAME}.other.csv belongs to no rows"],
    ),
    "a frame that is gone": (
        lambda root: (root / DATA / f"{NAME}.memory.csv").unlink(),
        [f"data/alpha/cpu/{NAME}.memory.csv is missing: measure again, or restore the file."],
    ),
    "provenance that is none": (
        lambda root: change(root / DATA / f"{NAME}.json", '"host": {', '"host": null, "was": {'),
        [f"{NAME}.json has null as 'host', where an object belongs"],
    ),
    "a page without its hash": (
        lambda root: (root / "reports/index.html").write_text("<p>a page"),
        ["reports/index.html shows other rows than those in data/"],
    ),
    "provenance of another machine": (
        lambda root: change(root / DATA / f"{NAME}.json", '"machine": "alpha"', '"machine": "x"'),
        ["05_positive_matrix_product.json is of the machine 'x', not of 'alpha'."],
    ),
    "another host": (
        lambda root: (root / "data/alpha/host.json").write_text('{"host_identity": "other"}'),
        [f"{stem}.json was made on another host" for stem in ("01_matvec_vs_elementwise", NAME)],
    ),
    "a row of another machine": (
        lambda root: keep(
            root,
            NAME,
            pd.concat(
                [
                    make_rows(TIMES_05, *MACHINES[0]),
                    make_rows(TIMES_05, "gamma", "cpu", "A Processor"),
                ]
            ),
        ),
        ["has rows of the machine 'gamma', not of 'alpha'."],
    ),
    "a frame that its provenance does not know": (
        frame_changed,
        ["05_positive_matrix_product.memory.csv is not the file that its provenance describes"],
    ),
    "new rows": (
        other_rows,
        [
            "05_positive_matrix_product.table.csv is not what",
            *(f"{PICTURE}.{kind} was drawn from other rows" for kind in ("svg", "pdf", "png")),
            "reports/index.html shows other rows",
            "reports/README.md shows other rows",
            "README.md does not say what its rows give",
        ],
    ),
    "no provenance": (
        lambda root: (root / DATA / "01_matvec_vs_elementwise.json").unlink(),
        ["01_matvec_vs_elementwise.json is missing or no JSON"],
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_does_not_hold_is_found(harm, project):
    do, expected = HARM[harm]
    do(project)
    problems, _, _ = check_project(project)
    assert all("\n" not in line for line in problems)
    for start in expected:
        assert any(start in line for line in problems), (start, problems)
    if harm not in ("another host", "a row of another machine"):
        assert len(problems) == len(expected), problems


def test_what_was_drawn_holds(project, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_root", lambda: project)
    assert cli.main(["check"]) == 0
    said = capsys.readouterr()
    assert said.out == "Figures, tables, pages and provenance belong to the rows beside them.\n"
    assert not said.err


def test_older_sources_are_information_and_with_strict_a_failure(project, monkeypatch, capsys):
    for path in (project / DATA).glob("*.json"):
        facts = json.loads(path.read_text())
        facts["key"]["rooms"]["measure"] = "of another time"
        facts["sources"]["modules"]["charts"] = "whose change changes no row"
        facts["key"] |= {"host": "another", "torch": "1.0"}
        path.write_text(json.dumps(facts))
    monkeypatch.setattr(cli, "_root", lambda: project)
    assert cli.main(["check"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("posmat: data/alpha/cpu: made by older sources: 01_matvec")
    assert f"{NAME} (posmat/measure changed)" in first and "belong to the rows" in second
    assert cli.main(["check", "--strict"]) == 1
    assert "made by older sources" in capsys.readouterr().err


def test_what_is_published_holds():
    if all(one.machine in OWN for one in find_results(ROOT)):
        pytest.skip("nothing is published yet")
    assert check_project(ROOT, published=True)[0] == []


def test_own_runs_can_be_left_out(project):
    keep(project, NAME, make_rows(TIMES_05, "local", "cpu", "Mine"))
    (project / PICTURES / "positive-matrix-product-local-cpu.svg").write_text("not drawn")
    assert check_project(project, published=True) == ([], [], [])
    assert len(check_project(project)[0]) > 3


def summarized(root: Path) -> None:
    """Keep what notebook 10 leaves on the machine alpha."""
    shutil.copy(ROOT / "data" / "seed.csv", root / "data")
    seed, rows = read_seed(root / "data" / "seed.csv"), read_all_rows("alpha", root)
    kept = then_and_now(rows, seed).assign(run=0)
    keep(root, "10_summary", kept.assign(machine="alpha", device="all"))
    path = root / "data/alpha/all/10_summary.csv"
    then_and_now(rows, seed).to_csv(path, index=False)
    facts = json.loads(path.with_suffix(".json").read_text()) | {"rows_sha256": rows_hash(path)}
    (result,) = (one for one in find_results(root) if one.stem == "10_summary")
    facts["key"]["rows"] = hash_of_all_rows(root, "alpha")
    path.with_suffix(".json").write_text(json.dumps(facts))
    make_folder(result.table.parent)
    rankings(rows, seed).to_csv(result.table)
    assert not redraw(root)[1]


def at_the_seeds_size(machine: str = "alpha", slower: float = 1.0) -> pd.DataFrame:
    where = machine, "cpu", "A Processor"
    sizes = {"batch_size": 1, "out_features": 128, "in_features": 9216, "dtype": "float32"}
    return make_rows({"W @ x": 2e-4, "W * x": 4e-4}, *where, slower=slower, **sizes)


def test_a_summary_of_other_rows_is_found(project):
    name = "01_matvec_vs_elementwise"
    keep(project, name, at_the_seeds_size())
    summarized(project)
    assert check_project(project) == ([], [], [])
    # Another machine is published: alpha's summary was made before, and its own lines still hold.
    keep(project, name, at_the_seeds_size("gamma"))
    redraw(project)
    problems, _, notes = check_project(project)
    assert not problems
    assert notes == [
        "data/alpha/all/10_summary.csv was made when data/ held other rows; what it says of alpha "
        "still holds, and to read all that are there now, run 'posmat report 10 --machine alpha'."
    ]
    # Its own rows are measured again.
    keep(project, name, at_the_seeds_size(slower=2.0))
    redraw(project)
    problems, _, notes = check_project(project)
    assert not notes and problems == [
        "data/alpha/all/10_summary.csv was made from other rows of alpha than there are: "
        "run 'posmat report 10 --machine alpha'."
    ]


def test_a_changed_table_of_the_summary_is_found(project):
    keep(project, "01_matvec_vs_elementwise", at_the_seeds_size())
    summarized(project)
    table = project / "reports/alpha/all/10_summary.table.csv"
    change(table, "order reversed", "order kept")
    (problem,) = check_project(project)[0]
    assert problem.startswith("reports/alpha/all/10_summary.table.csv was made from other rows")


def test_a_commit_that_is_not_in_the_history_is_told(project):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(project), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def made_at(commit: str) -> None:
        for path in (project / DATA).glob("*.json"):
            facts = json.loads(path.read_text())
            facts["sources"]["commit"] = commit
            path.write_text(json.dumps(facts))
        redraw(project)  # the pages name it

    made_at("1" * 40)
    assert check_project(project) == ([], [], [])  # there is no repository
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    problems, older, notes = check_project(project)
    assert (
        not problems
        and not older
        and notes
        == [
            f"{DATA.as_posix()}: made at the commit 1111111111, which this repository does not have"
        ]
    )
    made_at(git("rev-parse", "HEAD"))
    assert not check_project(project)[2]
    made_at("1" * 40)
    (project / ".git" / "shallow").write_text(git("rev-parse", "HEAD") + "\n")
    assert not check_project(project)[2]
