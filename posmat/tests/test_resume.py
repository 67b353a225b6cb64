"""What is up to date is not run again, and nothing is ever half-written, whatever is killed."""

import hashlib
import json
import random
import shutil
import time

import nbformat
import psutil

from posmat.measure.files import LOCAL
from posmat.report import cli, freshness
from posmat.report.freshness import code_of, job_key, sources_key, why_stale
from posmat.report.jobs import find_notebooks, plan
from posmat.report.verbs import check_project
from posmat.tests.sample import ROOT
from posmat.tests.tiny import KEEP, make_notebook, report, start, wait_for


def stale(notebook, runs=1, **given) -> str:
    """Why the job of a notebook is to be run."""
    (job,) = plan(
        [notebook], ["cpu"], LOCAL, [f"{name}={text}" for name, text in given.items()], runs
    )
    return why_stale(job, job_key(job))


def test_only_what_is_not_up_to_date_is_run(tmp_path):
    first = make_notebook(tmp_path, "01_first", KEEP)
    second = make_notebook(tmp_path, "02_second", "1 + 1  # a comment", KEEP)
    assert stale(first) == "no rows yet"
    assert report(tmp_path)[0] == 0
    code, out, err = report(tmp_path)
    assert (code, err) == (0, "") and "\n0 done, 0 failed, 2 skipped. Look at " in out

    # Prose, comments and layout make nothing stale; code does.
    notebook = nbformat.read(second, as_version=4)
    notebook.cells[0].source, notebook.cells[2].source = "# other words", "1  +  1  # another"
    nbformat.write(notebook, second)
    assert stale(second) == ""
    make_notebook(tmp_path, "02_second", "1 + 2", KEEP)
    assert stale(second) == "the notebook's code changed"
    assert stale(first, value="2") == "no rows yet", "another variant has rows of its own"
    assert stale(first, runs=2) == "1 of 2 runs"
    assert "\n1 done, 0 failed, 1 skipped. Look at " in report(tmp_path)[1]
    assert "\n1 done, 0 failed, 0 skipped. Look at " in report(tmp_path, "01", "--force")[1]
    assert "\n1 done, 0 failed, 0 skipped. Look at " in report(tmp_path, "01", "--quick")[1]

    # The provenance has what a reader needs to see why; files that are not its own do not pass.
    data, reports = (tmp_path / kind / "local" / "all" for kind in ("data", "reports"))
    facts = json.loads((data / "01_first.json").read_text())
    parts = {"notebook", "parameters", "rooms", "host", "device", "torch"}
    assert set(facts["key"]) == parts and facts["warnings"] == []
    facts["key"]["torch"] = "1.0"
    (data / "01_first.json").write_text(json.dumps(facts))
    assert stale(first) == "torch changed"
    with (data / "02_second.csv").open("a") as rows:
        rows.write("3,1\n")
    assert stale(second) == "the rows are not those of the provenance"
    (reports / "02_second.ipynb").unlink()
    assert stale(second) == "02_second.ipynb is not there"
    (data / "02_second.json").write_text("{")
    assert stale(second) == "no rows yet"


def test_an_edit_makes_stale_what_reaches_its_room(tmp_path, monkeypatch):
    package = tmp_path / "posmat"
    shutil.copytree(freshness.PACKAGE, package, ignore=shutil.ignore_patterns("tests", "__pyc*"))
    layer = make_notebook(tmp_path, "01_layer", "import posmat as pm", "pm.exact_product", KEEP)
    text = "import posmat as pm; pm.inexact_product"
    inexact = make_notebook(tmp_path, "02_inexact", "import sys", f"{text!r}", KEEP)
    assert report(tmp_path)[0] == 0
    monkeypatch.setattr(freshness, "PACKAGE", package)
    monkeypatch.setattr(cli, "_root", lambda: tmp_path)

    def told() -> list[str]:
        why = [stale(notebook) for notebook in (layer, inexact)]
        stems = zip(("01_layer", "02_inexact"), why, strict=True)
        said = "; ".join(f"{stem} ({one})" for stem, one in stems if one)
        older = check_project(tmp_path)[1]
        assert older == [f"data/local/all: made by older sources: {said}"] * bool(said)
        return why

    def edit(name: str, old: str, new: str) -> None:
        source = (package / name).read_text(encoding="utf-8")
        assert old in source
        (package / name).write_text(source.replace(old, new, 1), encoding="utf-8")

    assert told() == ["", ""]
    edit("multipliers/product.py", '"""', '"""Mended. ')
    edit("charts/catalogue.py", "import ", "import this, ")
    edit("measure/summary.py", "def ", "A = 1\n\n\ndef ")
    assert told() == ["", ""]
    edit("multipliers/table.py", "def ", "A = 1\n\n\ndef ")
    assert told() == ["", "posmat/multipliers changed"]
    edit("layer/problem.py", "def ", "A = 1\n\n\ndef ")
    assert told() == ["posmat/layer changed", "posmat/layer, posmat/multipliers changed"]


