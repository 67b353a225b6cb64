"""Proof by probe: does a method give the exact numbers *here*, and which is the fastest that does?

Whether an int8 GEMM is exact depends on the machine, on PyTorch's build, on the range of the
operands and on switches of the process, and a wrong one gives no sign of it. So a method is tried
once, and the finding is kept for as long as these circumstances stay the same.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from posmat.layer.problem import ProblemSize, random_operands

Product = Callable[[Tensor, Tensor], Tensor]

# What `torch.backends.<backend>.matmul.fp32_precision` reads, in half its time: after a GEMM, which
# leaves nothing else in the caches, that would be 1 % of an exact product.
_PRECISION_OF = getattr(
    torch._C, "_get_fp32_precision_getter", lambda *_: torch.get_float32_matmul_precision()
)

# What the left operand may be; the right one is int8.
INT8, MAGNITUDES, BYTES = "int8", "bytes to 128", "bytes to 255"
RANGES = {
    INT8: (torch.int8, -128, 127),
    MAGNITUDES: (torch.uint8, 0, 128),
    BYTES: (torch.uint8, 0, 255),
}

# At a large size a GEMM runs the kernels that real work runs: those of capped processors are right
# at many small sizes and wrong at this one.
LARGE = ProblemSize(256, 128, 9216)
SMALL = ((1, 1, 1), (1, 1, 2), (3, 5, 7), (17, 8, 64), (1, 128, 300), (33, 1, 65))

# Where PyTorch has no int8 kernel for a processor it falls back to a loop, exact and 30 to 170
# times slower. A small size tells, and does not take long to.
TRIAL = ProblemSize(128, 64, 2048)
# A GPU takes no longer to multiply at the seed's size than to be asked for it.
BUSY = ProblemSize(2048, 2048, 2048)
SLOW = 5  # times the fastest candidate, at TRIAL or BUSY
TURNS = 5  # of each candidate; the best counts


class Proof(NamedTuple):
    """What the probe of one method found: whether it is exact, and in words."""

    exact: bool
    finding: str


class Choice(NamedTuple):
    """The fastest exact one of some candidates, None where none is, and what was found of each."""

    name: str | None
    findings: dict[str, str]


_proofs: dict[tuple, Proof] = {}
_lock = threading.RLock()


def circumstances(device: torch.device) -> tuple:
    """What the exactness and the speed of a GEMM depend on and a process can change."""
    # Each backend is asked by itself: the one word for all of them,
    # `torch.get_float32_matmul_precision`, raises once a single backend was set apart.
    if device.type == "cpu":
        precision = _PRECISION_OF("mkldnn", "matmul")
        return device, torch.get_num_threads(), torch.backends.mkldnn.enabled, precision
    return device, None, None, _PRECISION_OF("cuda", "matmul")


def prove(product: Product, device: torch.device, operands: str = INT8) -> Proof:
    """Try a method on corners and on random operands of a range; the first finding is kept.

    Raises:
        RuntimeError: memory ran out. It is no finding, and the next call tries again.
    """
    key = (product, operands, circumstances(device))
    if key not in _proofs:
        with _lock:
            if key not in _proofs:
                _proofs[key] = _probe(product, device, operands)
    return _proofs[key]


def choose(candidates: dict[str, Product], device: torch.device, operands: str = INT8) -> Choice:
    """Time the candidates that are no loop; try them, the fastest first, until one is exact."""
    on_cpu = device.type == "cpu"
    small, large = (TRIAL, LARGE) if on_cpu else (BUSY, BUSY)
    where = "the seed's size on one thread" if on_cpu else f"M = N = K = {large.in_features:,}"
    findings, chosen = dict.fromkeys(candidates, ""), None
    with _lock:
        trial = best_seconds(candidates, probe_operands(small, device, operands))
        fastest = min(trial.values())
        slow = [n for n, took in trial.items() if SLOW < took / fastest < math.inf]
        ready = {name: candidates[name] for name in candidates if name not in slow}
        seconds = best_seconds(ready, probe_operands(large, device, operands))
        # The slow ones are tried where all that are faster are wrong.
        for name in (*sorted(ready, key=seconds.get), *sorted(slow, key=trial.get)):
            told = f"{trial[name] / fastest:.0f} times slower than the fastest"
            if name in ready:
                told = f"{1000 * seconds[name]:.2f} ms at {where}"
            if chosen and math.isfinite(seconds.get(name, trial[name])):
                findings[name] = f"not tried further: {told}"
            else:
                exact, finding = prove(candidates[name], device, operands)
                findings[name] = f"{finding}, {told}" if exact else finding
                chosen = chosen or (name if exact else None)
    return Choice(chosen, findings)


def best_seconds(products: dict[str, Product], operands: tuple[Tensor, ...]) -> dict[str, float]:
    """The seconds of the best call of each, in turn, so that a slow moment meets them all.

    On a CPU it is the processor time of one thread: several that wait for each other on a busy
    machine may take a hundred times as long. What is far from the fastest is not called again.
    Infinite for a method that does not run: its proof says in words what is wrong.
    """
    device = operands[0].device
    on_cpu = device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    wait = (lambda: None) if on_cpu else lambda: torch.cuda.synchronize(device)
    best = dict.fromkeys(products, math.inf)
    with contextlib.ExitStack() as afterwards:
        if on_cpu:
            afterwards.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        for _ in range(TURNS):
            for name, product in products.items():
                if math.isfinite(best[name]) and best[name] > 4 * SLOW * min(best.values()):
                    continue
                try:
                    wait()
                    start = clock()
                    product(*operands)
                    wait()
                    best[name] = min(best[name], clock() - start)
                except RuntimeError as error:
                    if _is_out_of_memory(error):
                        raise
    return best


def probe_operands(
    size: ProblemSize, device: torch.device, operands: str = INT8
) -> tuple[Tensor, Tensor]:
    """A random left operand over a whole range and int8 weights, whatever the default device is."""
    dtype, _, high = RANGES[operands]
    with torch.device("cpu"):
        a, w = random_operands(size, torch.int16, device, low=-128)
        if dtype == torch.uint8:
            a = (a.int() + 128) * high // 255  # which int16 would not hold
        return a.to(dtype), w.clamp(max=127).to(torch.int8)


def _probe(product: Product, device: torch.device, operands: str) -> Proof:
    dtype, low, high = RANGES[operands]
    # A 16-bit sum of two products saturates at 127 · 127 and not at -128 · -128.
    corners = [(a, b) for a in (high, low) for b in (127, -128) if a]
    small = [ProblemSize(*sizes) for sizes in SMALL]

    def cases() -> Iterator[tuple[str, ProblemSize, Tensor, Tensor, Tensor | int]]:
        for a, b in corners:
            size = LARGE if (a, b) == (high, 127) else small[3]
            x = torch.full((size.batch_size, size.in_features), a, dtype=dtype, device=device)
            w = torch.full((size.out_features, size.in_features), b, device=device).char()
            yield f"{a} x {b}", size, x, w, a * b * size.in_features
        for size in (*small, LARGE):
            x, w = probe_operands(size, device, operands)
            # float64 holds every integer to 2**53; an int64 product of this size takes a second.
            yield "random operands", size, x, w, x.double() @ w.double().T

    try:
        for of, size, x, w, expected in cases():
            wrong = (product(x, w) != expected).double().mean().item()
            if wrong:
                sizes = f"M={size.batch_size}, N={size.out_features}, K={size.in_features}"
                return Proof(False, f"{wrong:.0%} of its numbers are wrong for {of} at {sizes}")
    except RuntimeError as error:  # no such kernel for this device or dtype
        if _is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Proof(False, f"it does not run here ({reason})")
    return Proof(True, f"exact for random operands and {len(corners)} corners of {operands}")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, which is of the moment and proves nothing."""
    # On the host, and from some of CUDA's libraries, PyTorch raises it as a plain RuntimeError.
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(say in str(error) for say in words)
