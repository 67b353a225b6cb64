"""Sets of images: what is read is what was written, and whatever is wrong is one sentence."""

import gzip
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import posmat as pm
from posmat.measure import run as records
from posmat.report import UsageError
from posmat.report.freshness import job_key
from posmat.report.jobs import plan
from posmat.tests import tiny

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FIRST = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}
PARAMETERS = """data: str = "digits"  # which set
data_dir: str = ""  # where its files are
size: int = 3  # number of rows
value: int = 1  # of every row"""


def idx(values: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes() + values.tobytes()


def make_set(folder: Path, data: str = "mnist", packed: bool = False) -> tuple:
    """Write the four files of a small set; the arrays in the order of pm.load_images."""
    random, arrays = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for part, labels in (("train", [0, 1, 2, 3, 9]), ("t10k", [*FIRST[data], 5])):
        images = random.integers(0, 256, (len(labels), 28, 28), np.uint8)
        images[0, 0, :2] = 0, 255
        arrays += [images, np.array(labels, np.uint8)]
        for what, values in zip(("images-idx3", "labels-idx1"), arrays[-2:], strict=True):
            name, content = f"{part}-{what}-ubyte", idx(values)
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return tuple(arrays)


def is_refused(data: str, folder, *words: str, kind: type = ValueError, **more) -> None:
    """Both functions refuse a folder in one sentence that holds these words."""
    for ask in (pm.load_images, pm.describe_data)[: more.get("by", 2)]:
        with pytest.raises(kind) as caught:
            ask(data, str(folder))
        said = str(caught.value)
        assert "\n" not in said and all(word in said for word in words), said
        assert "/MNIST/raw" in said and "dataset-fashion-mnist" in said  # where they come from


def test_the_digits_are_enlarged_so_that_the_layer_is_the_seeds():
    images, again = pm.load_images(seed=1), pm.load_images("digits", "", 1)
    assert all(map(torch.equal, images, again))
    assert len(images.train) + len(images.test) == 1797
    assert set(images.test_labels.tolist()) == set(range(10))
    seen = {tuple(image.flatten().tolist()) for image in images.train}
    assert not any(tuple(image.flatten().tolist()) in seen for image in images.test)
    assert not torch.equal(images.test_labels, pm.load_images(seed=0).test_labels)
    assert images.train.shape[1:] == (1, 28, 28)
    assert images.train.dtype == torch.float32 and images.train_labels.dtype == torch.int64
    assert images.train.min() == 0 and 0.9 < images.train.max() <= 1
    corners = images.test[:, 0, [0, 0, 27, 27], [0, 27, 0, 27]]
    pixels = load_digits().data[:, [0, 7, 56, 63]] / 16
    assert all(any((pixels == corner).all(1)) for corner in corners[:20].double().numpy())
    layers = [torch.nn.Conv2d(1, 32, 3), torch.nn.Conv2d(32, 64, 3), torch.nn.MaxPool2d(2)]
    assert torch.nn.Sequential(*layers)(images.test[:1]).numel() == 9216


@pytest.mark.parametrize("data", FIRST)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_as_they_were_written(tmp_path, data, packed):
    written = make_set(tmp_path, data, packed)
    images = pm.load_images(data, str(tmp_path), seed=3)
    for i in (0, 2):
        pixels, labels = images[i : i + 2]
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert pixels.min() == 0 and pixels.max() == 1
        assert np.array_equal((pixels * 255).round().numpy(), written[i][:, None])
        assert np.array_equal(labels.numpy(), written[i + 1])
    facts = pm.describe_data(data, str(tmp_path))
    names = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
    hashes = {n: sha256(idx(v)).hexdigest() for n, v in zip(names, written[1::2], strict=True)}
    assert facts == {"name": data, "labels_sha256": hashes}


def test_the_digits_are_known_by_their_labels():
    facts = pm.describe_data("digits", "/nowhere")
    assert facts["name"] == "digits" and [*facts["labels_sha256"]] == ["digits"]
    # Pinned: another version of scikit-learn has the same ones, or it is another set.
    assert facts["labels_sha256"]["digits"].startswith("a3c91c262eddcf7b")


def test_what_is_not_there_is_named(tmp_path):
    is_refused("mnist", "", "data='mnist' needs data_dir")
    nowhere = tmp_path / "nowhere"
    is_refused("mnist", nowhere, f"there is no {nowhere}/t10k-labels", kind=FileNotFoundError)
    make_set(tmp_path)
    for name, by in (("train-labels-idx1-ubyte", 2), ("t10k-images-idx3-ubyte", 1)):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        words = f"there is no {tmp_path / name}, gzipped or not"
        is_refused("mnist", tmp_path, words, kind=FileNotFoundError, by=by)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"data='cifar' is not known: give 'digits', 'mnist' or"):
        pm.load_images("cifar", str(tmp_path))


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (LABELS, lambda old: old[:-1], "12 bytes that begin with 00000801 00000005, not 12 with"),
        (LABELS, lambda old: b"", "0 bytes"),
        (LABELS, lambda old: old[:7], "7 bytes"),
        (LABELS, lambda old: b"\0\0\x08\x03" + old[4:], "00000803 00000005, not 13 with 00000801"),
        (LABELS, lambda old: b"<!DOCTYPE html>", "3c21444f 43545950, not"),
        (LABELS, lambda old: idx(np.array([0, 10], np.uint8)), "no labels, or some beyond 9"),
        (LABELS, lambda old: idx(np.zeros(0, np.uint8)), "no labels, or some beyond 9"),
        (IMAGES, lambda old: old[:-1], "3,935 bytes that begin with 00000803 00000005 0000001c"),
        (IMAGES, lambda old: old + b"0", "3,937 bytes"),
        (IMAGES, lambda old: b"\0\0\x08\x01" + old[4:], "00000801 00000005 0000001c 0000001c, not"),
        (IMAGES, lambda old: idx(np.zeros((4, 28, 28), np.uint8)), "00000004 0000001c"),
        (IMAGES, lambda old: idx(np.zeros((5, 32, 32), np.uint8)), "00000005 00000020"),
        (IMAGES, lambda old: old[:5], "5 bytes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_named_with_what_it_has_and_should_have(
    tmp_path, name, damage, words, packed
):
    make_set(tmp_path)
    path = tmp_path / name
    content = damage(path.read_bytes())
    path.unlink()
    if packed:
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
    by = 1 if name == IMAGES else 2
    is_refused("mnist", tmp_path, f"{path} is damaged or another file", words, by=by)


