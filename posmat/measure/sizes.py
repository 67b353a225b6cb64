"""Sizes for measuring how the cost grows: which fit in memory, and which are worth their time."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import torch

from posmat.layer.problem import ProblemSize
from posmat.layer.products import BLOCK_ELEMENTS
from posmat.measure.roofline import SIZES


def free_bytes(device: torch.device | str) -> int:
    """The bytes that a process may still take on a device.

    On a CPU the smaller of what the system has left and what a container's limit leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, _container_leaves()))


def _container_leaves(folder: str = "/sys/fs/cgroup") -> float:
    """What a container's memory limit leaves in bytes; infinite where there is none."""
    names = ("memory.max", "memory.current", "memory.stat")
    try:
        limit, used, kinds = (Path(folder, name).read_text(encoding="utf-8") for name in names)
        # Files kept in memory count as used; those not read lately are given up when it is wanted.
        given_up = int(kinds.partition("\ninactive_file ")[2].split()[0])
        return max(0, int(limit) - int(used) + given_up)
    except (OSError, ValueError, IndexError):  # no limit is "max", and older systems have no file
        return math.inf


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
    """Raise a MemoryError for a size that does not fit in `free` bytes, by default the device's."""
    free = free_bytes(device) if free is None else free
    wanted = wanted_bytes(size, device)
    if wanted > free:
        asked = ", ".join(f"{name}={getattr(size, name):,}" for name in SIZES.values())
        raise MemoryError(
            f"{asked} was asked for, which wants {wanted:,} bytes on {device}, and {free:,} are "
            "free: give smaller sizes, or a device with more memory."
        )


def all_sweeps(
    centre: ProblemSize,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    steps: int = 5,
) -> list[tuple[str, ProblemSize]]:
    """Sizes along the three axes, each with its axis, the least work first.

    Along an axis the centre's size is divided and multiplied by 4 up to `steps` times. The centre
    itself belongs to all three and is listed once, as "centre". Left out is what wants more bytes
    than `limit`, by default an eighth of what is free on the device.

    Raises:
        MemoryError: the centre itself does not fit in the device's memory.
    """
    free = free_bytes(device)
    require_memory(centre, device, free)
    limit = free // 8 if limit is None else limit
    sizes = {centre: "centre"}
    for axis, name in SIZES.items():
        middle = getattr(centre, name)
        factors = [4**step for step in range(1, steps + 1)]
        shorter = [middle // factor for factor in factors if factor <= middle]
        for length in shorter + [middle * factor for factor in factors]:
            size = replace(centre, **{name: length})
            if length < middle or wanted_bytes(size, device) <= limit:
                sizes.setdefault(size, axis)
    axes = [(axis, size) for size, axis in sizes.items()]
    return sorted(axes, key=lambda one: one[1].partial_products)


def expected_seconds(rows: pd.DataFrame, method: str, size: ProblemSize) -> float:
    """How long one call of a method should take, in proportion from the next smaller size.

    0 where the method was not timed yet, or only at sizes with more work.
    """
    if rows.empty:
        return 0.0
    own = rows[(rows["method"] == method) & (rows["state"] == "timed")]
    work = own[list(SIZES.values())].astype(float).prod(axis=1)
    nearest = work[work <= size.partial_products].max()  # NaN where there is none
    seconds = own.loc[work == nearest, "seconds"].astype(float).median()
    return 0.0 if pd.isna(seconds) else seconds * size.partial_products / nearest
