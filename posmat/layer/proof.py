"""Proof by probe: does a method give the exact numbers *here*, and which is the fastest that does?

Whether an int8 GEMM is exact depends on the machine, on the PyTorch that was built for it, on the
range of the operands and on switches of the process, and a wrong one gives no sign of it. So a
method is tried once, and the finding is kept for as long as the circumstances that it depends on
stay the same.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from posmat.layer.problem import NotAvailable, ProblemSize, random_operands

Product = Callable[[Tensor, Tensor], Tensor]

_PRECISION_OF = getattr(torch._C, "_get_fp32_precision_getter", None)

# What the left operand may be; the right one is int8.
INT8, MAGNITUDES, BYTES = "int8", "bytes to 128", "bytes to 255"
_RANGES = {
    INT8: (torch.int8, -128, 127),
    MAGNITUDES: (torch.uint8, 0, 128),
    BYTES: (torch.uint8, 0, 255),
}

# At a large size a GEMM runs the kernels that real work runs: those of capped processors are right
# at many small sizes and wrong at this one.
LARGE = ProblemSize(256, 128, 9216)
SMALL = [
    ProblemSize(*sizes)
    for sizes in ((1, 1, 1), (1, 1, 2), (3, 5, 7), (17, 8, 64), (1, 128, 300), (33, 1, 65))
]

# Where PyTorch has no int8 kernel for a processor it falls back to a loop, exact and 30 to 170
# times slower. A small size tells, and does not take long to.
TRIAL = ProblemSize(128, 64, 2048)
# A GPU takes no longer to multiply at the seed's size than to be asked for it.
BUSY = ProblemSize(2048, 2048, 2048)
SLOW = 5  # times the fastest candidate, at TRIAL or BUSY
TURNS = 5  # of each candidate; the best counts


@dataclass(frozen=True)
class Proof:
    """What the probe of one method found: whether it is exact, and in words."""

    exact: bool
    finding: str


@dataclass(frozen=True)
class Choice:
    """The fastest exact one of some candidates, None where none is, and what was found of each."""

    name: str | None
    findings: dict[str, str]

    def told(self) -> str:
        """The findings in one line."""
        return "; ".join(f"{name}: {finding}" for name, finding in self.findings.items())


_proofs: dict[tuple, Proof] = {}
_lock = threading.RLock()


def circumstances(device: torch.device) -> tuple:
    """What the exactness and the speed of a GEMM depend on and a process can change.

    The precision of float32 products is asked of each backend by itself: the one word for all of
    them, `torch.get_float32_matmul_precision`, raises once a single backend was set apart.
    """
    if device.type == "cpu":
        precision = _float32_precision("mkldnn")
        return device, torch.get_num_threads(), torch.backends.mkldnn.enabled, precision
    return device, None, None, _float32_precision("cuda")


def _float32_precision(backend: str) -> str:
    # What `torch.backends.<backend>.matmul.fp32_precision` reads, in half its time: after a GEMM,
    # which leaves nothing else in the caches, that would be 1 % of an exact product.
    if _PRECISION_OF is not None:
        return _PRECISION_OF(backend, "matmul")
    return torch.get_float32_matmul_precision()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which is of the moment and proves nothing.

    On the host, and from some of CUDA's libraries, PyTorch raises it as a plain RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(say in str(error) for say in words)


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


def require_exact(name: str, product: Product, device: torch.device) -> None:
    """Refuse a method that was not found exact here.

    Raises:
        NotAvailable: the probe of `product` failed; `name` is what the message calls it.
    """
    proof = prove(product, device)
    if not proof.exact:
        raise NotAvailable(
            f"{name} is not exact on this {device}: {proof.finding}. Use exact_product, which "
            "takes the fastest method that was found exact here."
        )


def choose(candidates: dict[str, Product], device: torch.device, operands: str = INT8) -> Choice:
    """Time the candidates that are no loop; try them, the fastest first, until one is exact.

    On a CPU they are compared in the processor time of one thread: several that wait for each other
    on a busy machine may take a hundred times as long, and what they take says nothing of them.
    """
    on_cpu = device.type == "cpu"
    small, large = (TRIAL, LARGE) if on_cpu else (BUSY, BUSY)
    where = "the seed's size on one thread" if on_cpu else f"M = N = K = {large.in_features:,}"
    with _lock:
        findings, ready = dict.fromkeys(candidates, ""), dict(candidates)
        trial = _best_seconds(ready, probe_operands(small, device, operands))
        slow = []
        for name, seconds in sorted(trial.items(), key=lambda item: item[1]):
            times = seconds / min(trial.values()) if math.isfinite(seconds) else 1
            if times > SLOW:
                findings[name] = f"not tried further: {times:.0f} times slower than the fastest"
                slow.append(name)
                del ready[name]
        seconds = _best_seconds(ready, probe_operands(large, device, operands))
        chosen = None
        for name in sorted(ready, key=seconds.get):
            took = f"{1000 * seconds[name]:.2f} ms at {where}"
            if chosen and math.isfinite(seconds[name]):
                findings[name] = f"{took}, slower and not tried further"
                continue
            proof = prove(ready[name], device, operands)
            findings[name] = f"{proof.finding}, {took}" if proof.exact else proof.finding
            chosen = chosen or (name if proof.exact else None)
        for name in slow if chosen is None else ():  # what was faster than these is wrong
            proof = prove(candidates[name], device, operands)
            findings[name] = proof.finding
            if proof.exact:
                return Choice(name, findings)
        return Choice(chosen, findings)


def _best_seconds(
    products: dict[str, Product], operands: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The seconds of the best call of each, in turn, so that a slow moment meets them all.

    What is far from the fastest is not called again. Infinite for a method that does not run: its
    proof says in words what is wrong.

    Raises:
        RuntimeError: memory ran out, which says nothing of a method's speed.
    """
    device = operands[0].device
    best = dict.fromkeys(products, math.inf)
    with one_thread(device):
        for _ in range(TURNS):
            for name, product in products.items():
                if math.isfinite(best[name]) and best[name] > 4 * SLOW * min(best.values()):
                    continue
                try:
                    seconds = one_call(lambda f=product: f(*operands), device)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                else:
                    best[name] = min(best[name], seconds)
    return best


