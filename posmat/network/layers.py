"""Layers whose every product is an inexact multiplier's: float in, float out, int8 between.

Activations get one scale for the tensor, weights one for each output channel; both are fixed when a
layer is made. The sums are those of the multiplier's table, bit for bit; scales and bias are float.
A convolution's padded zero is an operand 0 like any other.
"""

import copy
import math
from collections import defaultdict
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmat.multipliers.fibonacci import best_scales, fibonacci_codes
from posmat.multipliers.product import InexactWeight, inexact_product, prepare_inexact
from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier, require_known

WEIGHTS = ("int8", "fibonacci")
GRADIENTS = ("straight-through", "fitted")
CANDIDATES = (64, 32)  # for the scale of an output channel
ROWS = 64  # of a weight matrix whose scales are searched at a time
BLOCK_BYTES = defaultdict(lambda: 2**28, cpu=2 * 2**20)  # of operands at a time: a CPU's caches


@cache
def _nearest(weights: str, largest: int) -> Tensor:
    """The code nearest to a magnitude in 0..largest, by its halves; a tie goes to the larger."""
    codes = fibonacci_codes(7) if weights == "fibonacci" else torch.arange(largest + 1)
    codes = codes[codes <= largest]
    midpoints = codes[:-1] + codes[1:]  # in halves, where every midpoint is whole
    halves = torch.arange(2 * largest + 1)
    return codes[torch.bucketize(halves, midpoints, right=True)].to(torch.int8)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _Product(torch.autograd.Function):
    """layer.product(x), and its gradient by what the layer puts in the operands' place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "InexactLayer"):
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer, (x, weight), needs = ctx.layer, ctx.saved_tensors, ctx.needs_input_grad
        padded = 0.0
        if layer.gradient == "fitted":
            of_weight, of_input = (torch.tensor(s).to(x) for s in layer.multiplier.slopes)
            of_input = of_input * layer.input_scale
            weight = of_weight[layer.weight_codes().view(torch.uint8).int()] * layer.by_channel()
            x, padded = of_input[layer.input_codes(x).view(torch.uint8).int()], float(of_input[0])
        found = layer.gradients(x, padded, weight.to(x), gradient, list(needs[:2]))
        others = [axis for axis in range(gradient.ndim) if axis != 1]
        return *found, gradient.sum(others) if needs[2] else None, None


class InexactLayer(nn.Module):
    """What a fully connected layer and a convolution have in common."""

    path = "auto"  # as `prepare_inexact` takes it

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        multiplier: str | Multiplier,
        input_scale: float,
        weights: str = "int8",
        gradient: str = "straight-through",
        name: str = "layer",
    ) -> "InexactLayer":
        """A copy of a float layer whose products are the multiplier's.

        Args:
            layer: an nn.Linear, or an nn.Conv2d.
            multiplier: a Multiplier or the name of a shipped one.
            input_scale: what one step of the int8 input is worth; largest input / 127, mostly.
            weights: 'int8', or 'fibonacci': only magnitudes without two adjacent ones.
            gradient: how it is trained: 'straight-through', as if the layer were the float one; or
                'fitted', with the least-squares slope of the multiplier's table at each operand.
            name: of the layer, for its errors: a layer of another kind is a TypeError, anything
                else that it cannot be made of a ValueError.
        """
        if type(layer) is not cls.replaces:
            raise TypeError(f"{type(layer).__name__} is no {cls.replaces.__name__}.")
        made = copy.deepcopy(layer)
        made.__class__ = cls
        made.become(find_multiplier(multiplier), input_scale, weights, gradient, name)
        return made

    def become(
        self, multiplier: Multiplier, input_scale: float, weights: str, gradient: str, name: str
    ) -> None:
        """Set up a float layer that was given this class: scales, once and for all."""
        require_known("kind of weights", weights, WEIGHTS)
        require_known("gradient", gradient, GRADIENTS)
        if not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale={input_scale} of {name!r}: give a positive number.")
        self.multiplier, self.weights = multiplier, weights
        self.gradient, self.name = gradient, name
        self._kept = None
        weight, codes = self.weight.detach(), _nearest(weights, multiplier.limits[0]).unique()
        rows = weight.flatten(1).double().abs()
        largest = rows.amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError(f"layer {name!r} has a weight that is not finite.")
        rows = (rows / largest.clamp_min(torch.finfo(torch.float64).tiny)).split(ROWS)
        found = torch.cat([best_scales(part, codes, CANDIDATES) for part in rows])
        scales = (found * largest.flatten().where(found < 1, 1)).to(weight.dtype)
        self.register_buffer("input_scale", weight.new_tensor(input_scale))
        self.register_buffer("weight_scale", scales.clamp_min_(torch.finfo(weight.dtype).tiny))

    def weight_codes(self) -> Tensor:
        """The weights as they multiply now: int8, in the shape of `weight`."""
        weight, largest = _wide(self.weight.detach()), self.multiplier.limits[0]
        halves = (weight.abs() * 2 / self.by_channel()).clamp_(max=2 * largest)
        if bool(halves.isnan().any()):
            raise ValueError(f"layer {self.name!r} has a weight that is NaN.")
        codes = _nearest(self.weights, largest).to(weight.device)[halves.int()]
        return torch.where(weight < 0, -codes, codes)

    def by_channel(self) -> Tensor:
        """The weights' scales, to be multiplied with something in the shape of `weight`."""
        return self.weight_scale.view(-1, *[1] * (self.weight.ndim - 1))

    def input_codes(self, x: Tensor) -> Tensor:
        """An input as it multiplies: int8 in its shape, clamped to what calibration brought."""
        codes, largest = torch.empty_like(x, dtype=torch.int8), self.multiplier.limits[1]
        step = max(1, BLOCK_BYTES[x.device.type] * len(x) // max(1, x.nbytes))
        for part, to in zip(x.detach().split(step), codes.split(step), strict=True):
            scaled = torch.div(part, self.input_scale).round_().clamp_(-largest, largest)
            if bool(scaled.sum().isnan()):
                raise ValueError(f"layer {self.name!r} was given a NaN.")
            to.copy_(scaled)
        return codes

    def prepared(self) -> list[InexactWeight]:
        """Weights (N, K) of each group, ready; kept in eval until they change, but by `.data`."""
        weight = self.weight
        counts = [t._version for t in (weight, self.weight_scale) if not t.is_inference()]
        asked = self.path, self.multiplier, self.weights
        key = (asked, weight.data_ptr(), weight.device, counts)
        if self.training or self._kept is None or self._kept[0] != key:
            rows = self.weight_codes().movedim(1, -1).flatten(1).chunk(self.groups)
            self._kept = key, [prepare_inexact(row, self.multiplier, self.path) for row in rows]
        return self._kept[1]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What goes out for x, batch and channels first; in blocks that stay in the caches."""
        weights, scale = self.prepared(), self.input_scale.to(x) * self.weight_scale.to(x)
        step, y = self.at_a_time(x), None
        for start in range(0, max(1, len(x)), step):
            sums = self.sums(self.input_codes(x[start : start + step]), weights).movedim(1, -1)
            if y is None:  # laid out as x: the channels last, as they are in sums, or first
                like = sums if x.stride(1) == 1 else sums.movedim(-1, 1)
                y = x.new_empty((len(x), *like.shape[1:]))
                y = y if like is sums else y.movedim(1, -1)
            scaled = torch.mul(sums, scale, out=y[start : start + step])
            if bias is not None:
                scaled.add_(bias)
        return y.movedim(-1, 1)

    def integers(self, x: Tensor) -> Tensor:
        """The bare sums of int8 x, by the weights as they are now: no scale, no bias.

        x is (M, K) or (B, C, H, W); padding that is not with zeros is left to the caller.
        """
        self._require(x)
        weights = self.prepared()
        return torch.cat([self.sums(part, weights) for part in x.split(self.at_a_time(x))])

    def at_a_time(self, x: Tensor) -> int:
        return max(1, len(x))

    def _require(self, x: Tensor) -> None:
        channels, axis = self.weight.shape[1] * self.groups, self.weight.ndim - 1
        beyond = axis == 3 and x.ndim > 4  # a fully connected layer takes any number in front
        if x.ndim < axis or beyond or x.shape[-axis] != channels:
            takes = self.takes.format(channels)
            raise ValueError(f"layer {self.name!r} takes {takes}, and got {tuple(x.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        """As the float layer's: whatever floating dtype comes in goes out."""
        if not input.is_floating_point():
            raise TypeError(f"layer {self.name!r} takes floats, and got {input.dtype}.")
        self._require(input)
        with torch.autocast(input.device.type, enabled=False):
            return self.float_to_float(_wide(input)).to(input.dtype)

    def train(self, mode: bool = True) -> "InexactLayer":
        """As every module's; weights that were kept are forgotten."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.multiplier.name!r}, {self.weights} weights"


class InexactLinear(InexactLayer, nn.Linear):
    """An nn.Linear under a multiplier; made by `from_float` or `convert_model`."""

    replaces, groups, takes = nn.Linear, 1, "(..., {})"

    def float_to_float(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.bias, self)
        return y.view(*x.shape[:-1], self.out_features)

    def sums(self, x: Tensor, weights: list[InexactWeight]) -> Tensor:
        return inexact_product(x, weights[0])

    def gradients(self, x: Tensor, padded: float, weight: Tensor, of_y: Tensor, needs: list[bool]):
        return of_y @ weight if needs[0] else None, of_y.t() @ x if needs[1] else None


class InexactConv2d(InexactLayer, nn.Conv2d):
    """An nn.Conv2d under a multiplier; made by `from_float` or `convert_model`."""

    replaces, takes = nn.Conv2d, "(..., {}, H, W)"

    def float_to_float(self, x: Tensor) -> Tensor:
        images = x[None] if x.ndim == 3 else x
        if self.padding_mode != "zeros":
            images = F.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        y = _Product.apply(images, self.weight, self.bias, self)
        return y[0] if x.ndim == 3 else y

    def sums(self, x: Tensor, weights: list[InexactWeight]) -> Tensor:
        """(B, N, OH, OW) of int8 (B, C, H, W): im2col, and a product for each group."""
        # The channels last: a kernel's row is one run of bytes.
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, *self._zeros())).contiguous()
        (B, H, W, C), (kh, kw), (dh, dw) = x.shape, self.kernel_size, self.dilation
        (sh, sw), (b, h, w, c) = self.stride, x.stride()
        OH, OW = (H - dh * (kh - 1) - 1) // sh + 1, (W - dw * (kw - 1) - 1) // sw + 1
        if min(OH, OW) < 1:
            raise ValueError(f"layer {self.name!r}: {H} x {W}, padded, is less than the kernel.")
        shape = (B, OH, OW, kh, kw, C // self.groups)
        strides = (b, sh * h, sw * w, dh * h, dw * w, c)
        found = []
        for part, weight in zip(x.chunk(self.groups, 3), weights, strict=True):
            patches = part.as_strided(shape, strides, part.storage_offset())
            found.append(inexact_product(patches.reshape(B * OH * OW, weight.shape[1]), weight))
        y = found[0] if self.groups == 1 else torch.cat(found, 1)
        return y.view(B, OH, OW, self.out_channels).permute(0, 3, 1, 2)

    def at_a_time(self, x: Tensor) -> int:
        places = x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        kernel = self.weight[0].numel() * self.groups
        return max(
            1, BLOCK_BYTES[x.device.type] // max(1, places * max(4 * self.out_channels, kernel))
        )

    def _zeros(self) -> list[int]:
        """How many zeros are padded left, right, at the top and at the bottom."""
        return self._reversed_padding_repeated_twice if self.padding_mode == "zeros" else [0] * 4

    def gradients(self, x: Tensor, padded: float, weight: Tensor, of_y: Tensor, needs: list[bool]):
        x, how = F.pad(x, self._zeros(), value=padded), (self.stride, [0, 0], self.dilation)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            of_y, x, weight, None, *how, False, [0, 0], self.groups, [*needs, False]
        )
        return F.pad(of_x, [-n for n in self._zeros()]) if needs[0] else None, of_weight
