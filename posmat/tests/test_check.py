"""`posmat check` finds what does not belong together; `posmat compare` says what differs."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from posmat.history import rankings, read_seed, then_and_now
from posmat.records import make_folder, read_all_rows, rows_hash
from posmat.report import cli
from posmat.report.checking import check_project
from posmat.report.compare import compare_rows
from posmat.report.drawing import OWN, find_results, summarize_groups
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
    two_parts,
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
        facts["sources"]["modules"]["timing"] = "of another time"
        facts["sources"]["modules"]["figures"] = "whose change changes no row"
        path.write_text(json.dumps(facts))
    monkeypatch.setattr(cli, "_root", lambda: project)
    assert cli.main(["check"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("posmat: data/alpha/cpu: made by older sources: 01_matvec")
    assert f"{NAME} (timing)" in first and "belong to the rows" in second
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
    facts["key"] = {"rows": hash_of_all_rows(root, "alpha")}
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


A, B = (make_rows(TIMES_05, *where, seed=place) for place, where in enumerate(MACHINES))


def test_a_machine_that_is_slower_as_a_whole_keeps_its_ratios():
    table = compare_rows(A, make_rows(TIMES_05, *MACHINES[1], slower=2.0, seed=1))
    assert 1.95 < table.loc["sign-magnitude, whole", "time"] < 2.05
    assert (table["time_is"] == "slower").all()
    assert table.loc["float32 layer", "ratio_is"] is None or pd.isna(
        table.loc["float32 layer", "ratio_is"]
    )
    assert (table["ratio_is"].dropna() == "within the noise").all()


def test_a_method_that_is_slower_beside_the_others_is_found():
    faster = make_rows(TIMES_05 | {"sign-magnitude, whole": 0.45}, *MACHINES[1], seed=1)
    table = compare_rows(A, faster)
    line = table.loc["sign-magnitude, whole"]
    assert line["time_is"] == line["ratio_is"] == "faster"
    assert line["time_low"] < line["time"] < line["time_high"] < 0.6
    others = table.drop(index="sign-magnitude, whole")
    assert (others["time_is"] == "within the noise").all()


def test_an_interval_that_the_controls_exceed_is_noise():
    noisy = make_rows(TIMES_05, *MACHINES[1], seed=1)
    control = noisy["method"] == "float32 layer (again)"
    noisy.loc[control, "seconds"] *= 1 + noisy.loc[control, "run"].astype(float)
    slower = make_rows(TIMES_05, *MACHINES[1], slower=1.2, seed=1)
    assert compare_rows(A, slower).loc["element-wise, in blocks", "time_is"] == "slower"
    noisy.loc[~control, "seconds"] *= 1.2
    assert compare_rows(A, noisy).loc["element-wise, in blocks", "time_is"] == "within the noise"


def test_one_run_has_a_bootstrap_interval():
    one, other = (make_rows(TIMES_05, *where, runs=1) for where in MACHINES)
    line = compare_rows(one, other).loc["sign-magnitude, whole"]
    assert line["time_low"] < line["time"] < line["time_high"]


def test_what_one_side_lacks_is_said():
    lacking = B.copy()
    gone = lacking["method"] == "sign-magnitude, whole"
    lacking.loc[gone, "state"] = "not supported"
    lacking = lacking[lacking["method"] != "element-wise, in blocks"]
    table = compare_rows(A, lacking)
    assert table.loc["sign-magnitude, whole", "time_is"] == "not supported on B"
    assert table.loc["element-wise, in blocks", "time_is"] == "not there on B"


def test_different_problems_are_not_compared():
    with pytest.raises(ValueError, match="batch_size is 8 and 9"):
        compare_rows(A, make_rows(TIMES_05, *MACHINES[1], batch_size=9))


def test_the_medians_are_those_of_the_tables():
    # Two quiet runs and a slow one, of which the slow one has the fewest blocks.
    a = make_rows(TIMES_05, *MACHINES[0])
    a.loc[a["run"] == 2, "seconds"] *= 3
    a = a[(a["run"] < 2) | (a["round"] < 3)]
    line = compare_rows(a, B).loc["sign-magnitude, whole"]
    table = summarize_groups(a)
    assert line["a_ms"] == 1e3 * table.loc["sign-magnitude, whole", "median"]
    assert line["time_low"] < 0.4 < line["time"] < line["time_high"]


def test_parts_are_compared_with_their_own_baselines():
    table = compare_rows(two_parts(), two_parts("beta", slower=2.0))
    line = table.loc[("whole", "sign-magnitude, whole")]
    assert 14 < line["ratio_a"] < 16 and 14 < line["ratio_b"] < 16
    assert pd.isna(table.loc[("whole", "element-wise, in blocks"), "ratio"])
    assert 14 < table.loc[("forms", "element-wise, in blocks"), "ratio_a"] < 16
    with pytest.raises(ValueError, match="B has no column 'part'"):
        compare_rows(two_parts(), B)


def test_other_baselines_are_refused():
    other = make_rows(dict(reversed(TIMES_05.items())), *MACHINES[1])
    with pytest.raises(ValueError, match="baselines differ: float32 layer and sign-magnitude"):
        compare_rows(A, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as rows"),
        (b"\x00\xff\xfe\x93PNG,\x00\n\x80", "cannot be read as rows"),
        (b"method,peak\na,1\n", "the rows have no column 'run'"),
        (b"run,method,state,round,seconds\n0,a,timed,0,1\n", "the rows have no column 'exact'"),
        (b"run,meth", "the rows have no column 'method'"),
    ],
)
def test_a_file_from_elsewhere_that_is_no_rows_is_one_sentence(
    project, tmp_path_factory, monkeypatch, capsys, content, message
):
    path = tmp_path_factory.mktemp("elsewhere") / "t.csv"
    path.write_bytes(content)
    monkeypatch.setattr(cli, "_root", lambda: project)
    good = str(project / DATA / f"{NAME}.csv")
    for sides in ((good, str(path)), (str(path), good), (str(path), str(path))):
        assert cli.main(["compare", *sides]) == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"posmat: {path}") and message in said.err, said.err
        assert said.err.count("\n") == 1 and not said.out


def test_frames_are_not_compared(project, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_root", lambda: project)
    frame = str(project / DATA / f"{NAME}.memory.csv")
    assert cli.main(["compare", frame, frame]) == 1
    said = capsys.readouterr()
    assert f"posmat: {DATA.as_posix()}/{NAME}.memory.csv: the rows have no column" in said.err
    assert not said.out


def test_machines_and_files_are_compared(tmp_path, monkeypatch, capsys):
    for one in (A, B):
        keep(tmp_path, NAME, one)
    monkeypatch.setattr(cli, "_root", lambda: tmp_path)
    files = [str(tmp_path / f"data/{where[0]}/{where[1]}/{NAME}.csv") for where in MACHINES]
    for words in (["alpha", "beta"], ["alpha/cpu", "beta/cuda"], files):
        assert cli.main(["compare", *words]) == 0
        said = capsys.readouterr().out
        assert "sign-magnitude, whole" in said and "within the noise" in said
    for words, message in (
        (["alhpa", "beta"], "did you mean alpha"),
        (["alpha", files[1]], "not one of each"),
        (["gone.csv", "beta"], "gone.csv is not there"),
    ):
        assert cli.main(["compare", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_single_block_is_not_judged():
    """The seed's loop is one block: its bootstrap has no width, and would always be 'slower'."""
    one, other = (make_rows(TIMES_05, *MACHINES[0], runs=1, slower=by) for by in (1.0, 1.1))
    table = compare_rows(one[one["round"] == 0], other[other["round"] == 0])
    judged = {*table["time_is"], *table["ratio_is"].dropna()}
    assert judged == {"one block, not judged"}
