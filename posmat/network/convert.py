"""A model whose fully connected layers and convolutions are under inexact multipliers."""

import copy
import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier
from posmat.network.layers import InexactConv2d, InexactLayer, InexactLinear

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
        weights, gradient: as `InexactLayer.from_float` takes them.
        layers: patterns of the layers to convert; all, if None.

    Raises:
        TypeError: neither a name nor a Multiplier, or a batch is no tensor.
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
    for module, found in chosen.items():
        module.__class__ = KINDS[type(module)]
        module.become(found, 1.0, weights, gradient, names[module][0] or "the model")
    training = [module for module in made.modules() if module.training]
    for module in made.eval().modules():  # PyTorch's own ways around a layer's call are closed
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            module.activation_relu_or_gelu, module.use_nested_tensor = 0, False
    _calibrate(made, chosen, calibration)
    for module in training:
        module.training = True
    left = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in made.named_modules()
        if not isinstance(module, InexactLayer | nn.Embedding | nn.LayerNorm)
        and any(p.ndim > 1 for p in module._parameters.values() if p is not None)
    ]
    if left:
        warnings.warn(f"left in float: {', '.join(left)}.", stacklevel=2)
    return made


def _chosen(
    names: dict[nn.Module, list[str]], wanted: Mapping, layers: Collection[str]
) -> dict[nn.Module, Multiplier]:
    """Which layers become a multiplier's, and which: in the model's order."""
    multipliers = {pattern: find_multiplier(found) for pattern, found in wanted.items()}
    met: dict[str, set[nn.Module]] = {}
    for pattern in (*wanted, *layers):
        met[pattern] = {m for m, own in names.items() if any(fnmatchcase(n, pattern) for n in own)}
        if not met[pattern] and pattern != "*":
            every = [name for own in names.values() for name in own]
            near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.4) or every[:5]
            raise ValueError(f"no layer is named {pattern!r}: there are {', '.join(near)}.")
    meant = {module for pattern in layers for module in met[pattern]}
    last = {module: multipliers[pattern] for pattern in wanted for module in met[pattern] & meant}
    return {module: last[module] for module in names if module in last}


def _calibrate(model: nn.Module, layers: Collection[InexactLayer], calibration: Iterable) -> None:
    """Set the scale of each layer's input, by the largest magnitude that the layer is called with.

    It computes in float here, and no hook watches: some models bypass layers without hooks only.
    """
    largest: dict[InexactLayer, float] = {}

    def watched(layer: InexactLayer, input: Tensor) -> Tensor:
        layer._require(input)
        found = float(input.abs().max()) if input.numel() else 0.0
        if not found < math.inf:
            raise ValueError(f"layer {layer.name!r} meets {found} in calibration.")
        largest[layer] = max(found, largest.get(layer, 0.0))
        return layer.replaces.forward(layer, input)

    for layer in layers:
        layer.forward = partial(watched, layer)
    place = next(model.parameters()).device
    with torch.no_grad():
        for batch in calibration:
            given = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(given, Tensor):
                raise TypeError(f"a batch of calibration is a {type(given).__name__}, no tensor.")
            model(given.to(place))
    missed = [layer.name for layer in layers if layer not in largest]
    if missed:
        raise ValueError(
            f"calibration never reached layer {missed[0]!r} ({len(missed)} in all): give batches "
            "that do, or leave it out by `layers`, as where a model in eval takes its weights and "
            "does not call it."
        )
    for layer, found in largest.items():
        del layer.forward
        layer.input_scale.fill_((found or 1.0) / layer.multiplier.limits[1])
