import csv
import json
import os
import re

import pandas as pd
import pytest
import torch

from posmat.layer.problem import ProblemSize
from posmat.layer.products import linear_product
from posmat.machine import JOB_VARIABLE
from posmat.measure import files, timing
from posmat.measure import run as records
from posmat.measure.files import RecordError, claim_machine, promote, read_rows, rows_hash, variant
from posmat.measure.memory import peak_memory
from posmat.measure.predictions import FAILED, KEPT, NOT_MEASURED, OPEN, score_predictions
from posmat.measure.run import start_run
from posmat.measure.summary import summarize
from posmat.tests.sample import ROOT

PUBLISHED = [
    path
    for folder in ("data", "reports")
    for path in sorted((ROOT / folder).rglob("*.csv"))
    if not {"local", "quick"} & set(path.parts)
]
NAME = "05_positive_matrix_product"
DEFAULTS = {"device": "cpu", "batch_size": 256, "dtype": "float32", "output_dir": ""}


def test_a_variant_is_made_from_what_differs():
    assert variant(DEFAULTS, DEFAULTS) == ""
    changed = DEFAULTS | {"batch_size": 64, "dtype": "int8", "device": "cuda", "output_dir": "x"}
    assert variant(changed, DEFAULTS) == "-batch_size=64-dtype=int8"
    names = {variant({"path": value}, {"path": ""}) for value in ("a/b", "a_b", "a b", -5, "5")}
    assert len(names) == 5 and "-path=a_b" in names, "two values never have one name"
    long = [variant({f"name_{i}": "x" * 99 for i in range(k)}, {}) for k in (8, 9)]
    assert len(set(long)) == 2 and max(map(len, long)) <= 150


def test_each_file_has_its_folder():
    folders = {"data/m/cpu": ["csv", "json", "memory.csv"], "reports/figures": ["svg"]}
    for folder, ends in (folders | {"reports/m/cpu": ["table.csv", "ipynb", "html"]}).items():
        assert {files.folder_of(ROOT, f"05_x.{end}", "m", "cpu") for end in ends} == {ROOT / folder}


OTHER = '{"host_identity": "other", "processor": "Another Processor"}'


@pytest.mark.parametrize("text", [OTHER, "[]", "3", "{", ""])
def test_a_machine_that_is_not_this_hosts_is_refused_in_one_sentence(tmp_path, text):
    claim_machine(tmp_path, "mine")
    claim_machine(tmp_path, "mine")
    mark = tmp_path / "data" / "mine" / "host.json"
    assert json.loads(mark.read_text()).keys() == {"host_identity", "processor"}
    mark.write_text(text)
    cannot = r"host\.json, which says whose.*cannot be read"
    other = r"another host .*Another Processor.*--machine"
    with pytest.raises(RecordError, match=other if text == OTHER else cannot):
        claim_machine(tmp_path, "mine")
    assert mark.read_text() == text


def test_a_file_in_the_place_of_a_folder_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RecordError, match="cannot be made"):
            start_run(NAME, "cpu", {}, str(folder))
    assert (tmp_path / "file").read_text() == "kept"


def test_what_is_interrupted_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]


def test_promotion_is_all_or_nothing(tmp_path):
    staging, good = files.make_folder(tmp_path / "staging"), files.make_folder(tmp_path / "good")
    for name in ("a.csv", "b.csv"):
        (staging / name).write_text("new")
    (good / "a.csv").write_text("old")
    (tmp_path / "wall").write_text("")
    with pytest.raises(RecordError):
        promote(staging, lambda file: good if file == "a.csv" else tmp_path / "wall" / "below")
    assert (good / "a.csv").read_text() == "old" and os.listdir(good) == ["a.csv"]
    promote(staging, lambda file: good)
    assert (good / "a.csv").read_text() == "new" and sorted(os.listdir(good)) == ["a.csv", "b.csv"]


def test_rows_come_back_as_they_were_and_what_is_no_table_is_refused(tmp_path):
    seconds, method = [0.1 + 0.2, 1e-7 / 3, None], ["a", "b", "c"]
    rows = pd.DataFrame({"seconds": seconds, "exact": [True, False, None], "method": method})
    rows = rows.assign(round=[0, 1, None], why=[None, None, "text, with a comma"]).convert_dtypes()
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pd.testing.assert_frame_equal(read_rows(tmp_path / "rows.csv"), rows)
    (tmp_path / "empty.csv").write_text("")
    for name in ("gone.csv", "empty.csv"):
        with pytest.raises(RecordError, match=name):
            read_rows(tmp_path / name)


def undescribed(columns, text):
    """Those names of columns that no `name` of a text is."""
    text = re.sub(r"(?s)```.*?```", "", text)  # an example names what it likes
    named = set(re.findall(r"`([^`]+)`", text)) | set(map(str, range(128)))
    return [name for name in columns if re.sub("when .* is", "when ... is", name) not in named]


def rows(value, run=0):
    return pd.DataFrame({"run": [run], "seconds": [value]}).convert_dtypes()


