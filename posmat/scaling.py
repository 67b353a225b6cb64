"""Sizes for measuring how the cost grows: which fit in memory, and which are worth their time.

A size that does not fit is refused before a byte of it is allocated. What is made of the rows that
were measured is in `posmat.roofline`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping

import pandas as pd
import torch

from posmat.environment import require_device
from posmat.memory import GIVE_BACK, _measure, peak_memory
from posmat.problem import ProblemSize
from posmat.products import BLOCK_ELEMENTS

AXES = {"M": "batch_size", "N": "out_features", "K": "in_features"}


def free_bytes(device: torch.device | str) -> int:
    """The bytes that a process may still take on a device.

    On a CPU the smaller of what the system has left and what a container's limit leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo("MemAvailable"), _container_limit()]
    known = [number for number in found if number is not None]
    if known:
        return min(known)
    try:  # no Linux: the whole memory is known, and half of it is a careful guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def wanted_bytes(size: ProblemSize, device: torch.device | str = "cpu") -> int:
    """The most bytes that measuring a size takes at any time, for all methods of the notebook.

    The operands as int8 and as float32, what is prepared of W, and on top the reference, which
    holds both operands and the result 8 bytes wide, or a method with its own intermediates.
    """
    M, N, K = size.batch_size, size.out_features, size.in_features
    kind = torch.device(device).type
    blocks = 4 * 2 * BLOCK_ELEMENTS.get(kind, BLOCK_ELEMENTS["cpu"])
    return (1 + 4 + 8) * M * K + (1 + 4 + 3 + 8) * N * K + (8 + 8 + 8 + 4) * M * N + blocks


def require_memory(
    size: ProblemSize, device: torch.device | str = "cpu", free: int | None = None
) -> None:
    """Refuse a size that does not fit, before anything of it is allocated.

    Args:
        size: the sizes that were asked for.
        device: where the operands are to live.
        free: the bytes to fit in; the default is what is free on the device now.

    Raises:
        MemoryError: it wants more bytes than there are; the message has both numbers.
    """
    free = free_bytes(device) if free is None else free
    wanted = wanted_bytes(size, device)
    if wanted > free:
        asked = ", ".join(f"{name}={getattr(size, name):,}" for name in AXES.values())
        raise MemoryError(
            f"{asked} was asked for, which wants {wanted:,} bytes on {device}, and {free:,} are "
            "free: give smaller sizes, or a device with more memory."
        )


