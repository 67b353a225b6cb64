"""Proof by probe: does a method give the exact numbers *here*?

Whether an int8 GEMM is exact depends on the machine, on the PyTorch that was built for it and on
switches of the process, and a wrong one gives no sign of it. So a method is tried once, and the
finding is kept for as long as the circumstances that it depends on stay the same.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from posmat.problem import NotAvailable, ProblemSize, random_operands
from posmat.products import integer_product

# At a large size a GEMM runs the kernels that real work runs: those of capped processors are right
# at many small sizes and wrong at this one.
LARGE = ProblemSize(256, 128, 9216)
SMALL = [
    ProblemSize(*sizes)
    for sizes in ((1, 1, 1), (1, 1, 2), (3, 5, 7), (17, 8, 64), (1, 128, 300), (33, 1, 65))
]
# (x, w) everywhere. A 16-bit sum of two products saturates at 127 · 127 and not at -128 · -128.
CORNERS = ((127, 127), (-128, -128), (127, -128), (-128, 127))


@dataclass(frozen=True)
class Proof:
    """What the probe of one method found: whether it is exact, and in words."""

    exact: bool
    finding: str


_proofs: dict[tuple, Proof] = {}
_lock = threading.RLock()


def circumstances(device: torch.device) -> tuple:
    """What the exactness and the speed of a GEMM depend on and a process can change.

    The precision of float32 products is asked of each backend by itself: the one word for all of
    them, `torch.get_float32_matmul_precision`, raises once a single backend was set apart.
    """
    if device.type == "cpu":
        precision = _float32_precision("mkldnn")
        return str(device), torch.get_num_threads(), torch.backends.mkldnn.enabled, precision
    return str(device), None, None, _float32_precision("cuda")


def _float32_precision(backend: str) -> str:
    # What `torch.backends.<backend>.matmul.fp32_precision` reads, in half its time: after a GEMM,
    # which leaves nothing else in the caches, that would be 1 % of an exact product.
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        return torch._C._get_fp32_precision_getter(backend, "matmul")
    return torch.get_float32_matmul_precision()


def has_onednn() -> bool:
    """Whether oneDNN, which has the fast int8 GEMM of a CPU, is built in and switched on."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which is of the moment and proves nothing.

    On the host, and from some of CUDA's libraries, PyTorch raises it as a plain RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(say in str(error) for say in words)


def prove(product: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Proof:
    """Try a method on the corners of int8 and on random operands; the first finding is kept.

    Raises:
        RuntimeError: memory ran out. It is no finding, and the next call tries again.
    """
    key = (product, circumstances(device))
    if key not in _proofs:
        with _lock:
            if key not in _proofs:
                _proofs[key] = _probe(product, device)
    return _proofs[key]


def require_exact(name: str, product: Callable[[Tensor, Tensor], Tensor], device: torch.device):
    """Refuse a method that was not found exact here.

    Raises:
        NotAvailable: the probe of `product` failed; `name` is what the message calls it.
    """
    proof = prove(product, device)
    if not proof.exact:
        raise NotAvailable(
            f"{name} is not exact on this {device}: {proof.finding}. Use exact_product, which "
            "takes the fastest method that was proved exact here."
        )


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


def probe_operands(size: ProblemSize, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random operands over the whole of int8, whatever the process's default device is."""
    with torch.device("cpu"):
        return random_operands(size, device=device, low=-128)


def _probe(product: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Proof:
    try:
        for a, b in CORNERS:
            size = LARGE if (a, b) == (127, 127) else SMALL[3]
            x = torch.full((size.batch_size, size.in_features), a, dtype=torch.int8, device=device)
            w = torch.full(
                (size.out_features, size.in_features), b, dtype=torch.int8, device=device
            )
            wrong = (product(x, w) != a * b * size.in_features).double().mean().item()
            if wrong:
                return Proof(False, _wrong(wrong, f"{a} x {b}", size))
        for size in (*SMALL, LARGE):
            x, w = probe_operands(size, device)
            # float64 holds every integer to 2**53; an int64 product of this size takes a second.
            expected = integer_product(x, w) if size is not LARGE else x.double() @ w.double().T
            wrong = (product(x, w) != expected).double().mean().item()
            if wrong:
                return Proof(False, _wrong(wrong, "random operands", size))
    except RuntimeError as error:  # no such kernel for this device or dtype
        if is_out_of_memory(error):
            raise
        return Proof(False, f"it does not run here ({_first_line(error)})")
    return Proof(True, "exact for random operands and all corners of int8")


def _wrong(share: float, operands: str, size: ProblemSize) -> str:
    sizes = f"M={size.batch_size}, N={size.out_features}, K={size.in_features}"
    return f"{share:.0%} of its numbers are wrong for {operands} at {sizes}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
