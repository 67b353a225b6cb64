"""Peak memory: what a method needs beside its operands.

`python -m posmat.measure.memory` is the process that measures; `peak_memory` starts it.
"""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from posmat.layer.engines import release_scratch
from posmat.layer.problem import ProblemSize, random_operands
from posmat.machine import make_current, require_device

# The C library gives freed memory back to the system at once. It would keep what loading and
# proving a method had used, and the method itself would then seem to need nothing.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_CLEAR_REFS = "/proc/self/clear_refs"


def peak_memory(
    methods: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    sizes: ProblemSize | Mapping[str, Collection[ProblemSize]],
    dtype: torch.dtype = torch.int8,
    seed: int = 0,
    threads: int = 1,
    **tags: object,
) -> pd.DataFrame:
    """Measure how far each method's memory rises above its operands.

    On a CPU, under Linux only, it is the growth of the process's high-water mark, each time in a
    fork of a process that has loaded PyTorch. On CUDA it is the allocator's peak, and one process
    measures all.

    Args:
        methods: a name and a function (x, w) -> y that can be imported, for each method.
        sizes: of the operands: one for all methods, or by a method's name those that it meets.
        dtype, seed, threads: of the operands; of PyTorch, where each may keep a buffer of its own.
        tags: further columns with one value for all rows; `device` says where it is measured.

    Returns:
        One row per method and size, in the state 'measured' or 'not available': `peak_bytes` over
        the operands, blank where the system does not let the mark be reset, and `operand_bytes`.

    Raises:
        ValueError: the device is not there.
        RuntimeError: a process did not finish, out of memory for one.
    """
    device = require_device(str(tags.get("device", "cpu")))
    if isinstance(sizes, ProblemSize):
        sizes = {name: [sizes] for name in methods}
    wanted = [(name, size) for name, own in sizes.items() for size in own]
    if device.type == "cuda":
        wanted.sort(key=lambda one: tuple(vars(one[1]).values()))  # operands are drawn once
        if device.index is None:  # a fresh process would begin at cuda:0
            device = torch.device("cuda", torch.cuda.current_device())
    orders = [(methods[name], size, dtype, seed, device, threads) for name, size in wanted]
    command = [sys.executable, "-m", "posmat.measure.memory"]
    how = {"env": os.environ | GIVE_BACK, "input": pickle.dumps(orders), "capture_output": True}
    done = subprocess.run(command, check=False, **how)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        last = (done.stderr.decode(errors="replace").splitlines() or ["no message"])[-1]
        name, size = wanted[len(found)]
        raise RuntimeError(
            f"measuring the memory of {name} at {size} ended with exit code "
            f"{done.returncode} ({last}): is there memory enough?"
        )
    tags |= {"dtype": str(dtype).removeprefix("torch."), "threads": threads}
    rows = [
        {"method": name, **facts, **tags, **vars(size)}
        for (name, size), facts in zip(wanted, found, strict=True)
    ]
    return pd.DataFrame(rows).convert_dtypes()


def _measure_all(orders: list[tuple]) -> int:
    """Carry out the orders and print what is found, until one fails; on a CPU each in a child."""
    # A fork may lose threads; there are none before the first operation of PyTorch.
    children = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for order in orders:
        if order[-2].type == "cuda":
            _tell(*order)
            continue
        child = children.Process(target=_tell, args=order)
        child.start()
        child.join()
        if child.exitcode:
            return 1
    return 0


def _tell(*order: object) -> None:
    print(json.dumps(_measure(*order)), flush=True)


# On CUDA one process measures many methods, and to draw operands takes longer than they do.
_operands = lru_cache(maxsize=1)(random_operands)


def _measure(method, size, dtype, seed, device, threads) -> dict:
    """Run one method once at full size, after a small call that loads what it needs."""
    torch.set_num_threads(threads)
    make_current(device)
    method(*random_operands(ProblemSize(2, 2, 2), dtype, device))
    release_scratch()  # what the proof of a method has used
    x, w = _operands(size, dtype, device, seed)
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(x, w)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif (before := _reset_high_water_mark()) is not None:
        method(x, w)
        peak = _high_water_mark() - before
    else:
        peak = None
    state = "not available" if peak is None else "measured"
    return {"operand_bytes": x.nbytes + w.nbytes, "state": state, "peak_bytes": peak}


def _reset_high_water_mark() -> int | None:
    """Bring the mark down to what is in use now, and read it; None where the system does not."""
    try:
        Path(_CLEAR_REFS).write_text("5", encoding="utf-8")  # proc(5): resets the peak
        return _high_water_mark()
    except (OSError, IndexError):  # only Linux has them, and some containers refuse
        return None


def _high_water_mark() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(_measure_all(pickle.load(sys.stdin.buffer)))
