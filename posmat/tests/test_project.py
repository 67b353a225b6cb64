"""What a fresh clone must have: clean sources, versions in one place, a set-up that says why."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import posmat as pm
from posmat.measure.run import read_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTED = subprocess.run(["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True)
KINDS = (".py", ".md", ".toml", ".txt", ".yml", ".cff", ".ipynb", "Makefile")
TEXTS = [path for path in LISTED.stdout.splitlines() if path.endswith(KINDS)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_source_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "papermill" not in notebook.metadata
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and code[0] is tagged[0]
    declared = read_parameters(path).values()  # typed literals, or it is an error
    assert len(declared) == len(code[0].source.splitlines())
    assert all(len(one.meaning) >= 5 for one in declared)


def test_versions_are_pinned_in_one_place():
    constraints = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in constraints
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    for name in ("pyproject.toml", "environment.yml", "Makefile", "README.md"):
        text = re.sub("(?s)<!-- posmat:figure .*?/posmat:figure", "", (ROOT / name).read_text())
        assert "2.13.0" not in text, name  # but for what a figure was measured with
    assert '"torch>=2.9"' in (ROOT / "pyproject.toml").read_text()
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = [line.strip() for line in lines if line.strip().startswith("- ")]
    assert listed[-4:] == ["- pip", "- pip:", "- -c constraints.txt", "- -e ."]


def test_no_text_names_a_registry_or_a_home():
    words = ["pypi" + ".org", "files.python" + "hosted", "/work" + "/", "/root" + "/"]
    for path in TEXTS:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


def test_every_text_is_read_and_written_in_an_encoding_that_is_named():
    unnamed = []
    for path in (path for path in TEXTS if path.endswith(".py") and "/tests/" not in path):
        for call in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) == "os.open":
                continue
            words = {word.arg for word in call.keywords}
            name = ast.unparse(call.func).rpartition(".")[2]
            of_files = name in ("read_text", "write_text", "open")
            binary = {"'rb'", "'wb'"} & set(map(ast.unparse, call.args))
            if ((of_files and not binary) or "text" in words) and "encoding" not in words:
                unnamed.append(f"{path}:{call.lineno}")
    assert not unnamed


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder with what `make` reads."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("sys.version_info = (3, 10, 2)", "needs Python 3.11 or newer, and"),
        ("sys.modules['ensurepip'] = None", "needs the venv module, and"),
    ],
)
def test_a_python_that_will_not_do_is_refused_in_one_sentence(bare, old, message):
    (bare / "sitecustomize.py").write_text(f"import sys\n{old}\n")
    python = bare / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{bare}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = ["make", "-C", str(bare), "test", f"PYTHON={python}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (bare / ".venv").exists()


@pytest.mark.parametrize(("target", "extra"), [("report", 0), ("lab", 0), ("test", 1)])
def test_the_tools_of_the_tests_are_installed_for_the_tests_alone(bare, target, extra):
    command = ["make", "--dry-run", "-C", str(bare), target]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("pip install") == 1 + extra
    assert done.stdout.count("[test]") == extra


def test_the_driver_loads_neither_torch_nor_dask():
    code = (
        "import sys, posmat.report.cli, posmat.report.jobs, posmat.charts.catalogue; "
        "sys.exit(bool({'torch', 'dask', 'distributed'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_an_unknown_one_is_refused():
    import posmat

    for name in posmat.__all__:
        assert getattr(posmat, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = posmat.no_such_name


def test_what_the_readme_shows_of_the_library_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    body = "{ return (B & ~1) * A; }"
    source = f"#include <stdint.h>\nint16_t mul8s_mine(int8_t A, int8_t B) {body}\n"
    (tmp_path / "mul8s_mine.c").write_text(source, encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"(?s)```python\n(.*?)```", text)
    exec(first, {})
    try:
        pm.compiler_command()
    except pm.NotAvailable as reason:
        pytest.skip(str(reason))
    shown = {}
    exec(second, shown)
    assert "WCE=128" in capsys.readouterr().out
    w = shown["W"].bitwise_and(~1)  # the second parameter is the weight
    assert (shown["Y"] == pm.integer_product(shown["X"], w)).all()


def test_the_readme_tells_the_size_of_helper_and_driver():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(r"helper has about ([\d,]+) lines, and the driver .* about ([\d,]+)\.", text)
    package = [path for path in (ROOT / "posmat").rglob("*.py") if "tests" not in path.parts]
    for number, is_driver in zip(told.groups(), (False, True), strict=True):
        own = [path for path in package if ("report" in path.parts) == is_driver]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own)
        assert abs(int(number.replace(",", "")) - lines) <= 100
