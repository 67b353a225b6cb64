"""Drawing from data/ alone, and what happens when a file there does not hold."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from posmat.charts import catalogue as figures
from posmat.charts.catalogue import FigureSpec, draw_figure
from posmat.charts.lines import time_per_method
from posmat.measure.files import RecordError, read_rows, rows_digest
from posmat.report import cli
from posmat.report.derive import summarize_groups
from posmat.report.store import KINDS, chosen, find_drawings, find_results
from posmat.report.verbs import redraw
from posmat.tests.sample import MACHINES, PICTURE, TIMES_05, keep, make_project, make_rows

NAME = "05_positive_matrix_product"


@pytest.fixture
def small(tmp_path, blank_pictures) -> Path:
    return make_project(tmp_path, MACHINES[:1])


def contents(root: Path) -> dict[str, bytes]:
    """What `posmat draw` made: figures, tables, pages and the README's block."""
    made = [root / "README.md", *(root / "reports").glob("*.*")]
    made += [*(root / "reports" / "figures").iterdir(), *(root / "reports").rglob("*.table.csv")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(made)}


def test_everything_is_drawn_without_torch_and_twice_the_same(tmp_path, tmp_path_factory):
    project = make_project(tmp_path)
    said, problems = redraw(project)
    assert not problems and said.startswith("6 figures, 6 tables, 2 pages drawn.")
    first = contents(project)
    assert len(first) == 1 + 2 + 3 * 6 + 6
    # Elsewhere, in another process with workers of its own: no path and no time may show.
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(project, elsewhere, ignore=shutil.ignore_patterns("figures", "*.table.csv"))
    code = (
        "import sys, pathlib; from posmat.report import cli; "
        "cli._root = lambda: pathlib.Path(sys.argv[1]); code = cli.main(['draw']); "
        "assert code == 0; sys.exit(1 if {'torch', 'ipykernel'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, elsewhere], check=False)
    assert done.returncode == 0
    assert contents(elsewhere) == first


BAD = {
    "is not the file that its provenance": lambda path: path.write_text(path.read_text()[:-30]),
    "the rows beside it have no provenance": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_file_is_one_sentence_and_the_others_are_drawn(small, why, monkeypatch, capsys):
    BAD[why](small / f"data/alpha/cpu/{NAME}.csv")
    monkeypatch.setattr(cli, "_root", lambda: small)
    assert cli.main(["draw"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"posmat: data/alpha/cpu/{NAME}.") and why in lines[0]
    assert str(small) not in lines[0]
    # The project's README shows that very figure, which is a sentence of its own.
    assert len(lines) == 2 and lines[1].startswith(f"posmat: README.md shows {PICTURE}")
    drawn = {path.stem for path in (small / "reports" / "figures").iterdir()}
    assert PICTURE not in drawn and len(drawn) == 2
    page = (small / "reports" / "index.html").read_text()
    assert PICTURE not in page and "matvec-vs-elementwise-alpha-cpu" in page


@pytest.mark.parametrize("verb", ["draw", "check"])
def test_no_rows_is_one_sentence(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setattr(cli, "_root", lambda: tmp_path)
    assert cli.main([verb]) == 1
    error = capsys.readouterr().err
    assert error == "posmat: there are no rows in data/: run 'posmat report' first.\n"


def test_one_figure_is_drawn_by_its_id_or_its_name(small, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_root", lambda: small)
    assert cli.main(["draw", PICTURE]) == 0
    assert {path.stem for path in (small / "reports" / "figures").iterdir()} == {PICTURE}
    assert cli.main(["draw", "matvec-vs-elementwise"]) == 0
    assert len(list((small / "reports" / "figures").iterdir())) == 3 * 3
    assert cli.main(["draw", "--machine", "gamma"]) == 1
    assert "no rows of the machine 'gamma': there are alpha." in capsys.readouterr().err


def seen(*frames_and_title):
    """A figure's function that shows what it was given."""
    *frames, title = frames_and_title
    return time_per_method(next(one for one in frames if "round" in one), title)


def add(monkeypatch, figure_id: str, *reads: str) -> None:
    def caption(*frames: pd.DataFrame) -> str:
        return " and ".join(f"{len(frame)} x {len(frame.columns)}" for frame in frames)

    spec = FigureSpec(figure_id, NAME, "A title", seen, caption, reads)
    spec = replace(spec, table=lambda *frames: frames[0].head(0))
    monkeypatch.setattr(figures, "FIGURES", [*figures.FIGURES, spec])


def test_a_figure_may_read_a_frame_beside_the_rows(tmp_path, monkeypatch):
    project = make_project(tmp_path, MACHINES[:1])
    add(monkeypatch, "with-memory", "{stem}.csv", "{stem}.memory.csv")
    keep(project, f"{NAME}-scale=0.5", make_rows(TIMES_05, *MACHINES[0]))  # dots in a stem
    (own,) = chosen(find_drawings(find_results(project)), ["with-memory-alpha-cpu"])
    assert not redraw(project, ["with-memory-alpha-cpu"])[1]
    assert redraw(project, ["with-memory"])[1] == [
        f"data/alpha/cpu/{NAME}-scale=0.5.memory.csv is not there, and figure with-memory reads it."
    ]
    rows = own.run.read()
    svg = (project / "reports/figures/with-memory-alpha-cpu.svg").read_text()
    assert f"rows sha256 {rows_digest(own.sources)}" in svg
    assert f"{len(rows)} x {len(rows.columns)} and 1 x 3" in svg


def test_own_runs_are_drawn_without_touching_what_git_tracks(small):
    redraw(small)
    for path in (small / "reports").rglob("*.*"):  # as if another matplotlib had drawn them
        path.write_bytes(path.read_bytes() + b"\n")
    before = contents(small)
    keep(small, NAME, make_rows(TIMES_05, "local", "cpu", "Mine"))
    said, problems = redraw(small, machine="local")
    assert said.startswith("1 figure, 1 table, 2 pages drawn.") and not problems
    after = contents(small)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        "reports/local/cpu/05_positive_matrix_product.table.csv",
        *(f"reports/figures/positive-matrix-product-local-cpu.{kind}" for kind in KINDS),
    }
    page = (small / "reports/local/index.html").read_text()
    assert "positive-matrix-product-local-cpu" in page and PICTURE in page


def test_a_notebook_keeps_the_figure_that_is_drawn_again(tmp_path, tmp_path_factory, monkeypatch):
    """What `Run.save` writes beside staged files carries what `posmat draw` will carry."""
    small = make_project(tmp_path, MACHINES[:1])
    add(monkeypatch, "with-memory", "{stem}.csv", "{stem}.memory.csv")
    redraw(small, [PICTURE, "with-memory"])
    staging = tmp_path_factory.mktemp("staging")
    for path in (small / "data" / "alpha" / "cpu").glob(f"{NAME}*"):
        shutil.copy(path, staging)
    rows = read_rows(staging / f"{NAME}.csv")
    memory = read_rows(staging / f"{NAME}.memory.csv")
    for figure_id, frames in (("positive-matrix-product", [rows]), ("with-memory", [rows, memory])):
        draw_figure(figure_id, *frames).keep(figure_id, staging, NAME, "-x")
        for kind in KINDS:
            drawn = small / "reports" / "figures" / f"{figure_id}-alpha-cpu.{kind}"
            assert (staging / f"{figure_id}-x.{kind}").read_bytes() == drawn.read_bytes()


def test_a_stem_may_begin_as_another_does_and_lack_its_provenance(small):
    for scale in ("0", "0.5"):
        rows = make_rows(TIMES_05, *MACHINES[0])
        keep(small, f"{NAME}-scale={scale}", rows, memory=rows.head(2))
    (small / f"data/alpha/cpu/{NAME}.json").unlink()
    found = {one.variant: one for one in find_results(small) if one.notebook == NAME}
    assert set(found) == {"", "-scale=0", "-scale=0.5"}
    assert len(found["-scale=0.5"].read("memory.csv")) == 2
    with pytest.raises(RecordError, match=f"data/alpha/cpu/{NAME}.json is missing"):
        found[""].read("memory.csv")


@pytest.mark.parametrize("verb", ["draw", "cite"])
def test_a_frame_that_was_cut_off_is_not_drawn_and_not_cited(small, monkeypatch, capsys, verb):
    add(monkeypatch, "of-a-frame", "{stem}.csv", "{stem}.memory.csv")
    monkeypatch.setattr(cli, "_root", lambda: small)
    frame = small / f"data/alpha/cpu/{NAME}.memory.csv"
    frame.write_text(frame.read_text()[:-5])
    assert cli.main([verb, "of-a-frame"]) == 1
    said = capsys.readouterr()
    assert f"{NAME}.memory.csv is not the file that its provenance describes" in said.err
    assert said.err.count("\n") == 1 and "@misc" not in said.out
    assert not [*small.glob("reports/figures/*.*")]


def test_a_chart_that_stumbles_is_told_and_the_others_are_drawn(small, monkeypatch):
    def fail(*_):
        raise RuntimeError("of the test\nwith a second line")

    failing = FigureSpec("failing", NAME, "It fails", fail, lambda rows: "")
    monkeypatch.setattr(figures, "FIGURES", [failing, *figures.FIGURES])
    said, problems = redraw(small)
    assert said.startswith("3 figures")
    told = f"cannot be drawn from data/alpha/cpu/{NAME}.csv: RuntimeError: of the test"
    assert problems == [f"failing-alpha-cpu {told}"]


def test_sizes_and_parts_make_groups_with_baselines_of_their_own():
    rows = [make_rows(TIMES_05, *MACHINES[0], batch_size=size, slower=size) for size in (1, 2)]
    table = summarize_groups(pd.concat(rows, ignore_index=True))
    assert table.index.names == ["batch_size", "method"] and len(table) == 12
    assert table.loc[(2, "float32 layer"), "ratio"] == 1
    ratio = table.loc[(2, "float32 layer"), "median"] / table.loc[(1, "float32 layer"), "median"]
    assert 1.9 < ratio < 2.1
    blocks, whole = "element-wise, in blocks", "sign-magnitude, whole"
    parts = {"forms": {"float32 layer": 4e-3, blocks: 6e-2}, "whole": {blocks: 6e-2, whole: 0.9}}
    rows = [make_rows(times, *MACHINES[0], part=name) for name, times in parts.items()]
    table = summarize_groups(pd.concat(rows, ignore_index=True))
    assert table.index.names == ["part", "method"]
    assert set(table.loc["forms", "baseline"]) == {"float32 layer"}
    assert set(table.loc["whole", "baseline"]) == {blocks}
    assert 14 < table.loc[("whole", whole), "ratio"] < 16


def test_a_reader_that_leaves_is_no_traceback(small):
    """Each verb in a process of its own, which is forked from one that has loaded all it needs."""
    code = """
import os, pathlib, sys
import posmat.charts.catalogue, posmat.report.derive
from posmat.report import cli

cli._root = lambda: pathlib.Path(sys.argv[1])
for words in ("cite", sys.argv[2]), ("check",), ("draw", sys.argv[2]), ("report", "--parameters"):
    if not os.fork():
        sys.exit(cli.main([*words]))
    if os.waitstatus_to_exitcode(os.wait()[1]) != 1:
        print(words, "did not notice", file=sys.stderr)
"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code, small, PICTURE]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
    assert done.returncode == 0 and "did not notice" not in done.stderr, done.stderr
