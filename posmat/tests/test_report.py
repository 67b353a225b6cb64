"""The driver's command line, a notebook without the driver, and what a user may get wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posmat.measure.files import RecordError, read_rows, rows_hash
from posmat.measure.run import read_parameters
from posmat.report import UsageError, cli
from posmat.report.cli import Progress
from posmat.report.jobs import devices_here, find_notebooks, plan
from posmat.tests.sample import make_project
from posmat.tests.tiny import KEEP, LIGHT, make_notebook, report

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def test_notebooks_are_found_by_number_and_name():
    names = ["05", "5", "05_positive_matrix_product", "positive_matrix_product"]
    names.append("notebooks/05_positive_matrix_product.ipynb")
    for name in names:
        assert [p.stem for p in find_notebooks(NOTEBOOKS, [name])] == ["05_positive_matrix_product"]
    assert find_notebooks(NOTEBOOKS, []) == sorted(NOTEBOOKS.glob("*.ipynb"))
    with pytest.raises(UsageError, match="05_positive_matrix_product"):
        find_notebooks(NOTEBOOKS, ["05_positve_matrix"])
    # A copy elsewhere is not silently taken for the project's own.
    with pytest.raises(UsageError, match="none of the project's notebooks"):
        find_notebooks(NOTEBOOKS, ["/elsewhere/05_positive_matrix_product.ipynb"])


def test_parameters_are_converted_and_name_the_variant():
    notebook = find_notebooks(NOTEBOOKS, ["5"])
    (job,) = plan(notebook, ["cpu"], "m", [("batch_size", "64"), ("seed", "0")])
    assert job.parameters["batch_size"] == 64
    assert job.stem == "05_positive_matrix_product-batch_size=64"
    with pytest.raises(UsageError, match="did you mean batch_size"):
        plan(notebook, ["cpu"], "m", [("batchsize", "64")])
    with pytest.raises(UsageError, match="'abc' is none"):
        plan(notebook, ["cpu"], "m", [("batch_size", "abc")])


def test_a_comma_makes_a_grid_and_every_job_has_its_own_name(tmp_path):
    lines = ["device: str = 'cpu'  # where", "n: int = 1  # of", "of: str = 'a,b'  # list"]
    notebook = make_notebook(
        tmp_path, "90_grid", parameters="\n".join([*lines, "to: str = ''  # x"])
    )
    jobs = plan([notebook], ["cpu", "cuda"], "m", [("n", "1,2,3"), ("to", "x,y")])
    assert len({(job.stem, job.device) for job in jobs}) == len(jobs) == 12
    assert {job.parameters["to"] for job in jobs} == {"x", "y"}
    assert "90_grid-n=3-to=x" in {job.stem for job in jobs}
    # A text whose default holds a comma is one value; giving it again makes the grid.
    jobs = plan([notebook], ["cpu"], "m", [("of", "1,2"), ("of", "3,4")])
    assert [job.parameters["of"] for job in jobs] == ["1,2", "3,4"]


def test_a_notebook_whose_parameters_cannot_be_read_is_named(tmp_path):
    notebook = make_notebook(tmp_path, "91_odd", parameters="sizes: list = [1, 2]  # of")
    with pytest.raises(RecordError, match="91_odd has the parameter 'sizes: list"):
        plan([notebook], ["cpu"], "m")
    for text in ("{", '{"cells": 3}', '{"nbformat": 4, "cells": [1]}'):
        notebook.write_text(text)
        with pytest.raises(RecordError, match="cannot be read as a notebook"):
            plan([notebook], ["cpu"], "m")


def test_parameters_are_listed(capsys):
    assert cli.main(["report", "05", "--parameters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "05_positive_matrix_product" and lines[1].split()[0] == "name"
    (line,) = [line for line in lines if line.split()[0] == "batch_size"]
    assert line.split()[:3] == ["batch_size", "int", "256"] and line.endswith("M, rows of X")


def test_a_comment_may_hold_what_else_is_in_a_line(tmp_path, capsys, monkeypatch):
    lines = [
        "rounds: int = 30  # N = 30 is the default",
        "mode: str = 'a # b = c'  # is 'x # y' = \"z\"",
        "seconds: 'float' = (",
        "    -1.5  # below 0",
        ")",
        "size = rounds = 1  # no declaration",
        "del size",
        "later: int",
    ]
    notebook = make_notebook(tmp_path, "90_equals", KEEP, parameters="\n".join(lines))
    declared = read_parameters(notebook)
    assert [*declared] == ["rounds", "mode", "seconds"]
    assert [one.default for one in declared.values()] == [30, "a # b = c", -1.5]
    meanings = ["N = 30 is the default", "is 'x # y' = \"z\"", "below 0"]
    assert [one.meaning for one in declared.values()] == meanings
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    assert cli.main(["report", "90", "--parameters"]) == 0
    assert "rounds   int    30           N = 30 is the default\n" in capsys.readouterr().out


def test_a_parameter_with_a_second_equals_sign_is_really_given(tmp_path):
    parameters = "size: int = 30  # N = 30 is the default\nvalue: int = 1  # of every row"
    make_notebook(tmp_path, "90_equals", KEEP, parameters=parameters)
    code, _, err = report(tmp_path, "-p", "size=3")
    assert code == 0, err
    rows = tmp_path / "data" / "local" / "all" / "90_equals-size=3.csv"
    assert rows.read_text().splitlines() == ["round,seconds", "0,1", "1,1", "2,1"]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Path:
    """The rows of notebook 01, which papermill alone ran, in another folder.

    Its device lacks an operation: integer matrix times vector is refused, as CUDA refuses it, at
    the sizes that are timed.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules['rfc3987_syntax'] = None\n"  # tiny.LIGHT says why
        "if 'ipykernel_launcher' in ' '.join(sys.orig_argv):\n"
        "    import torch\n"
        "    real = torch.Tensor.__matmul__\n"
        "    def refuse(self, other):\n"
        "        if other.ndim == 1 and not self.is_floating_point() and self.numel() > 99:\n"
        "            raise RuntimeError('\"addmv_impl_cuda\" not implemented for \\'Int\\'')\n"
        "        return real(self, other)\n"
        "    torch.Tensor.__matmul__ = refuse\n"
    )
    given = {"dtype": "int8", "out_features": 16, "in_features": 8, "rounds": 1}
    given["output_dir"] = "results"
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    command = ["-m", "papermill", str(find_notebooks(NOTEBOOKS, ["1"])[0]), "out.ipynb"]
    done = subprocess.run(
        [sys.executable, *command, "--no-progress-bar", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = [p for p in (folder / "results").glob("01_*.csv") if p.name.count(".") == 1]
    return rows


def test_plain_papermill_runs_a_notebook_from_any_folder(by_hand):
    facts = json.loads(by_hand.with_suffix(".json").read_text())
    assert facts["parameters"]["in_features"] == 8 and "key" not in facts
    assert rows_hash(by_hand) == facts["rows_sha256"]
    assert not [path for path in by_hand.parent.iterdir() if path.name.startswith(".")]


def test_a_device_without_an_operation_keeps_its_rows(by_hand):
    rows = read_rows(by_hand)
    refused = rows[rows["state"] == "not supported"]
    assert set(refused["method"]) == {"W @ x", "W @ x (again)", "W @ x, widened to int32"}
    assert refused["seconds"].isna().all() and refused["why"].str.contains("addmv_impl").all()
    summed = rows[rows["method"] == "W * x, widened and summed"]
    assert (summed["state"] == "timed").all() and summed["exact"].all()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["report", "99"], 2, "no notebook '99': there are 01_matvec"),
        (["report", "05", "-p", "batchsize=1"], 2, "did you mean batch_size"),
        (["report", "05", "-p", "batch_size"], 2, "NAME=VALUE"),
        (["report", "05", "--machine", "A/b"], 2, "is no name"),
        (["report", "05", "--machine", "quick"], 2, "keeps for itself"),
        (["report", "05", "--machine", "figures"], 2, "keeps for itself"),
        (["report", "05", "--machine", "lab-local"], 2, "keeps for itself"),
        (["report", "05", "--quick", "--machine", "m"], 2, "exclude each other"),
        (["report", "05", "--runs", "0"], 2, "'--runs': 0 is not in the range x>=1; see posmat "),
        (["report", "05", "--cell-timeout", "0"], 2, "'--cell-timeout': 0 is not in the range"),
        (["report", "--runs", "x"], 2, "'x' is not a valid integer"),
        (["report", "--device", "gpu"], 2, "not one of 'cpu', 'cuda', 'all'; see posmat report --"),
        (["report", "--quik"], 2, "--quick"),
        (["worker"], 2, "Missing argument 'ADDRESS'; see posmat worker --help."),
        (["cite", "a", "b"], 2, "unexpected extra argument"),
        (["nothing"], 2, "No such command 'nothing'; see posmat --help."),
        ([], 2, "Missing command; see posmat --help."),
        (["report", "05", "-p", "batch_size=64,x"], 2, "'x' is none"),
        (["report", "05", "-p", "device=cuda"], 2, "chosen with --device"),
        (["report", "05", "-p", "output_dir=x"], 2, "run papermill itself"),
    ],
)
def test_a_wrong_use_is_one_sentence(words, code, message, capsys):
    assert cli.main(words) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("posmat: ")


def test_cuda_that_is_not_there_is_refused_before_anything_runs(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cli.main(["report", "05", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "device='cuda' was asked for" in error
    assert "Traceback" not in error and error.count("\n") == 1


def test_a_device_that_pytorch_cannot_use_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    tool = tmp_path / "nvidia-smi"  # the driver is there, and PyTorch is a build for the CPU
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices_here("all", Progress(quiet=True).say) == ["cpu"]
    assert "nothing is run on CUDA: device='cuda' was asked for" in capsys.readouterr().err


def test_each_verb_says_how_it_is_used(capsys):
    for words in ([], ["report"], ["worker"], ["draw"], ["check"], ["cite"]):
        for flag in ("-h", "--help"):
            assert cli.main([*words, flag]) == 0
            assert capsys.readouterr().out.startswith(f"Usage: {' '.join(['posmat', *words])} ")


def test_a_reader_who_has_gone_is_no_traceback():
    code = f"{LIGHT}\nfrom posmat.report import cli\nsys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", "--parameters"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        driver.stdout.close()
        assert driver.stderr.read() == b"" and driver.wait() == 1


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
    assert (
        "1 done, 0 failed" in done.stdout and "tables, pages and provenance belong" in done.stdout
    )
