"""Real images of 28 x 28: scikit-learn's digits, enlarged, or IDX files of MNIST or Fashion-MNIST.

Nothing is fetched. The two sets have files of the same names; the labels tell which is there.
"""

import gzip
import zlib
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from posmat.machine import job_order

TEST_SHARE = 0.25  # of the digits, which come in one set
SIDE = 28  # pixels: after two convolutions and a pooling the seed's layer has its 9,216 inputs
FIRST_LABELS = {"mnist": "7210414959", "fashion-mnist": "9211614657"}  # of the test images
SOURCE = (
    "torchvision keeps the files in <root>/MNIST/raw and <root>/FashionMNIST/raw, Debian's package "
    "dataset-fashion-mnist in /usr/share/datasets/fashion-mnist."
)


class Images(NamedTuple):
    """Pixels (M, 1, 28, 28) float32 in 0..1 and labels 0..9 (M,) int64, on the CPU."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_images(data: str = "digits", data_dir: str = "", seed: int = 0) -> Images:
    """The "digits", split by the seed, or all images of "mnist" or "fashion-mnist", without a seed.

    `data_dir` is the folder of the latter's files, gzipped or not; '' is what `posmat report` was
    given. FileNotFoundError where one is missing, ValueError where one is damaged or another set's.
    """
    if data == "digits":
        from sklearn.datasets import load_digits  # takes a second to load
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        split = train_test_split(
            pixels, labels, test_size=TEST_SHARE, random_state=seed, stratify=labels
        )
        small = (torch.tensor(part / 16).float().view(-1, 1, 8, 8) for part in split[:2])
        train, test = (nn.functional.interpolate(one, SIDE, mode="bilinear") for one in small)
        return Images(train, torch.tensor(split[2]), test, torch.tensor(split[3]))
    parts = []
    for path, content in _read_labels(data, data_dir).items():
        labels = torch.tensor([*content[8:]])
        images = path.with_name(path.name.replace("labels-idx1", "images-idx3"))
        pixels = np.frombuffer(_read_idx(images, len(labels), SIDE, SIDE), np.uint8, offset=16)
        parts += [torch.tensor(pixels / np.float32(255)).view(-1, 1, SIDE, SIDE), labels]
    return Images(*parts)


def describe_data(data: str = "digits", data_dir: str = "") -> dict:
    """For provenance: a set's name and the sha256 of its files of labels, decompressed; no path."""
    if data == "digits":  # as int64: they are in no file of their own
        from sklearn.datasets import load_digits

        files = {data: load_digits().target.astype("<i8").tobytes()}
    else:
        files = {path.name: content for path, content in _read_labels(data, data_dir).items()}
    return {"name": data, "labels_sha256": {n: sha256(c).hexdigest() for n, c in files.items()}}


def _read_labels(data: str, data_dir: str) -> dict[Path, bytes]:
    """The files of labels, train and test, of the set that was asked for; a header has 8 bytes."""
    if data not in FIRST_LABELS:
        raise ValueError(f"data={data!r} is not known: give 'digits', 'mnist' or 'fashion-mnist'.")
    folder = data_dir or job_order().get("data_dir")
    if not folder:
        raise ValueError(f"data={data!r} needs data_dir, the folder of its files: {SOURCE}")
    paths = [Path(folder).expanduser() / f"{part}-labels-idx1-ubyte" for part in ("train", "t10k")]
    first = "".join(map(str, _read_idx(paths[1])[8:18]))
    if first != FIRST_LABELS[data]:
        known = {labels: name for name, labels in FIRST_LABELS.items()}
        told = f"{folder} holds {known.get(first, 'neither set')}, by its first test labels {first}"
        raise ValueError(f"data={data!r} was asked for, and {told}: give another folder; {SOURCE}")
    return {path: _read_idx(path) for path in paths}


def _read_idx(path: Path, *shape: int) -> bytes:
    """A whole IDX file, unpacked: images of a shape, or labels, as many as there are."""
    try:
        packed = path.with_name(f"{path.name}.gz")
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        size = shape or (max(len(content) - 8, 0),)
        header = np.array([0x800 + len(size), *size], ">u4").tobytes()
        if not content.startswith(header) or len(content) != len(header) + prod(size):
            found = f"{len(content):,} bytes that begin with {content[: len(header)].hex(' ', 4)}"
            raise ValueError(f"{found}, not {len(header) + prod(size):,} with {header.hex(' ', 4)}")
        if not shape and max(content[8:], default=10) > 9:
            raise ValueError("no labels, or some beyond 9")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}, gzipped or not: {SOURCE}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or another file ({error}): {SOURCE}") from None
    return content
