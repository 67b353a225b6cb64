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
from posmat.report.freshness import hash_of_all_rows
from posmat.report.store import KINDS, find_results
from posmat.report.verbs import check_project, redraw
from posmat.tests.sample import MACHINES, PICTURE, ROOT, TIMES_05, keep, make_project, make_rows

NAME = "05_positive_matrix_product"
DATA, REPORTS = Path("data/alpha/cpu"), Path("reports/alpha/cpu")
JSON, MEMORY = DATA / f"{NAME}.json", DATA / f"{NAME}.memory.csv"
TABLE = REPORTS / f"{NAME}.table.csv"
PICTURES = Path("reports/figures")
PAGES = ("reports/index.html", "reports/README.md")

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


def changed(path: Path | str, old: str, new: str):
    return lambda root: change(root / path, old, new)


def gone(path: Path | str):
    return lambda root: (root / path).unlink()


def put(path: Path | str, text: str = "<p>"):
    return lambda root: (root / path).write_text(text)


def other_rows(root: Path) -> None:
    """A new measurement with its own provenance, and nothing drawn from it yet."""
    keep(root, NAME, make_rows(TIMES_05, *MACHINES[0], seed=7), memory=pd.read_csv(root / MEMORY))


def other_bits(root: Path) -> None:
    table = pd.read_csv(root / TABLE)
    table.assign(median=table["median"] * (1 + 1e-14)).to_csv(root / TABLE, index=False)


def two_machines(root: Path) -> None:
    keep(root, NAME, pd.concat([make_rows(TIMES_05, *at) for at in MACHINES]))


NOT_GIVEN = "is not what its rows give: run 'posmat draw'."
MISSING = "is missing: run 'posmat draw'."
ORPHAN = "belongs to no rows in data/: remove it."
OLD_FIGURE, OLD_REPORT = PICTURES / "old-alpha-cpu.svg", REPORTS / "05_old.html"
FAILED = REPORTS / "06_gemm_formulations.failed.ipynb"
HOST = Path("data/alpha/host.json")
OTHER_HOST = [f"{s}.json was made on another host" for s in ("elementwise", "=int8", NAME)]
DRAWN = [f"{PICTURE}.{kind} {NOT_GIVEN}" for kind in KINDS]

