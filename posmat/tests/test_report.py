"""The driver's command line, a notebook without the driver, and what a user may get wrong."""

import io
import json
import os
import subprocess
import sys

import pytest

from posmat.measure.files import rows_hash
from posmat.measure.run import read_parameters
from posmat.report import UsageError, cli
from posmat.report.cli import Progress
from posmat.report.jobs import devices_here, find_notebooks, plan
from posmat.tests.sample import ROOT, make_project
from posmat.tests.tiny import KEEP, LIGHT, make_notebook

NOTEBOOKS = ROOT / "notebooks"


def test_notebooks_are_found_by_number_and_name():
    stem = "05_positive_matrix_product"
    for name in ("05", "5", stem, "positive_matrix_product", f"notebooks/{stem}.ipynb"):
        assert [path.stem for path in find_notebooks(NOTEBOOKS, [name])] == [stem]
    assert find_notebooks(NOTEBOOKS, []) == sorted(NOTEBOOKS.glob("*.ipynb"))
    with pytest.raises(UsageError, match=f"did you mean {stem}"):
        find_notebooks(NOTEBOOKS, ["05_positve_matrix"])
    # A copy elsewhere is not silently taken for the project's own.
    with pytest.raises(UsageError, match="none of the project's notebooks"):
        find_notebooks(NOTEBOOKS, [f"/elsewhere/{stem}.ipynb"])


def test_a_comma_makes_a_grid_and_every_job_has_its_own_name(tmp_path):
    parameters = "device: str = 'cpu'\nn: int = 1\nof: str = 'a,b'\nto: str = ''"
    notebook = make_notebook(tmp_path, "90_grid", parameters=parameters)
    jobs = plan([notebook], ["cpu", "cuda"], "m", ["n=1,2,3", "to=x,y"])
    assert len({(job.stem, job.device) for job in jobs}) == len(jobs) == 12
    assert {job.parameters["to"] for job in jobs} == {"x", "y"}
    assert {"90_grid-to=x", "90_grid-n=3-to=x"} <= {job.stem for job in jobs}
    assert {job.parameters.get("n") for job in jobs} == {None, 2, 3}  # 1 is the default
    # A text whose default holds a comma is one value; giving it again makes the grid.
    jobs = plan([notebook], ["cpu"], "m", ["of=1,2", "of=3,4"])
    assert [job.parameters["of"] for job in jobs] == ["1,2", "3,4"]


@pytest.mark.parametrize("words", [["-p", "size=1"], ["--parameters"]])
def test_a_notebook_whose_parameters_cannot_be_read_is_named(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    notebook = make_notebook(tmp_path, "91_odd", parameters="sizes: list = [1, 2]  # of")
    assert cli.main(["report", "91", *words]) == 2
    assert "91_odd has the parameter 'sizes: list" in capsys.readouterr().err
    for text in ("{", '{"cells": 3}', '{"nbformat": 4, "cells": [1]}'):
        notebook.write_text(text)
        assert cli.main(["report", "91", *words]) == 2
        assert "cannot be read as a notebook" in capsys.readouterr().err


def test_a_comment_may_hold_what_else_is_in_a_line(tmp_path, capsys, monkeypatch):
    parameters = """rounds: int = 30  # N = 30 is the default
mode: str = 'a # b = c'  # is 'x # y' = "z"
seconds: 'float' = (
    -1.5  # below 0
)
size = rounds = 1  # no declaration
later: int"""
    notebook = make_notebook(tmp_path, "90_equals", KEEP, parameters=parameters)
    declared = read_parameters(notebook)
    assert [*declared] == ["rounds", "mode", "seconds"]
    assert [one.default for one in declared.values()] == [30, "a # b = c", -1.5]
    meanings = ["N = 30 is the default", "is 'x # y' = \"z\"", "below 0"]
    assert [one.meaning for one in declared.values()] == meanings
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    assert cli.main(["report", "90", "--parameters"]) == 0
    assert "rounds   int    30           N = 30 is the default\n" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "quiet"), [(Terminal, False), (Terminal, True), (io.StringIO, False)]
)
def test_progress_is_lines_and_on_a_terminal_the_cell_that_runs(monkeypatch, kind, quiet):
    monkeypatch.setattr(sys, "stderr", kind())
    with Progress(quiet) as progress:
        progress.say("[1/2] 05 on cpu")
        progress.tell(2, 5, "x = 1")
        progress.say("posmat: it failed", always=True)
        told = sys.stderr.getvalue()
    assert ("[1/2] 05 on cpu\n" in told) != quiet and told.count("posmat: it failed\n") == 1
    assert ("cell 2 of 5 (x = 1)" in told) == (kind is Terminal and not quiet)


