import hashlib
import re

import pandas as pd
import pytest

from posmat.figures import FIGURES, draw_figure, figure_number, find_figure, save_figure
from posmat.summary import AGAIN, FLOOR


@pytest.fixture
def rows() -> pd.DataFrame:
    times = {"layer": 4e-3, "by hand": 0.17, "layer" + AGAIN: 4e-3, FLOOR: 7e-7}
    lines = [
        {"run": 0, "method": method, "state": "timed", "exact": True, "max_error": None}
        | {"round": index, "number": 2, "seconds": base * (1 + index / 100), "cpu_s": base}
        | {"first_s": base, "device": "cpu", "processor": "A Processor", "torch": "2.0"}
        | {"dtype": "int8", "batch_size": 8, "out_features": 4, "in_features": 2, "threads": 1}
        | {"clock": "host"}
        for method, base in times.items()
        for index in range(9)
    ]
    lines.append(lines[0] | {"method": "gone", "state": "not supported", "seconds": None})
    return pd.DataFrame(lines).convert_dtypes()


def test_ids_are_unique_and_without_numbers():
    ids = [spec.id for spec in FIGURES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in ids)
    assert figure_number("matvec-vs-elementwise") == 1  # the list is only appended to
    assert figure_number("positive-matrix-product") == 2


def test_an_unknown_id_is_refused_with_a_near_one():
    with pytest.raises(KeyError, match="positive-matrix-product"):
        find_figure("positive-matrix")


def test_the_same_rows_give_the_same_bytes(rows, tmp_path):
    digests = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        figure = draw_figure("positive-matrix-product", rows)
        save_figure(figure, "positive-matrix-product", rows, "ab12", folder, "-m-cpu")
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
        )
    assert digests[0] == digests[1] and len(digests[0]) == 3


def test_id_caption_and_hash_are_inside(rows, tmp_path):
    figure = draw_figure("positive-matrix-product", rows)
    save_figure(figure, "positive-matrix-product", rows, "ab12", tmp_path, "")
    caption = find_figure("positive-matrix-product").caption(rows)
    svg = (tmp_path / "positive-matrix-product.svg").read_text()
    assert "rows sha256 ab12" in svg and "positive-matrix-product" in svg and caption in svg
    png = (tmp_path / "positive-matrix-product.png").read_bytes()
    assert b"rows sha256 ab12" in png and b"A Processor" in png
    pdf = (tmp_path / "positive-matrix-product.pdf").read_bytes()
    assert b"rows sha256 ab12" in pdf


def test_the_chart_names_every_method_and_its_state(rows):
    axes = draw_figure("positive-matrix-product", rows).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"layer", "by hand", "gone", "not supported", "layer" + AGAIN} <= set(texts)
    assert FLOOR not in texts  # 6,000 times below the rest: the axis would show little else
    assert axes.get_xscale() == "log" and "[ms]" in axes.get_xlabel()
    assert not axes.patches  # dots, no bars


def test_a_baseline_without_a_time_leaves_times_without_ratios(rows):
    rows = rows.assign(method=rows["method"].replace({"layer": "W @ x", "by hand": "W * x"}))
    rows["method"] = rows["method"].replace({"layer" + AGAIN: "W @ x" + AGAIN})
    gone = rows["method"].isin(["W @ x", "W @ x" + AGAIN])
    rows.loc[gone, ["state", "seconds"]] = ["not supported", None]
    axes = draw_figure("matvec-vs-elementwise", rows).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert "177 ms" in texts and "not supported" in texts and not any("×" in t for t in texts)
    spec = find_figure("matvec-vs-elementwise")
    said = "takes 177 ms (W @ x has no time here)."
    assert spec.finding(rows) == f"In int8 the element-wise product {said}"
    assert "W * x 177 ms;" in spec.in_words(rows)


def test_a_baseline_without_a_time_leaves_the_others_theirs(rows):
    untimed = rows["method"].isin(["layer", "layer" + AGAIN])
    rows.loc[untimed, ["state", "seconds"]] = ["not supported", pd.NA]
    texts = [text.get_text() for text in draw_figure("positive-matrix-product", rows).axes[0].texts]
    assert texts.count("not supported") == 3 and any(text.endswith(" ms") for text in texts)


def test_charts_of_ratios_show_what_was_measured_and_the_noise(rows):
    rows = rows.assign(part="formulations", machine="m")
    axes = draw_figure("gemm-speedup", rows).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["by hand", "0.0235×"] and axes.patches  # 4 ms over 170 ms; the noise's band
    other = rows.assign(machine="other", seconds=rows["seconds"] * 2)
    axes = draw_figure("machines-side-by-side", pd.concat([rows, other])).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["m, cpu", "other, cpu"]
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks == pytest.approx([42.5, 42.5])  # the ratio, not the time, which doubled


def test_a_sweep_has_a_line_per_method_over_what_varies(rows):
    swept = pd.concat(
        [rows.assign(batch_size=size, seconds=rows["seconds"] * size) for size in (8, 16, 32)]
    )
    axes = draw_figure("positive-matrix-product-sweep", swept).axes[0]
    assert axes.get_xlabel() == "batch_size" and len(axes.lines) == 2
    assert list(axes.lines[0].get_xdata()) == [8, 16, 32]
