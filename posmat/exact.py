"""The choice: for who only wants the numbers.

`exact_product` takes the fastest method that was proved exact on this device in this process;
`explain` says which and why; `PositiveLinear` is a layer that keeps what depends on its weights.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posmat.environment import require_device
from posmat.gemm import (
    blocked_float32,
    check_weight,
    float32_product,
    fused_elementwise_product,
    int8_product,
    one_sided,
    one_sided_product,
    plain_int8,
    positive_matrix_product,
    prepare_float32,
    prepare_positive,
    require_kind,
)
from posmat.problem import ProblemSize, check_operands
from posmat.products import elementwise_product
from posmat.proof import (
    LARGE,
    circumstances,
    has_onednn,
    one_call,
    one_thread,
    probe_operands,
    prove,
)
from posmat.signmag import to_sign_magnitude

CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int8_product": plain_int8,
    "one_sided_product": one_sided,
    "float32_product": blocked_float32,
}

# Where PyTorch has no int8 kernel for a processor it falls back to a loop, exact and 170 times
# slower than the kernel. A small size tells, and does not take long to.
TRIAL = ProblemSize(128, 64, 2048)
SLOW = 5  # times float32_product, at TRIAL
TURNS = 3  # of two candidates; the best of each counts


@dataclass(frozen=True)
class Choice:
    """The method that was chosen for one device, and what was found about every candidate."""

    name: str
    product: Callable[[Tensor, Tensor], Tensor]
    findings: dict[str, str]


_choices: dict[tuple, Choice] = {}
_lock = threading.Lock()


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """The product Y = X Wᵀ of int8 operands, exact on every machine, by the fastest way there.

    The first call on a device probes the methods, for about a tenth of a second; so does the first
    after the number of threads was changed. On a CPU they are compared in the processor time of one
    thread, so that a busy machine does not change the choice. `explain` says what was chosen.

    Args:
        x, w: X (M, K) and W (N, K), int8, any strides.

    Returns:
        Y (M, N): int32 where that holds every sum (K <= 131,071), int64 beyond.

    Raises:
        TypeError, ValueError: see `check_operands`.
    """
    require_kind("exact_product", w)
    check_operands(x, w)
    return _choice(x.device).product(x, w)


def explain(device: torch.device | str = "cpu") -> str:
    """Say which method `exact_product` takes on a device, and what was found about the others.

    Raises:
        ValueError: the device is not known or not there.
    """
    device = _with_index(device)
    choice = _choice(device)
    threads = torch.get_num_threads()
    where = f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device
    lines = [f"exact_product on {where}: {choice.name}"]
    lines += [f"  {name}: {finding}" for name, finding in choice.findings.items()]
    return "\n".join(lines)


def chosen_method(device: torch.device | str = "cpu") -> str:
    """The name of the method that `exact_product` takes on a device, such as 'int8_product'.

    Raises:
        ValueError: the device is not known or not there.
    """
    return _choice(_with_index(device)).name


def _with_index(device: torch.device | str) -> torch.device:
    """The device that a tensor there would name: 'cuda' alone means the current one."""
    device = require_device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _choice(device: torch.device) -> Choice:
    key = circumstances(device)
    choice = _choices.get(key)
    if choice is None:
        with _lock:
            choice = _choices.get(key)
            if choice is None:
                choice = _choices[key] = _choose(device)
    return choice


def _choose(device: torch.device) -> Choice:
    """Time the candidates that are no loop; prove them, the fastest first, until one is exact."""
    findings = {name: _why_slow(product, device) for name, product in CANDIDATES.items()}
    ready = {name: product for name, product in CANDIDATES.items() if not findings[name]}
    x, w = probe_operands(LARGE, device)
    seconds = _best_seconds({name: lambda f=f: f(x, w) for name, f in ready.items()}, device, 5)
    where = " on one thread" if device.type == "cpu" else ""
    chosen = None
    for name in sorted(ready, key=seconds.get):
        took = f"{1000 * seconds[name]:.2f} ms at the seed's size{where}"
        if chosen and seconds[name] < math.inf:
            findings[name] = f"{took}, slower and not tried further"
            continue
        proof = prove(ready[name], device)
        findings[name] = f"{proof.finding}, {took}" if proof.exact else proof.finding
        if proof.exact:
            chosen = name
    if chosen:
        return Choice(chosen, ready[chosen], findings)
    # Integers element by element need no kernel that could be wrong.
    return Choice("elementwise_product", elementwise_product, findings)


def _why_slow(product: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> str:
    """Why a candidate is hopelessly slow on a device; empty where it is not."""
    if product is blocked_float32:
        return ""
    if product in (plain_int8, one_sided) and device.type == "cpu" and not has_onednn():
        return "not tried: without oneDNN the int8 GEMM of PyTorch is a loop"
    x, w = probe_operands(TRIAL, device)
    calls = {"it": lambda: product(x, w), "float32": lambda: blocked_float32(x, w)}
    seconds = _best_seconds(calls, device, TURNS)
    times = seconds["it"] / seconds["float32"]
    if SLOW < times < math.inf:
        return f"not tried further: {times:.0f} times slower than float32_product, a loop"
    return ""


def _best_seconds(
    calls: dict[str, Callable[[], object]], device: torch.device, turns: int
) -> dict[str, float]:
    """The seconds of the best call of each, in turn, so that a slow moment meets them all.

    With one thread on a CPU: several that wait for each other on a busy machine may take a hundred
    times as long, and what they take says nothing of the method. Infinite for a method that does
    not run: its proof says in words what is wrong.
    """
    best = dict.fromkeys(calls, math.inf)
    with one_thread(device):
        for _ in range(turns):
            for name, call in calls.items():
                with contextlib.suppress(RuntimeError):
                    best[name] = min(best[name], one_call(call, device))
    return best


def _as_it_is(w: Tensor) -> Tensor:
    return w


# What each method of a layer prepares of its weights, and the product that takes it.
LAYER_METHODS: dict[str, tuple[Callable, Callable[..., Tensor]]] = {
    "positive": (prepare_positive, positive_matrix_product),
    "one_sided": (_as_it_is, one_sided_product),
    "int8": (_as_it_is, int8_product),
    "float32": (prepare_float32, float32_product),
    "elementwise": (_as_it_is, elementwise_product),
    "fused_elementwise": (to_sign_magnitude, fused_elementwise_product),
}


class PositiveLinear(nn.Module):
    """A fully connected layer of int8 weights: x (..., K) -> y (..., N), exact integers.

    What a method needs of the weights (their parts, or a float32 copy) is made once, and made anew
    when the weights were loaded, moved, replaced or written to. It is not saved: a file holds the
    int8 weight only, so what was saved under one method, on one machine, loads under any other.

    PyTorch counts what is written to a tensor, but not what is written to its memory behind its
    back: through `weight.data`, as in `weight.data.copy_(...)`, or through NumPy. After such a
    write call `refresh()`. To find it out would cost as much as a dozen rows of X, at every call.

    Args:
        w: W (N, K), int8; the layer keeps a copy.
        method: a name in LAYER_METHODS, or "exact": the one that `exact_product` takes where the
            layer is.

    Raises:
        TypeError: w is not int8.
        ValueError: w is not a matrix, or there is no such method.
    """

    weight: Tensor

    def __init__(self, w: Tensor, method: str = "positive"):
        super().__init__()
        check_weight(w)
        if method != "exact" and method not in LAYER_METHODS:
            names = ", ".join(map(repr, LAYER_METHODS))
            raise ValueError(f"there is no method {method!r}: choose 'exact' or one of {names}.")
        self.method = method
        with torch.inference_mode(False):  # a tensor of inference mode does not count its changes
            weight = w.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", weight)
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """The product of x (..., K) with the weights: (..., N), int32 or int64.

        Raises:
            RuntimeError: the weight is on the meta device and has no data.
            TypeError, ValueError: x or the weight is not int8, or the two do not fit.
        """
        if self.weight.is_meta:
            raise RuntimeError(
                "the weight has no data, it is on the meta device: load it with "
                "load_state_dict(..., assign=True), or call to_empty() first and load it then."
            )
        if x.ndim == 0:
            raise ValueError("x has no dimension: it must be (..., in_features).")
        method = self._method()
        product, parts = LAYER_METHODS[method][1], self._parts(method)
        if x.ndim == 2:
            return product(x, parts)
        y = product(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), parts)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def refresh(self) -> None:
        """Prepare the weights anew, as after a write that PyTorch does not count (see above)."""
        self._prepared = self._prepared_from = None
        if not self.weight.is_meta:  # one without data is prepared once it has them
            self._parts(self._method())

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, method={self.method!r}"

    def _method(self) -> str:
        if self.method != "exact":
            return self.method
        return _choice(self.weight.device).name.removesuffix("_product")

    def _parts(self, method: str):
        """What the method needs of the weights as they are now."""
        weight = self.weight
        if weight.is_inference():  # it does not count its changes, so nothing can be kept
            return self._prepare(weight, method)
        made_from = method, weight._version, weight.dtype
        before = self._prepared_from
        if (
            not before
            or before[0] is not weight
            or before[1] != made_from
            or not weight.is_set_to(before[2])  # the same memory, sizes and strides
        ):
            with torch.inference_mode(False):
                self._prepared = self._prepare(weight, method)
                # The alias keeps the memory, whose address would else serve for other weights.
                self._prepared_from = weight, made_from, weight.detach()
        return self._prepared

    def _prepare(self, weight: Tensor, method: str):
        check_weight(weight)
        return LAYER_METHODS[method][0](weight)

    def _apply(self, fn, recurse=True):
        # Moved: what was prepared on the old device would only take its memory.
        self._prepared = self._prepared_from = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        found = state_dict.get(prefix + "weight")
        if found is not None and found.dtype != torch.int8:
            error_msgs = rest[-1]
            error_msgs.append(f"{prefix}weight is {found.dtype}: this layer loads torch.int8 only.")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):
        return {**self.__dict__, "_prepared": None, "_prepared_from": None}