def test_every_notebook_reaches_what_it_uses_and_no_more():
    notebooks = find_notebooks(ROOT / "notebooks", [])
    reached = {path.stem[:2]: set(sources_key(path)["rooms"]) for path in notebooks}
    assert reached.pop("11") == {"measure.summary", "measure.seed"}
    assert all({"measure", "layer"} <= rooms for rooms in reached.values())
    assert [name for name in reached if "multipliers" in reached[name]] == ["08", "09", "10"]


def test_docstrings_and_comments_are_no_code():
    bare = "def f(x):\n    return x + 1\n\n'shown'"
    told = '"""Of a module."""\n' + bare.replace("x):", 'x):  # why\n    """Give."""\n')
    assert code_of(told) == code_of(bare)
    assert code_of(bare) != code_of(bare.replace("1", "2"))
    # Pinned, because every version of Python must write the same.
    assert code_of("f'{a!r:>3}'").startswith('["Module", ["body", [["Expr", ["value", ["JoinedStr"')
    assert "shown" in code_of("'shown'") and code_of("%magic") == "%magic"


def test_a_notebook_that_reads_rows_depends_on_all_rows(tmp_path):
    path = make_notebook(tmp_path, "10_reads", KEEP)
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["posmat"] = {"reads": "rows"}
    nbformat.write(notebook, path)
    device = 'device: str = "cpu"  # x'
    make_notebook(tmp_path, "01_first", "value = size = 1", KEEP, parameters=device)
    words = ["--device", "cpu"]
    assert "\n2 done" in report(tmp_path, *words)[1]
    assert "\n0 done, 0 failed, 2 skipped" in report(tmp_path, *words)[1]
    make_notebook(tmp_path, "01_first", "value = size = 2", KEEP, parameters=device)
    code, out, err = report(tmp_path, *words)
    assert code == 0 and "\n2 done" in out
    assert "01_first on cpu (local), the notebook's code changed, about 0:00:07 as last time" in err
    assert "10_reads (local), rows changed" in err


def test_runs_at_the_same_time_take_turns_and_a_killed_one_blocks_nobody(tmp_path):
    log = tmp_path / "log"
    turn = f"""
import time
began = time.time()
time.sleep(0.2)
with open({str(log)!r}, "a") as log:
    print(began, time.time(), file=log)
"""
    parameters = 'device: str = "cpu"  # x\nvalue: int = 1  # x\nsize: int = 1  # x'
    make_notebook(tmp_path, "01_turn", turn, KEEP, parameters=parameters)
    killed = start(tmp_path, "--device", "cpu", "-p", "value=0")
    wait_for(psutil.Process(killed.pid).children)
    killed.kill()
    killed.communicate()
    drivers = [start(tmp_path, "--device", "cpu", "-p", f"value={n}") for n in (1, 2)]
    told = "".join(driver.communicate(timeout=60)[1] for driver in drivers)
    assert told.count("another run is timing on cpu: 01_turn") == 1
    assert [driver.returncode for driver in drivers] == [0, 0]
    *_, (_, first_end), (second_began, _) = sorted(
        tuple(map(float, line.split())) for line in log.read_text().splitlines()
    )
    assert first_end < second_began


def test_twenty_kills_leave_nothing_unreadable(tmp_path):
    big = "print('x' * 1_000_000)"
    for name in ("01_big", "02_big"):
        make_notebook(tmp_path, name, big, KEEP)
    seed = random.Random(0)
    folders = [tmp_path / kind / "local" / "all" for kind in ("data", "reports")]
    promoted = 0
    for kill in range(20):
        left = set(tmp_path.glob(".posmat/*/results/*"))
        driver = start(tmp_path, "--quiet", "-p", f"size={100_000 + kill}", "-p", "mode=b,c")
        # Mostly while files are written or moved, which is short; else at any moment.
        awaited = (None, "data/local/all/*", ".posmat/*/results/*.ipynb", ".posmat/*/results/*")
        if pattern := awaited[kill % 4]:
            while not set(tmp_path.glob(pattern)) - left and driver.poll() is None:
                time.sleep(0.005)
        time.sleep(seed.uniform(0, (2, 0.003, 0.3, 0.1)[kill % 4]))
        driver.kill()
        driver.communicate()
        promoted += check_readable(folders)
        for path in tmp_path.glob("data/local/all/*"):
            path.unlink()
    assert promoted, "no kill came after a promotion: the test says nothing"
    code, out, _ = report(tmp_path, "-p", "size=9")
    assert code == 0 and "\n2 done, 0 failed, 0 skipped" in out
    assert not list((tmp_path / ".posmat").iterdir())


def check_readable(folders) -> int:
    """Read every file of a project's folders; how many files of rows there were."""
    found = 0
    for path in (path for folder in folders if folder.exists() for path in folder.iterdir()):
        assert path.suffix in (".csv", ".json", ".ipynb", ".html"), path
        text = path.read_text()
        if path.suffix == ".csv":
            found += 1
            assert text.endswith("\n") and len(text.splitlines()) > 100_000
        elif path.suffix == ".html":
            assert text.endswith("</html>\n")
        elif path.suffix == ".json":
            rows = path.with_suffix(".csv").read_bytes()
            assert json.loads(text)["rows_sha256"] == hashlib.sha256(rows).hexdigest()
        else:
            json.loads(text)
    return found
