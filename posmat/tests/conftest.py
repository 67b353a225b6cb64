"""What several tests share.

With POSMAT_TEST_WITHOUT_ONEDNN=1 in the environment all run as on a processor for which PyTorch has
no int8 kernel.
"""

import os

import pytest
import torch

from posmat.layer import engines, exact, gemm, proof
from posmat.multipliers import product as inexact

if os.environ.get("POSMAT_TEST_WITHOUT_ONEDNN"):
    torch.backends.mkldnn.set_flags(False)

# The files that take longest, which are begun first: what is begun last ends last.
LONGEST = ["notebooks", "cluster", "gemm", "resume", "draw", "failures", "check", "report"]

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_cuda)])
def device(request) -> str:
    """Each device that a method must be right on; CUDA is skipped where there is none."""
    return request.param


@pytest.fixture
def blank_pictures(monkeypatch):
    """Figures are drawn, and kept as empty sheets that carry all that a picture carries.

    For tests of what is said about pictures: to write one in three formats takes half a second.
    """
    from posmat.charts.style import Chart

    write = Chart.write

    def write_blank(figure, *words):
        blank = Chart(figsize=(1, 1))
        blank.caption, blank.title = figure.caption, figure.title
        write(blank, *words)

    monkeypatch.setattr(Chart, "write", write_blank)


@pytest.fixture
def threads():
    """Set the number of threads in a test, and have the old one back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For tests of many small tensors, whose threads would wait for each other; and for a seed."""
    threads(1)
    torch.manual_seed(0)


@pytest.fixture
def nothing_found(monkeypatch):
    """As in a fresh process, nothing was found of methods and engines yet."""
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(exact, "_choices", {})


@pytest.fixture
def use_engine(monkeypatch, nothing_found):
    """Have every sum of GEMMs computed by one engine, of `engines.ENGINES`."""

    def use(name):
        engine = engines.ENGINES[name]
        for module in (gemm, inexact):
            monkeypatch.setattr(module, "engine_for", lambda *asked: engine)
        if engine.name == "int8":
            monkeypatch.setitem(engines.INT8_ENGINES, "cpu", engine)

    return use


@pytest.fixture
def strict_int8_gemm(monkeypatch):
    """An int8 GEMM with the refusals of CUDA's, exact on any processor; gives the list of calls."""
    calls = []

    def strict(a, b):
        assert a.dtype == b.dtype == torch.int8
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        for rows in (a, b.t()):
            assert rows.stride(1) == 1 and rows.stride(0) % 8 == 0
            assert rows.data_ptr() % 16 == 0
        y = a.double() @ b.double()
        assert y.abs().max() < 2**31
        calls.append(a.shape)
        return y.int()

    monkeypatch.setattr(torch, "_int_mm", strict)
    return calls