def one_call(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, the device's work included.

    On a CPU those of this thread's processor time: waiting for a busy processor is none of it. So
    is what other threads compute, and a call should be made with one thread.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    _synchronise(device)
    start = clock()
    call()
    _synchronise(device)
    return clock() - start


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let PyTorch compute with one thread on a CPU, and with as many as before afterwards."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probe_operands(
    size: ProblemSize, device: torch.device, operands: str = INT8
) -> tuple[Tensor, Tensor]:
    """A random left operand over a whole range, and int8 weights over all of theirs.

    On the device that is asked for, whatever the process's default device is.
    """
    dtype, _, high = _RANGES[operands]
    with torch.device("cpu"):
        a, w = random_operands(size, torch.int16, device, low=-128)
        if dtype == torch.uint8:
            a = (a.int() + 128) * high // 255  # which int16 would not hold
        return a.to(dtype), w.clamp(max=127).to(torch.int8)


def _probe(product: Product, device: torch.device, operands: str) -> Proof:
    dtype, low, high = _RANGES[operands]
    # A 16-bit sum of two products saturates at 127 · 127 and not at -128 · -128.
    corners = [(a, b) for a in (high, low) for b in (127, -128) if a]
    try:
        for a, b in corners:
            size = LARGE if (a, b) == (high, 127) else SMALL[3]
            x = torch.full((size.batch_size, size.in_features), a, dtype=dtype, device=device)
            w = torch.full(
                (size.out_features, size.in_features), b, dtype=torch.int8, device=device
            )
            wrong = (product(x, w) != a * b * size.in_features).double().mean().item()
            if wrong:
                return Proof(False, _wrong(wrong, f"{a} x {b}", size))
        for size in (*SMALL, LARGE):
            x, w = probe_operands(size, device, operands)
            # float64 holds every integer to 2**53; an int64 product of this size takes a second.
            wrong = (product(x, w) != x.double() @ w.double().T).double().mean().item()
            if wrong:
                return Proof(False, _wrong(wrong, "random operands", size))
    except RuntimeError as error:  # no such kernel for this device or dtype
        if is_out_of_memory(error):
            raise
        return Proof(False, f"it does not run here ({_first_line(error)})")
    return Proof(True, f"exact for random operands and {len(corners)} corners of {operands}")


def _wrong(share: float, operands: str, size: ProblemSize) -> str:
    sizes = f"M={size.batch_size}, N={size.out_features}, K={size.in_features}"
    return f"{share:.0%} of its numbers are wrong for {operands} at {sizes}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