def sweep(
    centre: ProblemSize,
    axis: str,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    factor: int = 4,
    steps: int = 5,
) -> list[ProblemSize]:
    """Sizes along one axis: the centre's, divided and multiplied by a factor again and again.

    Args:
        centre: the size that is varied, itself among those that are given.
        axis: "M", "N" or "K".
        device: where they are to fit.
        limit: the bytes that a size may want; larger ones are left out. The default is an eighth
            of what is free.
        factor: between neighbours.
        steps: at the most, to each side.

    Returns:
        Sizes, the smallest first.

    Raises:
        ValueError: there is no such axis.
        MemoryError: the centre itself does not fit in the device's memory.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known: give one of {', '.join(AXES)}.")
    free = free_bytes(device)
    require_memory(centre, device, free)
    limit = free // 8 if limit is None else limit
    middle = getattr(centre, AXES[axis])

    def with_length(length: int) -> ProblemSize:
        return ProblemSize(**{**vars(centre), AXES[axis]: length})

    down = [middle // factor**i for i in range(steps, 0, -1) if middle // factor**i >= 1]
    up = [middle * factor**i for i in range(1, steps + 1)]
    fit = [with_length(n) for n in up if wanted_bytes(with_length(n), device) <= limit]
    return [*map(with_length, down), centre, *fit]


def all_sweeps(
    centre: ProblemSize,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    steps: int = 5,
) -> list[tuple[str, ProblemSize]]:
    """The sizes of all three axes with the axis of each, the least work first.

    The centre belongs to all of them and is listed once, as "centre"; the rest is as in `sweep`.

    Raises:
        MemoryError: the centre itself does not fit in the device's memory.
    """
    sizes = {centre: "centre"}
    for axis in AXES:
        for size in sweep(centre, axis, device, limit, steps=steps):
            sizes.setdefault(size, axis)
    return sorted(
        ((axis, size) for size, axis in sizes.items()), key=lambda item: item[1].partial_products
    )


def expected_seconds(rows: pd.DataFrame, method: str, size: ProblemSize) -> float:
    """How long one call of a method should take, in proportion from the next smaller size.

    0 where the method was not timed yet, or only at sizes with more work.
    """
    if rows.empty:
        return 0.0
    own = rows[(rows["method"] == method) & (rows["state"] == "timed")]
    work = own["batch_size"] * own["out_features"] * own["in_features"]
    smaller = work[work <= size.partial_products]
    if smaller.empty:
        return 0.0
    nearest = smaller.max()
    seconds = float(own.loc[work == nearest, "seconds"].astype(float).median())
    return seconds * size.partial_products / float(nearest)


def peak_memory_by_size(
    methods: Mapping[str, str],
    sizes: Mapping[str, Collection[ProblemSize]],
    seed: int = 0,
    threads: int = 1,
    **tags: object,
) -> pd.DataFrame:
    """Peak memory of many methods at many sizes, each in a process of its own.

    As `peak_memory`, whose columns it gives. On a CPU under Linux one process loads PyTorch and
    forks a child for each measurement, which takes a tenth of the time. On CUDA all are measured in
    one process: the allocator's peak is that of the tensors, whatever was there before.

    Args:
        methods: a name for each method, given as "module.function" within posmat.
        sizes: the sizes that each method, by its name, is measured at.
        seed, threads, tags: as for `peak_memory`.

    Raises:
        RuntimeError: a process did not finish, out of memory for one.
    """
    wanted = [(name, size) for name, own in sizes.items() for size in own]
    device = require_device(str(tags.get("device", "cpu")))
    if device.type == "cuda":
        wanted.sort(key=lambda one: tuple(vars(one[1]).values()))  # each is drawn once
        if device.index is None:  # a fresh process would begin at cuda:0
            device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu" and sys.platform != "linux":
        rows = [
            peak_memory({name: methods[name]}, size, seed=seed, threads=threads, **tags)
            for name, size in wanted
        ]
        return pd.concat(rows, ignore_index=True)
    orders = [
        [methods[name], *vars(size).values(), "int8", seed, str(device), threads]
        for name, size in wanted
    ]
    done = subprocess.run(
        [sys.executable, "-m", "posmat.scaling"],
        check=False,
        env={**os.environ, **GIVE_BACK},
        input=json.dumps(orders),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(found) != len(wanted):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        name, size = wanted[min(len(found), len(wanted) - 1)]
        raise RuntimeError(
            f"measuring the memory of {name} at {size} ended early ({last}): is there memory "
            "enough?"
        )
    rows = [
        {"method": name, **facts, **tags, "dtype": "int8", "threads": threads, **vars(size)}
        for (name, size), facts in zip(wanted, found, strict=True)
    ]
    return pd.DataFrame(rows).convert_dtypes()


def _measure_all(orders: list[list]) -> int:
    """Carry out each order, on a CPU in a forked child, and print what it found, until one fails.

    No operation of PyTorch has run in this process, so there is no thread that a fork would lose.
    """
    for order in orders:
        if order[-2] != "cpu":
            print(json.dumps(_measure(*map(str, order))), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps(_measure(*map(str, order))), flush=True)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            return 1
    return 0


def _meminfo(name: str) -> int | None:
    """A line of /proc/meminfo in bytes, or None where there is no such file."""
    try:
        lines = _read("/proc/meminfo").splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) for line in lines if line.startswith(name + ":"))
    return next((1024 * kib for kib in found), None)


def _container_limit(folder: str = "/sys/fs/cgroup") -> int | None:
    """What a container's memory limit leaves in bytes, or None where there is none.

    Files that the system keeps in memory count as used; those that it has not read lately it gives
    up at once when a process wants the memory. The second form is that of cgroup v1.
    """
    for most, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = _read(f"{folder}/{most}").strip()
            if limit == "max" or int(limit) >= 2**60:  # v1 writes its largest number for no limit
                continue
            taken = int(_read(f"{folder}/{used}"))
        except (OSError, ValueError):
            continue
        return max(0, int(limit) - taken + _statistic(f"{folder}/{os.path.dirname(most)}", idle))
    return None


def _statistic(folder: str, name: str) -> int:
    """A number of a cgroup's memory.stat, or 0 where there is none."""
    try:
        lines = _read(f"{folder}/memory.stat").splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


if __name__ == "__main__":
    sys.exit(_measure_all(json.load(sys.stdin)))
