"""The choice: for who only wants the numbers.

`exact_product` takes the fastest method that was found exact on this device in this process;
`explain` says which and why.
"""

import torch
from torch import Tensor

from posmat.layer.engines import by_float32, by_int8
from posmat.layer.gemm import one_sided_int8, require_kind
from posmat.layer.problem import check_operands
from posmat.layer.products import elementwise_product
from posmat.layer.proof import Choice, Product, choose, circumstances
from posmat.machine import require_device

CANDIDATES: dict[str, Product] = {
    "int8_product": by_int8,
    "one_sided_product": one_sided_int8,
    "float32_product": by_float32,
}
_choices: dict[tuple, tuple[Choice, Product]] = {}


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
    return _chosen(x.device)[1](x, w)


def explain(device: torch.device | str = "cpu") -> str:
    """Say which method `exact_product` takes on a device, and what was found about the others.

    Raises:
        ValueError: the device is not known or not there.
    """
    device = _with_index(device)
    choice, _ = _chosen(device)
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
    return _chosen(_with_index(device))[0].name


def _with_index(device: torch.device | str) -> torch.device:
    """The device that a tensor there would name: 'cuda' alone means the current one."""
    device = require_device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _chosen(device: torch.device) -> tuple[Choice, Product]:
    key = circumstances(device)
    found = _choices.get(key)
    if found is None:
        choice = choose(CANDIDATES, device)
        if choice.name is None:  # integers element by element need no kernel that could be wrong
            choice = Choice("elementwise_product", choice.findings)
        product = CANDIDATES.get(choice.name, elementwise_product)
        found = _choices[key] = choice, product
    return found
