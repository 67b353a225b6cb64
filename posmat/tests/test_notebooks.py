"""Every notebook in a kernel of its own, once, by the driver at small sizes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from posmat.measure.files import QUICK, read_rows, rows_hash
from posmat.report import jobs
from posmat.report.jobs import find_notebooks, plan, run_job
from posmat.report.verbs import redraw

ROOT = Path(__file__).resolve().parents[2]
JOBS = plan(find_notebooks(ROOT / "notebooks", []), ["cpu"], QUICK)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A project's folder that the jobs fill in their order: the last one reads the others' rows."""
    return tmp_path_factory.mktemp("project")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_notebook_runs_and_leaves_its_files(job, root, monkeypatch):
    monkeypatch.setattr(jobs, "busy_warning", lambda: "")  # which looks for half a second
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests beside this one would make several wait
    monkeypatch.setenv("POSMAT_LOCKS", str(root))  # a measurement on this host holds up no test
    job = replace(job, root=root)
    outcome = run_job(job)
    assert (outcome.state, outcome.message) == ("done", "")
    data, reports = job.folder, job.reports
    rows, facts = data / f"{job.stem}.csv", json.loads((data / f"{job.stem}.json").read_text())
    assert facts["rows_sha256"] == rows_hash(rows) and len(read_rows(rows)) == facts["rows"] > 0
    executed = nbformat.read(reports / f"{job.stem}.ipynb", as_version=4)
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code")
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = [output for output in outputs if output.get("name") == "stderr"]
    assert not said, "a report has results in it, not warnings"
    text = (reports / f"{job.stem}.ipynb").read_text()
    assert str(root) not in text and str(ROOT) not in text
    page = (reports / f"{job.stem}.html").read_text()
    assert "<script" not in page and 'src="http' not in page and '<link rel="stylesheet' not in page
    pictures = re.findall(r'<img [^>]*?src="([^"]+)"', page)
    assert pictures and all((reports / unquote(picture)).is_file() for picture in pictures)
    assert "data:image" not in page and 'alt="No description' not in page
    assert (reports / f"{job.stem}.table.csv").exists()
    assert run_job(job, force=False).state == "skipped"
    assert len(list((root / "reports" / "figures").glob("*.svg"))) >= 1


def test_what_they_left_is_drawn_again_without_a_word(root):
    shutil.copy(ROOT / "CITATION.cff", root)
    assert redraw(root, machine=QUICK)[1] == []
