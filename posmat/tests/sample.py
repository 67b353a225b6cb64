"""A small project with published rows: made from numbers, kept by the project's own functions."""

import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from posmat.machine import describe_host
from posmat.measure.files import rows_hash
from posmat.measure.run import describe_sources
from posmat.measure.summary import AGAIN, FLOOR
from posmat.report.freshness import sources_key
from posmat.report.gallery import write_page
from posmat.report.store import Result

ROOT = Path(__file__).resolve().parents[2]
MACHINES = (("alpha", "cpu", "A Processor"), ("beta", "cuda", "A GPU <x>"))
TIMES_01 = {"W @ x": 2e-4, "W * x": 4e-4}
TIMES_05 = {
    "float32 layer": 4e-3,
    "element-wise, in blocks": 6e-2,
    "sign-magnitude, in blocks": 0.16,
    "sign-magnitude, whole": 0.9,
}
PICTURE = "positive-matrix-product-alpha-cpu"


def make_rows(times: dict[str, float], machine: str, device: str, processor: str, **tags):
    """Rows as `time_methods` leaves them, with both controls."""
    tags = {"dtype": "int8", "runs": 3, "slower": 1.0, "batch_size": 8, "seed": 0} | tags
    runs, slower = tags.pop("runs"), tags.pop("slower")
    noise = np.random.default_rng(tags.pop("seed"))
    baseline = next(iter(times))
    lines = [
        {"run": run, "notebook": "", "method": method, "state": "timed", "exact": True}
        | {"max_error": None, "machine": machine, "device": device, "processor": processor}
        | {"torch": "2.13.0", "out_features": 4, "in_features": 2, "threads": 1, "clock": "host"}
        | {"cache": "hot", "round": index, "position": 0, "at_s": 0.1 * index, "number": 2}
        | {"seconds": slower * base * noise.normal(1, 0.01), "cpu_s": base, "first_s": base}
        | {"why": None, **tags}
        for run in range(runs)
        for index in range(9)
        for method, base in (times | {baseline + AGAIN: times[baseline], FLOOR: 7e-7}).items()
    ]
    return pd.DataFrame(lines).convert_dtypes()


def keep(root: Path, stem: str, rows: pd.DataFrame, **frames: pd.DataFrame) -> Path:
    """Write rows, frames and provenance of a run to where they belong; the path of the rows."""
    machine, device = rows["machine"].iloc[0], rows["device"].iloc[0]
    folder = root / "data" / machine / device
    folder.mkdir(parents=True, exist_ok=True)
    host = describe_host() | {"host_identity": machine, "variables": {}}
    (folder.parent / "host.json").write_text(json.dumps(host))
    path = folder / f"{stem}.csv"
    rows.assign(notebook=stem.partition("-")[0]).to_csv(path, index=False)
    digests = {}
    for what, frame in frames.items():
        frame.to_csv(folder / f"{stem}.{what}.csv", index=False)
        digests[what] = rows_hash(folder / f"{stem}.{what}.csv")
    facts = {"notebook": stem.partition("-")[0], "machine": machine, "parameters": {"threads": 1}}
    facts |= {"runs": int(rows["run"].nunique()), "rows": len(rows), "rows_sha256": rows_hash(path)}
    facts |= {"started": "2026-11-01T10:00:00+00:00", "host": host, "sources": describe_sources()}
    facts |= {"device": {"torch": "2.13.0", "python": "3.11.7"}, "frames_sha256": digests}
    facts["key"] = sources_key(ROOT / "notebooks" / f"{facts['notebook']}.ipynb")
    (folder / f"{stem}.json").write_text(json.dumps(facts))
    return path


def make_project(root: Path, machines=MACHINES, executed: bool = False) -> Path:
    """A project with rows of notebooks 01 (two variants) and 05 on machines, and their reports."""
    for name in ("CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    begin, end = f"<!-- posmat:figure {PICTURE} -->", "<!-- /posmat:figure -->"
    (root / "README.md").write_text(f"# A project\n\n{begin}\n{end}\n\nThe end.\n")
    for place, where in enumerate(machines):
        memory = pd.DataFrame({"method": ["float32 layer"], "state": ["measured"], "peak": [1.5]})
        for stem, times, dtype, frames in (
            ("01_matvec_vs_elementwise", TIMES_01, "float32", {}),
            ("01_matvec_vs_elementwise-dtype=int8", TIMES_01, "int8", {}),
            ("05_positive_matrix_product", TIMES_05, "int8", {"memory": memory}),
        ):
            keep(root, stem, make_rows(times, *where, dtype=dtype, seed=place), **frames)
            if executed:
                execute(root / "reports" / where[0] / where[1], stem)
    return root


def execute(folder: Path, stem: str) -> None:
    """An executed notebook and its page, as the driver leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    output = new_output("stream", text="a line that is long enough to scroll " * 9)
    cells = [new_markdown_cell(f"# {stem}"), new_code_cell("1", outputs=[output])]
    cells.append(new_markdown_cell("## What we found"))
    nbformat.write(new_notebook(cells=cells), folder / f"{stem}.ipynb")
    write_page(folder / f"{stem}.ipynb", Result(folder.parents[2], *folder.parts[-2:], stem))
