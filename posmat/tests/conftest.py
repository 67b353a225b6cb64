"""What several tests share."""

import os

import pytest
import torch

# The files that take longest, which are begun first: what is begun last ends last.
LONGEST = ["notebooks", "cluster", "gemm", "resume", "draw", "failures", "check", "report"]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ),
]


def pytest_xdist_auto_num_workers(config) -> int:
    """One process more than there are cores, since many tests wait for a kernel or a worker.

    Five at most: then the longest file alone says how long it takes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min((cores or 1) + 1, 5)


def pytest_collection_modifyitems(items) -> None:
    """Put the longest files first; pyproject.toml tells xdist to keep that order."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Each device that a method must be right on; CUDA is skipped where there is none."""
    return request.param


@pytest.fixture
def blank_pictures(monkeypatch):
    """Figures are drawn, and kept as empty sheets that carry all that a picture carries.

    For tests of what is said about pictures: to write one in three formats takes half a second.
    """
    from posmat import figures

    write = figures.write_figure

    def write_blank(figure, *words):
        blank = figures.Chart(figsize=(1, 1))
        blank.caption = figure.caption
        write(blank, *words)

    monkeypatch.setattr(figures, "write_figure", write_blank)
