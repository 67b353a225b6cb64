"""A model whose fully connected layers and convolutions are under inexact multipliers."""

import copy
import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier
from posmat.network.layers import InexactConv2d, InexactLayer, InexactLinear, limits

KINDS = {kind.replaces: kind for kind in (InexactLinear, InexactConv2d)}


def convert_model(
    model: nn.Module,
    multiplier: str | Multiplier | Mapping[str, str | Multiplier],
    calibration: Iterable,
    weights: str = "int8",
    layers: Collection[str] | None = None,
    gradient: str = "straight-through",
) -> nn.Module:
    """A copy of a model in which every product of nn.Linear and nn.Conv2d is a multiplier's.

    These layers become `InexactLinear` and `InexactConv2d`, with the same parameters; everything
    else of the model is as it was. What is left in float is told once, as a warning.

    Args:
        model: any module; it is not changed.
        multiplier: a Multiplier, a name, or a mapping from patterns of layers' names (as of files,
            'features.*') to either: the last pattern that matches wins, and a layer that matches
            none stays float.
        calibration: batches, of which a tuple's or list's first element is what the model takes:
            the largest magnitude that reaches a layer becomes its largest int8 input.
        weights: 'int8', or 'fibonacci': magnitudes without two adjacent ones.
        layers: patterns of the layers to convert; all, if None.
        gradient: 'straight-through' or 'fitted', how the copy is trained (`InexactLayer`).

    Raises:
        TypeError: neither a name nor a Multiplier.
        ValueError: there is no such multiplier, nothing to convert, a pattern meets no layer, or a
            layer, which is named, is not called in calibration, or meets a NaN there.
    """
    made = copy.deepcopy(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in made.named_modules(remove_duplicate=False):
        own = "weight" in module._parameters and "forward" not in vars(module)
        if type(module) in KINDS and own:  # no hook computes the weight, nothing else the product
            names.setdefault(module, []).append(name)
    wanted = multiplier if isinstance(multiplier, Mapping) else {"*": multiplier}
    layers = ["*"] if layers is None else [layers] if isinstance(layers, str) else layers
    chosen = _chosen(names, wanted, layers)
    if not chosen:
        raise ValueError("there is nothing to convert: no nn.Linear and no nn.Conv2d is meant.")
    labels = {module: names[module][0] or "the model" for module in chosen}
    training = [module for module in made.modules() if module.training]
    for module in made.eval().modules():  # PyTorch's own ways around a layer's call are closed
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # which its fast path asks for
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    largest = _largest_inputs(made, labels, calibration)
    for module, found in chosen.items():
        module.__class__ = KINDS[type(module)]
        scale = (largest[module] or 1.0) / limits(found)[1]
        module.become(found, scale, weights, gradient, labels[module])
    for module in training:
        module.training = True
    left = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in made.named_modules()
        if not isinstance(module, InexactLayer | nn.Embedding)
        and any(p.ndim > 1 for p in module._parameters.values() if p is not None)
    ]
    if left:
        warnings.warn(f"left in float: {', '.join(left)}.", stacklevel=2)
    return made


def _chosen(
    names: dict[nn.Module, list[str]], wanted: Mapping, layers: Collection[str]
) -> dict[nn.Module, Multiplier]:
    every = [name for of_module in names.values() for name in of_module]
    for pattern in (*wanted, *layers):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in every):
            near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.4) or every[:5]
            raise ValueError(f"no layer is named {pattern!r}: there are {', '.join(near)}.")

    def matches(module: nn.Module, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names[module])

    multipliers = {pattern: find_multiplier(found) for pattern, found in wanted.items()}
    chosen = {}
    for module in names:
        if any(matches(module, pattern) for pattern in layers):
            found = [multipliers[pattern] for pattern in wanted if matches(module, pattern)]
            if found:
                chosen[module] = found[-1]
    return chosen


def _largest_inputs(
    model: nn.Module, layers: dict[nn.Module, str], calibration: Iterable
) -> dict[nn.Module, float]:
    """The largest magnitude that each layer is called with; and it is called, or refused."""
    largest: dict[nn.Module, float] = {}

    def watched(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            found = float(input.abs().max()) if input.numel() else 0.0
            if not found < float("inf"):
                raise ValueError(f"layer {layers[module]!r} meets {found} in calibration.")
            largest[module] = max(found, largest.get(module, 0.0))
            return type(module).forward(module, input)

        return forward

    for module in layers:  # no hooks: fast paths, which do not call a layer, are not taken then
        module.forward = watched(module)
    place = next(model.parameters()).device
    with torch.no_grad():
        for batch in calibration:
            model((batch[0] if isinstance(batch, tuple | list) else batch).to(place))
    for module in layers:
        del module.forward
    missed = [name for module, name in layers.items() if module not in largest]
    if missed:
        raise ValueError(
            f"calibration never reached layer {missed[0]!r} ({len(missed)} in all): give batches "
            "that do, or leave it out by `layers`, as where a model in eval takes its weights and "
            "does not call it."
        )
    return largest
