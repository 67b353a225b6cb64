"""The choice, for who only wants the numbers: the fastest method that was found exact here."""

import torch
from torch import Tensor

from posmat.layer.engines import by_float32, by_int8
from posmat.layer.gemm import check_for, one_sided
from posmat.layer.products import elementwise_product
from posmat.layer.proof import Choice, Product, choose, circumstances
from posmat.machine import require_device

CANDIDATES: dict[str, Product] = {
    "int8_product": by_int8,
    "one_sided_product": one_sided,
    "float32_product": by_float32,
}
_choices: dict[tuple, tuple[Choice, Product]] = {}


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """The product Y = X Wᵀ of int8 operands, exact on every machine, by the fastest way there.

    The first call on a device probes the methods, for about a tenth of a second; so does the first
    after the number of threads was changed. `explain` says what was chosen.

    Returns:
        Y (M, N): int32 where that holds every sum (K <= 131,071), int64 beyond.
    """
    check_for("exact_product", x, w)
    return _chosen(x.device)[1](x, w)


def explain(device: torch.device | str = "cpu") -> str:
    """Say which method `exact_product` takes on a device, and what was found about the others.

    Raises:
        ValueError: the device is not known or not there.
    """
    device = _with_index(device)
    name, findings = _chosen(device)[0]
    threads = torch.get_num_threads()
    where = f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device
    lines = [f"  {candidate}: {finding}" for candidate, finding in findings.items()]
    return "\n".join([f"exact_product on {where}: {name}", *lines])


def chosen_method(device: torch.device | str = "cpu") -> str:
    """The name of the method that `exact_product` takes on a device; raises as `explain` does."""
    return _chosen(_with_index(device))[0].name


def _with_index(device: torch.device | str) -> torch.device:
    """The device that a tensor there names: 'cuda' alone means the current one."""
    return torch.empty(0, device=require_device(device)).device


def _chosen(device: torch.device) -> tuple[Choice, Product]:
    key = circumstances(device)
    found = _choices.get(key)
    if found is None:
        choice = choose(CANDIDATES, device)
        if choice.name is None:  # integers element by element need no kernel that could be wrong
            choice = choice._replace(name="elementwise_product")
        found = _choices[key] = choice, CANDIDATES.get(choice.name, elementwise_product)
    return found
