"""The two layers: their integers against the summed table, their floats, and their gradients."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import posmat as pm
from posmat.network import layers
from posmat.tests.conftest import no_cuda
from posmat.tests.test_inexact import TABLES, get, summed_table

# TABLES' products with 0 are not 0, but for those of 4 bits here.
MULTIPLIERS = ["exact", "or_pairs", "rank 3", "full rank", "signed", "4 bits", "4 bits signed"]


def converted(layer: nn.Module, multiplier="or_pairs", input_scale=1.0, **words) -> nn.Module:
    kind = pm.InexactLinear if isinstance(layer, nn.Linear) else pm.InexactConv2d
    return kind.from_float(layer, multiplier, input_scale, **words)


def borders(conv: nn.Conv2d) -> list[int]:
    """What is padded left, right, at the top and at the bottom, by the words of nn.Conv2d."""
    found = []
    for axis in (1, 0):
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if conv.padding == "same":
            found += [total // 2, total - total // 2]
        else:
            found += [0 if conv.padding == "valid" else conv.padding[axis]] * 2
    return found


def summed_patches(x: Tensor, w: Tensor, conv: nn.Conv2d, multiplier) -> Tensor:
    """The convolution of padded int8 x (B, C, H, W), place by place, from the table: int64."""
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    rows = range(0, x.shape[2] - dh * (kh - 1), sh)
    columns = range(0, x.shape[3] - dw * (kw - 1), sw)
    y = torch.zeros(len(x), len(w), len(rows), len(columns), dtype=torch.int64)
    n, c = len(w) // conv.groups, x.shape[1] // conv.groups
    for g, (i, row), (j, column) in itertools.product(
        range(conv.groups), enumerate(rows), enumerate(columns)
    ):
        of_rows = slice(row, row + dh * (kh - 1) + 1, dh)
        of_columns = slice(column, column + dw * (kw - 1) + 1, dw)
        patch = x[:, g * c : (g + 1) * c, of_rows, of_columns].flatten(1)
        weights = w[g * n : (g + 1) * n].flatten(1)
        y[:, g * n : (g + 1) * n, i, j] = summed_table(patch, weights, multiplier)
    return y


def whole_numbers(*shape: int, multiplier="exact", seed: int = 0) -> Tensor:
    """Floats that are int8 operands at a scale of 1; a third of them 0, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    largest = layers.limits(get(multiplier))[1]
    x = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    return x * (torch.rand(shape, generator=generator) > 0.33)