def test_a_run_keeps_rows_and_provenance_that_belong_together(tmp_path):
    namespace = {"device": "cpu", "batch_size": 64, "rounds": 30, "unrelated": 1}
    run = start_run(NAME, "cpu", namespace, str(tmp_path))
    assert run.stem == f"{NAME}-batch_size=64"
    data = {"name": "digits", "labels_sha256": {"digits": "0a"}}
    run.save(rows(1.0), frames={"memory": rows(2.0)}, table=rows(3.0), data=data)
    kept = [f"{run.stem}.{end}" for end in ("csv", "json", "memory.csv", "table.csv")]
    assert sorted(os.listdir(tmp_path)) == kept
    facts = json.loads((tmp_path / f"{run.stem}.json").read_text())
    assert facts["rows_sha256"] == rows_hash(tmp_path / f"{run.stem}.csv")
    assert facts["frames_sha256"] == {"memory": rows_hash(tmp_path / f"{run.stem}.memory.csv")}
    assert facts["parameters"] == {"device": "cpu", "batch_size": 64, "rounds": 30}
    assert facts["data"] == data
    assert facts["host"]["processor"] and facts["device"]["torch"]
    assert facts["libraries"]["numpy"] and facts["warnings"] == []
    assert not {"gpu_before", "gpu_after"} & facts.keys()
    text = (ROOT / "data" / "README.md").read_text()
    named = [*facts, *facts["kernels"][0], *data, "gpu_before", "gpu_after", "key"]
    assert not undescribed(named, text)


def test_runs_of_fresh_kernels_are_pooled(tmp_path, monkeypatch):
    def run_kernel(index):
        job = {"machine": "m", "run": index, "stem": NAME, "output_dir": str(tmp_path)}
        monkeypatch.setenv(JOB_VARIABLE, json.dumps(job))
        run = start_run(NAME, "cpu", {"device": "cpu"})
        run.save(run.pool(rows(float(index), index)))
        return json.loads((tmp_path / f"{NAME}.json").read_text())

    facts = [run_kernel(index) for index in range(3)][-1]
    assert read_rows(tmp_path / f"{NAME}.csv")["run"].tolist() == [0, 1, 2]
    kernels = pd.DataFrame(facts["kernels"])
    assert set(kernels) == {"run", "started", "duration_s", "load_1min"}
    assert facts["runs"] == 3 and kernels["run"].tolist() == [0, 1, 2]
    assert facts["started"] == kernels["started"][0]
    assert facts["duration_s"] == pytest.approx(kernels["duration_s"].mean(), abs=0.051)
    assert len(run_kernel(0)["kernels"]) == 1, "a new run forgets the last one"


def test_the_gpu_before_and_after_and_a_clock_that_fell_are_kept(tmp_path, monkeypatch):
    state = {"sm_clock_mhz": 1980.0, "sm_clock_max_mhz": 1980.0, "power_w": 300.0}
    slow = state | {"sm_clock_mhz": 1200.0}
    facts = {"host": {"load_1min": 0.5}, "gpu_before": state}
    for index, states in enumerate(([slow, state], [state])):
        monkeypatch.setattr(timing, "GPU_STATES", states)
        tags = {"run": index, "machine": "m", "device": "cuda"}
        device = torch.device("cuda")
        records.Run(NAME, NAME, {}, tags, device, tmp_path, facts).save(rows(1.0))
    kept = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert kept["gpu_before"] == kept["gpu_after"] == state
    (said,) = kept["warnings"]
    assert said.startswith("run 0: ") and "1,200 MHz" in said


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_every_published_file_and_column_is_described(path):
    text = (ROOT / "data" / "README.md").read_text()
    if len(path.suffixes) > 1 and path.is_relative_to(ROOT / "data"):  # a frame beside rows
        name = re.sub(r"-.*(?=[.].+[.]csv)", "", path.name)
        assert f"`{name}`" in text or f"`NN_name.{name.partition('.')[2]}`" in text
    with path.open(newline="") as file:
        assert not undescribed(next(csv.reader(file)), text)


def test_every_column_that_posmat_makes_is_described():
    text = (ROOT / "data" / "README.md").read_text()
    one = {"a": lambda: torch.ones(1)}
    timed = timing.time_methods(one, reference=None, baseline="a", rounds=1)
    as_seed = timing.time_as_seed(one, 1, reference=None)
    memory = peak_memory({"a": linear_product}, ProblemSize(1, 1, 1), device="cpu")
    scores = score_predictions({"a": (1, None)}, {"a": 2.0})
    assert all(f"`{verdict}`" in text for verdict in (KEPT, FAILED, OPEN, NOT_MEASURED))
    for frame in (timed, as_seed, memory, summarize(timed).reset_index(), scores):
        assert not undescribed(frame.columns, text)


def test_the_example_of_loading_rows_gives_the_ratio_of_the_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "data" / "README.md").read_text())
    exec(code, given := {})
    path = "reports/epyc-zen4/cpu/05_positive_matrix_product.table.csv"
    line = pd.read_csv(path).set_index("method").loc["element-wise, in blocks"]
    found = [given[name] for name in ("ratio", "low", "high")]
    assert found == pytest.approx(list(line[["ratio", "ratio_low", "ratio_high"]]), rel=1e-12)


def test_outside_a_checkout_results_go_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(records.files, "project_root", lambda: None)
    monkeypatch.chdir(tmp_path)
    start_run(NAME, "cpu", {}).save(rows(1.0))
    assert (tmp_path / "posmat-output" / f"{NAME}.csv").exists()