def test_what_cannot_be_unpacked_is_refused(tmp_path):
    make_set(tmp_path, packed=True)
    path = tmp_path / f"{LABELS}.gz"
    whole = path.read_bytes()
    broken = whole[:12] + bytes([whole[12] ^ 0xFF]) + whole[13:]
    for content in (b"", b"no gzip", whole[:-9], whole[:5], broken, whole + b"rest"):
        path.write_bytes(content)
        is_refused("mnist", tmp_path, f"{tmp_path / LABELS} is damaged or another file")
    path.unlink()
    (tmp_path / LABELS).mkdir()
    is_refused("mnist", tmp_path, f"{tmp_path / LABELS} is damaged or another file")


def test_two_sets_with_the_same_names_are_told_apart(tmp_path):
    for data, other in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")):
        make_set(tmp_path, data)
        told = (
            f"data='{other}' was asked for, and {tmp_path} holds {data}, by its first test labels"
        )
        is_refused(other, tmp_path, told)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(3, dtype=np.uint8)))
    is_refused("mnist", tmp_path, "holds neither set, by its first test labels 012")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_itself():
    images = pm.load_images("fashion-mnist", str(DEBIAN))
    assert [len(part) for part in images] == [60_000, 60_000, 10_000, 10_000]
    assert images.train.max() == 1 and images.test_labels.bincount().tolist() == [1000] * 10
    hashes = pm.describe_data("fashion-mnist", str(DEBIAN))["labels_sha256"]
    assert hashes["t10k-labels-idx1-ubyte"].startswith("0402a96d92fd2663")
    is_refused("mnist", DEBIAN, "holds fashion-mnist")


def test_a_folder_is_in_no_name_key_or_provenance(tmp_path, monkeypatch):
    notebook = tiny.make_notebook(tmp_path, "90_images", parameters=PARAMETERS)
    monkeypatch.chdir(tmp_path)

    def job(*given):
        (one,) = plan([notebook], ["cpu"], "m", ["data=mnist", *given])
        return one

    here, there, none = job("data_dir=a,b"), job("data_dir=~/b"), job("data_dir=")
    assert here.parameters == {"data": "mnist", "data_dir": str(tmp_path / "a,b")}
    assert there.parameters["data_dir"] == os.path.expanduser("~/b")
    assert none.parameters == {"data": "mnist"}
    assert here.stem == there.stem == none.stem == "90_images-data=mnist"
    assert job_key(here) == job_key(there) == job_key(none)
    with pytest.raises(UsageError, match="-p data_dir=b: data_dir is one folder for all jobs"):
        job("data_dir=a", "data_dir=b")

    monkeypatch.setattr(records.files, "project_root", lambda: tmp_path)
    namespace = {"data": "mnist", "data_dir": "a", "size": 3, "output_dir": "x"}
    run = pm.start_run("90_images", None, namespace, str(tmp_path / "own"))
    assert run.stem == here.stem and run.parameters == {"data": "mnist", "size": 3}


def test_the_driver_gives_the_folder_and_no_file_that_it_keeps_names_it(tmp_path):
    folders = [tmp_path / name for name in ("first_set", "second_set")]
    for folder in folders:
        make_set(folder, packed=True)
    load = "import posmat as pm\nimages = pm.load_images(data, data_dir)\nlen(images.test)"
    tiny.make_notebook(tmp_path, "90_images", load, tiny.KEEP, parameters=PARAMETERS)
    for folder, state in zip(folders, ("1 done, 0", "0 done, 0 failed, 1 skipped"), strict=True):
        words = ["-p", "data=mnist", "-p", f"data_dir={folder}"]
        code, out, err = tiny.report(tmp_path, *words)
        assert code == 0 and state in out, err
    kept = [path for kind in ("data", "reports") for path in (tmp_path / kind).rglob("*.*")]
    assert {path.name.partition(".")[0] for path in kept} == {"90_images-data=mnist", "host"}
    for path in kept:
        assert "first_set" not in path.read_text(), path
    _, _, err = tiny.report(tmp_path, "-p", "data=fashion-mnist", "-p", f"data_dir={folders[0]}")
    assert "data='fashion-mnist' was asked for" in err and "Traceback" not in err


def test_a_remote_machine_is_told_the_folder_too(tmp_path):
    cluster = pytest.importorskip("posmat.report.cluster", reason="[cluster] is not installed")
    cell = "import posmat.machine\nassert posmat.machine.job_order()['data_dir'][::-1] == 'lla/no/'"
    notebook = tiny.make_notebook(tmp_path, "90_images", cell, tiny.KEEP, parameters=PARAMETERS)
    (job,) = plan([notebook], ["cpu"], "m", ["data=mnist", "data_dir=/on/all"])
    outcome, files, _ = cluster.run_there(job, notebook.read_bytes())
    assert outcome.state == "done", outcome.message
    assert not any(b"/on/all" in content for content in files.values())