# What is done to a project, and the lines that tell of it, each by a part of it.
HARM = {
    "a number": (changed(TABLE, "timed,True,,3", "timed,True,,4"), [f"{TABLE} {NOT_GIVEN}"]),
    "the last bits of a number": (other_bits, []),
    "another picture": (put(PICTURES / f"{PICTURE}.png"), [f"{PICTURE}.png {NOT_GIVEN}"]),
    "no figure": (gone(PICTURES / f"{PICTURE}.svg"), [f"{PICTURE}.svg {MISSING}"]),
    "a figure of no rows": (put(OLD_FIGURE), [f"{OLD_FIGURE} {ORPHAN}"]),
    **{
        f"another number in {page}": (changed(page, " ms (", "0 ms ("), [f"{page} {NOT_GIVEN}"])
        for page in ("README.md", *PAGES)
    },
    "no notebook": (gone(f"notebooks/{NAME}.ipynb"), [f"{page} {NOT_GIVEN}" for page in PAGES]),
    "a report of no run": (put(OLD_REPORT), [f"{OLD_REPORT} {ORPHAN}"]),
    "what a failed run left": (put(FAILED), []),
    "a frame that is gone": (gone(MEMORY), [f"{MEMORY} is missing: measure again, or restore"]),
    "provenance that is none": (
        changed(JSON, '"host": {', '"host": null, "was": {'),
        [f"{JSON} has null as 'host', where an object belongs"],
    ),
    "no provenance": (gone(JSON), [f"{JSON} is missing or no JSON"]),
    "provenance of another machine": (
        changed(JSON, '"machine": "alpha"', '"machine": "x"'),
        [f"{JSON} is of the machine 'x', not of 'alpha'."],
    ),
    "a row of another machine": (
        two_machines,
        [f"{NAME}.csv has rows of the machine 'beta', not of 'alpha'.", f"{MEMORY} {ORPHAN}"],
    ),
    "another host": (put(HOST, '{"host_identity": "other"}'), OTHER_HOST),
    "no host": (gone(HOST), [f"{HOST} is missing or names no host"]),
    "new rows": (other_rows, [f"{TABLE} {NOT_GIVEN}", *DRAWN]),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_does_not_hold_is_found(harm, project):
    do, expected = HARM[harm]
    do(project)
    problems, _, _ = check_project(project)
    assert len(problems) == len(expected) and all("\n" not in line for line in problems), problems
    for part in expected:
        assert any(part in line for line in problems), (part, problems)


def test_older_sources_are_information_and_with_strict_a_failure(project, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_root", lambda: project)
    assert cli.main(["check", "--strict"]) == 0
    said = capsys.readouterr()
    assert said.out == "Figures, tables, pages and provenance belong to the rows beside them.\n"
    assert not said.err
    for path in (project / DATA).glob("*.json"):
        facts = json.loads(path.read_text())
        facts["key"]["rooms"]["measure"] = "of another time"
        facts["key"] |= {"host": "another", "torch": "1.0"}
        path.write_text(json.dumps(facts))
    assert cli.main(["check"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("posmat: data/alpha/cpu: made by older sources: 01_matvec")
    assert f"{NAME} (posmat/measure changed)" in first and "belong to the rows" in second
    assert cli.main(["check", "--strict"]) == 1
    assert "made by older sources" in capsys.readouterr().err


def test_what_is_published_holds():
    assert check_project(ROOT, published=True)[0] == []


def test_own_runs_can_be_left_out(project):
    keep(project, NAME, make_rows(TIMES_05, "local", "cpu", "Mine"))
    (project / PICTURES / "positive-matrix-product-local-cpu.svg").write_text("not drawn")
    assert check_project(project, published=True) == ([], [], [])
    assert len(check_project(project)[0]) > 3


def summarized(root: Path) -> None:
    """Keep what notebook 11 leaves on the machine alpha."""
    shutil.copy(ROOT / "data" / "seed.csv", root / "data")
    seed, rows = read_seed(root / "data" / "seed.csv"), read_all_rows("alpha", root)
    kept = then_and_now(rows, seed).assign(run=0)
    keep(root, "11_summary", kept.assign(machine="alpha", device="all"))
    path = root / "data/alpha/all/11_summary.csv"
    then_and_now(rows, seed).to_csv(path, index=False)
    facts = json.loads(path.with_suffix(".json").read_text()) | {"rows_sha256": rows_hash(path)}
    (result,) = (one for one in find_results(root) if one.stem == "11_summary")
    facts["key"]["rows"] = hash_of_all_rows(root, "alpha")
    path.with_suffix(".json").write_text(json.dumps(facts))
    make_folder(result.report("").parent)
    rankings(rows, seed).to_csv(result.report("table.csv"))
    assert not redraw(root)[1]


def at_the_seeds_size(machine: str = "alpha", slower: float = 1.0) -> pd.DataFrame:
    times, where = {"W @ x": 2e-4, "W * x": 4e-4}, (machine, "cpu", "A Processor")
    sizes = {"batch_size": 1, "out_features": 128, "in_features": 9216, "dtype": "float32"}
    return make_rows(times, *where, slower=slower, **sizes)


def test_a_summary_of_other_rows_is_found(project):
    name = "01_matvec_vs_elementwise"
    keep(project, name, at_the_seeds_size())
    summarized(project)
    assert check_project(project) == ([], [], [])
    table = project / "reports/alpha/all/11_summary.table.csv"
    change(table, "order reversed", "order kept")
    (problem,) = check_project(project)[0]
    assert problem.startswith("reports/alpha/all/11_summary.table.csv was made from other rows")
    change(table, "order kept", "order reversed")
    # Another machine is published: alpha's summary was made before, and its own lines still hold.
    keep(project, name, at_the_seeds_size("gamma"))
    redraw(project)
    problems, _, notes = check_project(project)
    assert not problems
    assert notes == [
        "data/alpha/all/11_summary.csv was made when data/ held other rows; what it says of alpha "
        "still holds, and to read all that are there now, run 'posmat report 11 --machine alpha'."
    ]
    # Its own rows are measured again.
    keep(project, name, at_the_seeds_size(slower=2.0))
    redraw(project)
    problems, _, notes = check_project(project)
    assert not notes and problems == [
        "data/alpha/all/11_summary.csv was made from other rows of alpha than there are: "
        "run 'posmat report 11 --machine alpha'."
    ]


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
    told = f"{DATA}: made at the commit 1111111111, which this repository does not have"
    assert check_project(project) == ([], [], [told])
    made_at(git("rev-parse", "HEAD"))
    assert not check_project(project)[2]
    made_at("1" * 40)
    (project / ".git" / "shallow").write_text(git("rev-parse", "HEAD") + "\n")
    assert not check_project(project)[2]