@st.composite
def convolutions(draw) -> nn.Conv2d:
    """Every option of nn.Conv2d."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, (2, 0), (0, 1)]))
    stride = 1 if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    channels, outputs, groups = draw(
        st.sampled_from([(1, 3, 1), (3, 2, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)])
    )
    return nn.Conv2d(
        *(channels, outputs, kernel, stride, padding),
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


@settings(max_examples=80, deadline=None)
@given(
    convolutions(),
    st.sampled_from(MULTIPLIERS),
    st.tuples(st.integers(0, 3), st.integers(3, 8), st.integers(3, 9)),
    st.integers(0, 9),
)
def test_a_convolution_is_the_summed_table(conv, name, sizes, seed):
    B, H, W = sizes
    left, right, top, bottom = around = borders(conv)
    assume(H + top + bottom > conv.dilation[0] * (conv.kernel_size[0] - 1))
    assume(W + left + right > conv.dilation[1] * (conv.kernel_size[1] - 1))
    assume(conv.padding_mode == "zeros" or max(around) < min(H, W))  # as PyTorch asks
    x = whole_numbers(max(1, B), conv.in_channels, H, W, multiplier=name, seed=seed)
    layer = converted(conv, get(name)).eval()
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    operands, w = F.pad(x, around, mode).to(torch.int8), layer.weight_codes()
    sums = summed_patches(operands, w, conv, get(name))
    if name == "exact":
        words = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
        assert torch.equal(sums, F.conv2d(operands.double(), w.double(), **words).long())
    y = (sums.float().movedim(1, -1) * layer.weight_scale).movedim(-1, 1)
    y = y if conv.bias is None else y + conv.bias.detach().view(-1, 1, 1)
    # B of 0 stands for a single image without a batch, which nn.Conv2d takes too.
    assert torch.equal(layer(x[0] if B == 0 else x), y[0] if B == 0 else y)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), y)
    if conv.padding_mode == "zeros":
        assert torch.equal(layer.integers(x.to(torch.int8)).long(), sums)


@pytest.mark.parametrize("name", [*MULTIPLIERS, *(set(TABLES) - set(MULTIPLIERS))])
@pytest.mark.parametrize("shape", [(19,), (5, 19), (2, 3, 19), (0, 19)], ids=str)
def test_a_fully_connected_layer_is_the_summed_table(name, shape):
    layer = converted(nn.Linear(19, 7), get(name)).eval()
    x = whole_numbers(*shape, multiplier=name)
    operands, w = x.reshape(-1, 19).to(torch.int8), layer.weight_codes()
    sums = summed_table(operands, w, get(name))
    if name == "exact":
        assert torch.equal(sums, pm.integer_product(operands, w))
    assert torch.equal(layer.integers(operands).long(), sums)
    y = sums.float() * layer.weight_scale + layer.bias
    assert torch.equal(layer(x), y.view(*shape[:-1], 7))


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("name", ["exact", "4 bits", "4 bits signed"])
def test_weights_have_a_scale_of_little_error_and_keep_it(weights, name):
    torch.manual_seed(0)
    conv, largest = nn.Conv2d(3, 50, 3), layers.limits(get(name))[0]
    conv.weight.data[1] = 0
    layer = converted(conv, get(name), weights=weights)
    codes = pm.fibonacci_codes(7) if weights == "fibonacci" else torch.arange(128)
    codes, w = codes[codes <= largest], layer.weight_codes()
    assert torch.isin(w.abs(), codes).all() and not w[1].any()
    found = (w * layer.by_channel() - layer.weight).square().mean()
    best = [pm.quantize_magnitudes(row, codes).mean_squared_error for row in layer.weight]
    assert found <= 1.2 * sum(best) / len(best)  # by fewer candidates for a scale
    if weights == "int8":
        plain = (layer.weight.abs().amax((1, 2, 3), keepdim=True) / largest).clamp_min(1e-9)
        assert found < (plain * (layer.weight / plain).round() - layer.weight).square().mean()
    kept = layer.weight_scale.clone()
    layer.train()(torch.randn(2, 3, 4, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(layer.weight_scale, kept)


def test_inputs_are_rounded_and_clamped_by_the_scale():
    layer = converted(nn.Linear(4, 3), "exact", 0.5)
    x = torch.tensor([[0.74, -0.76, 1e9, -torch.inf]])
    assert layer.input_codes(x).tolist() == [[1, -2, 127, -127]]
    assert converted(nn.Linear(4, 3), get("4 bits signed")).input_codes(x).tolist() == [
        [1, -1, 7, -7]
    ]


def test_blocks_are_the_whole(monkeypatch):
    x, conv = (
        torch.randn(7, 3, 9, 9),
        converted(nn.Conv2d(3, 4, 3, padding=1), get("rank 3"), 0.03),
    )
    linear = converted(nn.Linear(243, 4), "or_pairs", 0.03)
    y, z = conv(x), linear(x.flatten(1))
    monkeypatch.setattr(layers, "BLOCK_BYTES", 1)
    assert conv.at_a_time(x) == 1
    assert torch.equal(conv(x), y) and torch.equal(linear(x.flatten(1)), z)


def every_kind() -> list[tuple[nn.Module, tuple[int, ...]]]:
    kinds = [({}, (4, 3)), ({"bias": False}, (2, 5, 3))]
    found = [(nn.Linear(3, 4, **words), shape) for words, shape in kinds]
    for words in (
        {},
        {"padding": "same", "bias": False},
        {"padding": (1, 2), "stride": (2, 3), "groups": 2},
        {"padding": "same", "dilation": 2, "groups": 4},
        {"padding": 2, "padding_mode": "circular"},
    ):
        found.append((nn.Conv2d(4, 8, (3, 2), **words), (2, 4, 7, 6)))
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the float layer's
@pytest.mark.parametrize(("plain", "shape"), every_kind(), ids=str)
def test_straight_through_gradients_are_the_float_layers(plain, shape):
    layer = converted(plain, "truncated", 0.02)
    x = torch.randn(shape)
    gradients = []
    for one in (plain, layer):
        given = x.clone().requires_grad_()
        y = one(given)
        y.backward(torch.sin(torch.arange(y.numel()).float()).view(y.shape))
        gradients.append([given.grad, *(p.grad for p in one.parameters())])
    assert len(gradients[1]) == 2 + (plain.bias is not None)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("plain", "shape"), every_kind(), ids=str)
def test_fitted_gradients_of_exact_are_those_at_the_quantized_operands(plain, shape):
    layer, x = converted(plain, "exact", 0.02, gradient="fitted"), torch.randn(shape)
    rounded = copy.deepcopy(plain)
    rounded.weight.data = layer.weight_codes() * layer.by_channel()
    at = (layer.input_codes(x) * layer.input_scale).requires_grad_()
    x.requires_grad_()
    upstream = torch.randn_like(rounded(at))
    rounded(at).backward(upstream)
    layer(x).backward(upstream)
    found = [x.grad, *(p.grad for p in layer.parameters())]
    expected = [at.grad, *(p.grad for p in rounded.parameters())]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_fitted_gradient_by_hand():
    # (w & 14) · x of 4 bits: a weight's slope is w & 14. Over -15..15 an input's is
    # x · sum of w (w & 14) / sum of w², which is 1176 / 1240.
    halved = pm.Multiplier.from_table(
        [[(w & 14) * x for x in range(16)] for w in range(16)],
        "halved",
        "unsigned",
        "weight, input",
    )
    linear = nn.Linear(3, 1)
    linear.weight.data = torch.tensor([[15.0, -3.0, 8.0]])
    layer = converted(linear, halved, 0.5, gradient="fitted")
    layer.weight_scale.fill_(1.0)
    x = torch.tensor([[2.0, -1.5, 0.0]], requires_grad=True)  # 4, -3 and 0
    layer(x).backward(torch.tensor([[10.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[140.0, -20.0, 80.0]]))
    slopes = torch.tensor([[4.0, -3.0, 0.0]]) * 1176 / 1240
    torch.testing.assert_close(layer.weight.grad, slopes * 0.5 * 10)
    assert layer.bias.grad.item() == 10


def test_a_padded_zero_has_the_slope_of_an_operand_0():
    def shifted(w, x):
        return w * (x + 1)

    made = pm.Multiplier.from_function(shifted, convention="signed", check=False)
    layer = converted(nn.Conv2d(1, 1, 3, padding=1), made, 0.5, gradient="fitted")
    layer(torch.zeros(1, 1, 4, 5)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((1, 1, 3, 3), 4 * 5 * 0.5))


@pytest.mark.parametrize("plain", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_comes_out_as_it_went_in(plain, dtype):
    x = torch.randn((6, 6) if isinstance(plain, nn.Linear) else (2, 6, 6, 6))
    layer = converted(plain, "or_pairs", 0.03)
    y = layer(x)
    assert layer(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), y, rtol=0.02, atol=0.1)
    own, given = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()  # the parameters too
    z = own(given)
    torch.testing.assert_close(z.float(), y, rtol=0.05, atol=0.2)
    for gradient in layers.GRADIENTS:
        own.gradient = gradient
        own(given).sum().backward()
    assert given.grad.dtype == own.weight.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)
        layer(x.bfloat16()).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), y) and torch.equal(layer.eval()(x), y)


def test_nothing_is_prepared_twice_in_eval_and_anew_when_weights_change(monkeypatch):
    prepare, made = layers.prepare_inexact, []
    monkeypatch.setattr(layers, "prepare_inexact", lambda *a: made.append(1) or prepare(*a))
    layer, x = converted(nn.Conv2d(2, 4, 3, groups=2)).eval(), torch.randn(2, 2, 5, 5)
    other = converted(nn.Conv2d(2, 4, 3, groups=2))

    def prepared(change) -> int:
        change()
        before = len(made)
        expected = copy.deepcopy(layer).train()(x)
        between = len(made)
        assert between == before + 2  # one for each group
        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
        return len(made) - between

    def step() -> None:
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()

    assert prepared(lambda: None) == 2
    assert prepared(lambda: None) == 0
    for change in (
        step,
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.load_state_dict({"weight_scale": 2 * layer.weight_scale}, strict=False),
        lambda: setattr(layer, "weight", nn.Parameter(-layer.weight)),
        lambda: (layer.weight.data.neg_(), layer.eval()),  # behind PyTorch's back, and told
    ):
        assert prepared(change) == 2
    assert prepared(layer.train) == 4  # twice two: never kept


def test_what_a_layer_refuses_names_it():
    conv = converted(nn.Conv2d(3, 4, 3), name="features.0")
    linear = converted(nn.Linear(3, 4), name="head")
    for layer, shape in ((conv, (1, 2, 8, 8)), (conv, (3, 8)), (linear, (3, 4)), (linear, ())):
        with pytest.raises(ValueError, match=rf"layer '{layer.name}' takes .* and got \(.*\)"):
            layer(torch.zeros(shape))
        with pytest.raises(ValueError, match=layer.name):
            layer.integers(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"layer 'features.0': 2 x 9, .* less than the kernel"):
        conv(torch.zeros(1, 3, 2, 9))
    with pytest.raises(TypeError, match=r"layer 'head' takes floats, and got torch\.int64"):
        linear(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer 'head' was given a NaN"):
        linear(torch.tensor([1.0, torch.nan, 2.0]))
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'head' has a weight that is NaN"):
        linear(torch.ones(3))
    plain = nn.Linear(3, 4)
    plain.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'head'.*not finite"):
        converted(plain, name="head")
    for words, message in (
        ({"multiplier": "or_pair"}, "or_pairs"),
        ({"weights": "int4"}, "int8"),
        ({"gradient": "fit"}, "fitted"),
        ({"input_scale": 0.0}, "positive"),
        ({"input_scale": torch.nan}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            converted(nn.Linear(3, 4), **words)
    with pytest.raises(TypeError, match="ConvTranspose2d is no Conv2d"):
        pm.InexactConv2d.from_float(nn.ConvTranspose2d(3, 4, 3), "exact", 1.0)


@no_cuda
@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.parametrize(("plain", "shape"), every_kind(), ids=str)
def test_cuda_gives_the_same_numbers_and_gradients(plain, shape, name):
    x, found = torch.randn(shape), []
    for device in ("cpu", "cuda"):
        layer = converted(plain, get(name), 0.02, gradient="fitted").to(device)
        given = x.to(device).requires_grad_()
        codes = layer.input_codes(given).flatten(0, -2) if x.ndim == 3 else layer.input_codes(given)
        y = layer.eval()(given)
        y.square().sum().backward()
        found.append([layer.integers(codes).long().cpu(), y.cpu(), given.grad.cpu()])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)