def test_plain_papermill_runs_a_notebook_from_any_folder(tmp_path):
    words = "-p dtype int8 -p out_features 16 -p in_features 8 -p rounds 1 -p output_dir results"
    command = ["-m", "papermill", str(find_notebooks(NOTEBOOKS, ["1"])[0]), "out.ipynb"]
    done = subprocess.run(
        [sys.executable, *command, "--no-progress-bar", *words.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = [p for p in (tmp_path / "results").glob("01_*.csv") if p.name.count(".") == 1]
    facts = json.loads(rows.with_suffix(".json").read_text())
    assert facts["parameters"]["in_features"] == 8 and "key" not in facts
    assert rows_hash(rows) == facts["rows_sha256"]
    assert not [path for path in rows.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "99"], "no notebook '99': there are 01_matvec"),
        (["report", "05", "-p", "batchsize=1"], "did you mean batch_size"),
        (["report", "05", "-p", "batch_size"], "NAME=VALUE"),
        (["report", "05", "--machine", "A/b"], "is no name"),
        (["report", "05", "--machine", "lab-local"], "keeps for itself"),
        (["report", "05", "--quick", "--machine", "m"], "exclude each other"),
        (["report", "05", "--runs", "0"], "'--runs': 0 is not in the range x>=1; see posmat "),
        (["report", "--device", "gpu"], "not one of 'cpu', 'cuda', 'all'; see posmat report --"),
        (["report", "--every-machine"], "--every-machine needs --scheduler"),
        (["worker"], "Missing argument 'ADDRESS'; see posmat worker --help."),
        (["nothing"], "No such command 'nothing'; see posmat --help."),
        ([], "Missing command; see posmat --help."),
        (["report", "05", "-p", "batch_size=64,x"], "'x' is none"),
        (["report", "05", "-p", "device=cuda"], "chosen with --device"),
        (["report", "05", "-p", "output_dir=x"], "run papermill itself"),
    ],
)
def test_a_wrong_use_is_one_sentence(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("posmat: ")


def test_cuda_that_pytorch_cannot_use_is_refused_or_left_out_aloud(tmp_path, monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    tool = tmp_path / "nvidia-smi"  # the driver is there, and PyTorch is a build for the CPU
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices_here("all", Progress(quiet=True).say) == ["cpu"]
    assert "nothing is run on CUDA: device='cuda' was asked for" in capsys.readouterr().err
    assert cli.main(["report", "05", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("posmat: device='cuda' was asked for") and error.count("\n") == 1


def test_each_verb_says_how_it_is_used(capsys):
    for words in ([], ["report"], ["worker"], ["draw"], ["check"], ["cite"]):
        for flag in ("-h", "--help"):
            assert cli.main([*words, flag]) == 0
            assert capsys.readouterr().out.startswith(f"Usage: {' '.join(['posmat', *words])} ")


def test_every_text_is_utf_8_whatever_the_system_says(tmp_path):
    """The driver and a kernel where texts are ASCII by default, as they are not UTF-8 on Windows.

    An encoding that posmat does not name is an error in both.
    """
    make_project(tmp_path, machines=())
    (tmp_path / "README.md").write_text("# A project – of −128\n", encoding="utf-8")
    filters = "import warnings\nwarnings.simplefilter('ignore', EncodingWarning)\n"
    filters += "warnings.filterwarnings('error', category=EncodingWarning, module='posmat')\n"
    (tmp_path / "sitecustomize.py").write_text(filters, encoding="utf-8")
    code = f"""{LIGHT}
import pathlib
from posmat.report import cli

cli.project_root = lambda: pathlib.Path(sys.argv[1])
for words in ("report 04 --quick --device cpu", "check", "cite magnitude"):
    assert cli.main(words.split()) == 0, words
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    own = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": paths, "POSMAT_LOCKS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code, str(tmp_path)],
        env={**os.environ, **own, "PYTHONWARNDEFAULTENCODING": "1"},
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "1 done, 0 failed" in done.stdout and "pages and provenance belong" in done.stdout
