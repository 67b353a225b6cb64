"""The choice: for who only wants the numbers.

`exact_product` takes the fastest method that was proved exact on this device in this process;
`explain` says which and why; `PositiveLinear` is a layer that keeps what depends on its weights.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posmat.gemm import (
    blocked_float32,
    float32_product,
    fused_elementwise_product,
    int8_product,
    one_sided,
    one_sided_product,
    plain_int8,
    positive_matrix_product,
    prepare_float32,
    prepare_positive,
)
from posmat.problem import ProblemSize, check_operands
from posmat.products import elementwise_product
from posmat.proof import LARGE, circumstances, one_call, probe_operands, prove
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
TURNS = 12  # that a candidate has at the most to show that it is no loop


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
    after the number of threads was changed. `explain` says what was chosen.

    Args:
        x, w: X (M, K) and W (N, K), int8, any strides.

    Returns:
        Y (M, N): int32 where that holds every sum (K <= 131,071), int64 beyond.

    Raises:
        TypeError, ValueError: see `check_operands`.
    """
    check_operands(x, w)
    return _choice(x.device).product(x, w)


def explain(device: torch.device | str = "cpu") -> str:
    """Say which method `exact_product` takes on a device, and what was found about the others."""
    device = _with_index(device)
    choice = _choice(device)
    threads = torch.get_num_threads()
    where = f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device
    lines = [f"exact_product on {where}: {choice.name}"]
    lines += [f"  {name}: {finding}" for name, finding in choice.findings.items()]
    return "\n".join(lines)


def chosen_method(device: torch.device | str = "cpu") -> str:
    """The name of the method that `exact_product` takes on a device, such as 'int8_product'."""
    return _choice(_with_index(device)).name


def _with_index(device: torch.device | str) -> torch.device:
    """The device that a tensor there would name: 'cuda' alone means the current one."""
    device = torch.device(device)
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
    """Prove the candidates that are not hopelessly slow, then time those that are exact."""
    findings, exact = {}, {}
    for name, product in CANDIDATES.items():
        times = 1.0 if product is blocked_float32 else _times_float32(product, device)
        if times > SLOW:
            findings[name] = (
                f"not tried further: {times:.0f} times slower than float32_product, a loop"
            )
            continue
        proof = prove(product, device)
        findings[name] = proof.finding
        if proof.exact:
            exact[name] = product
    if not exact:  # integers element by element need no kernel that could be wrong
        return Choice("elementwise_product", elementwise_product, findings)
    x, w = probe_operands(LARGE, device)
    seconds = dict.fromkeys(exact, float("inf"))
    for _ in range(5):  # in turn, so that a slow moment meets them all
        for name, product in exact.items():
            once = one_call(lambda product=product: product(x, w), device)
            seconds[name] = min(seconds[name], once)
    for name in exact:
        findings[name] += f", {1000 * seconds[name]:.2f} ms at the seed's size"
    name = min(seconds, key=seconds.get)
    return Choice(name, exact[name], findings)


def _times_float32(product: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> float:
    """How many times slower than float32_product a candidate is at TRIAL, roughly.

    The two take turns, and the best call of each counts: on a busy machine any one call may wait
    for a thread that does not get the processor. It is over as soon as the candidate is fast
    enough; a loop is a loop in every turn.
    """
    x, w = probe_operands(TRIAL, device)
    best, best_float32 = float("inf"), float("inf")
    for turn in range(TURNS):
        try:
            best = min(best, one_call(lambda: product(x, w), device))
        except RuntimeError:
            return 1.0  # the proof says in words what is wrong
        best_float32 = min(best_float32, one_call(lambda: blocked_float32(x, w), device))
        if turn > 1 and best <= SLOW * best_float32:
            break
    return best / best_float32


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
    when the weights were loaded, moved or written to. It is not saved: a file holds the int8 weight
    only, so what was saved under one method, on one machine, loads under any other.

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
        if w.dtype != torch.int8:
            raise TypeError(f"w is {w.dtype}: the weights of this layer must be torch.int8.")
        if w.ndim != 2:
            raise ValueError(
                f"w has shape {tuple(w.shape)}: it must be a matrix (out_features, in_features)."
            )
        if method != "exact" and method not in LAYER_METHODS:
            names = ", ".join(map(repr, LAYER_METHODS))
            raise ValueError(f"there is no method {method!r}: choose 'exact' or one of {names}.")
        self.method = method
        with torch.inference_mode(False):  # a tensor of inference mode does not count its changes
            weight = w.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", weight)
        self._prepared = None
        self._prepared_from = None
        self._parts()

    def forward(self, x: Tensor) -> Tensor:
        """The product of x (..., K) with the weights: (..., N), int32 or int64."""
        if x.ndim == 2:
            return self._product()(x, self._parts())
        y = self._product()(x.reshape(-1, x.shape[-1] if x.ndim else 1), self._parts())
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, method={self.method!r}"

    def _method(self) -> str:
        if self.method != "exact":
            return self.method
        return _choice(self.weight.device).name.removesuffix("_product")

    def _product(self) -> Callable[..., Tensor]:
        return LAYER_METHODS[self._method()][1]

    def _parts(self):
        """What the method needs of the weights as they are now."""
        weight, method = self.weight, self._method()
        if weight.is_inference():  # it does not count its changes, so nothing can be kept
            return LAYER_METHODS[method][0](weight)
        made_from = self._prepared_from
        if (
            not made_from
            or made_from[0] is not weight
            or made_from[1:] != (weight._version, method)
        ):
            with torch.inference_mode(False):
                self._prepared = LAYER_METHODS[method][0](weight)
            self._prepared_from = weight, weight._version, method
        return self._prepared

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
