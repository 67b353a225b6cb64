"""The two layers: their integers against the summed table, their floats, and their gradients."""

import copy
from itertools import product

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

# The products with 0 of TABLES are not 0, but for those of 4 bits here.
MULTIPLIERS = ["exact", "or_pairs", "rank 3", "full rank", "signed", "4 bits", "4 bits signed"]
pytestmark = pytest.mark.usefixtures("one_thread")
torch.manual_seed(0)
KINDS = [
    (nn.Linear(3, 4), (4, 3)),
    (nn.Linear(3, 4, bias=False), (2, 5, 3)),
    (nn.Conv2d(4, 8, (3, 2)), (2, 4, 7, 6)),
    (nn.Conv2d(4, 8, (3, 2), padding="same", bias=False), (2, 4, 7, 6)),
    (nn.Conv2d(4, 8, (3, 2), (2, 3), (1, 2), groups=2), (2, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=4), (4, 7, 6)),
    (nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"), (2, 4, 7, 6)),
]
even_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of nn's
every_kind = pytest.mark.parametrize(("plain", "shape"), KINDS, ids=str)


def made_of(plain: nn.Module, multiplier="or_pairs", input_scale=1.0, **words) -> nn.Module:
    kind = pm.InexactLinear if isinstance(plain, nn.Linear) else pm.InexactConv2d
    found = get(multiplier) if multiplier in TABLES else multiplier
    return kind.from_float(plain, found, input_scale, **words)


def whole_numbers(shape: tuple[int, ...], multiplier: str) -> Tensor:
    """Floats that are operands at a scale of 1; a third of them 0, as after a ReLU."""
    largest = get(multiplier).limits[1]
    return torch.randint(-largest, largest + 1, shape) * (torch.rand(shape) > 0.33).float()


def summed_patches(x: Tensor, w: Tensor, conv: nn.Conv2d, multiplier: str) -> Tensor:
    """The convolution of padded int8 x (B, C, H, W), place by place, from the table: int64."""
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    rows, columns = (range(0, x.shape[2 + i] - spans[i] + 1, conv.stride[i]) for i in (0, 1))
    n, c = len(w) // conv.groups, x.shape[1] // conv.groups
    y = torch.zeros(len(x), len(w), len(rows), len(columns), dtype=torch.int64)
    for g, i, j in product(range(conv.groups), range(len(rows)), range(len(columns))):
        row, column = rows[i], columns[j]
        window = x[:, g * c : (g + 1) * c, row : row + spans[0], column : column + spans[1]]
        patch = window[:, :, :: conv.dilation[0], :: conv.dilation[1]].flatten(1)
        of_group = slice(g * n, (g + 1) * n)
        y[:, of_group, i, j] = summed_table(patch, w[of_group].flatten(1), get(multiplier))
    return y


@st.composite
def convolutions(draw) -> nn.Conv2d:
    """Every option of nn.Conv2d."""
    padding = draw(st.sampled_from(["same", "valid", 0, 1, (2, 0), (0, 1)]))
    stride = 1 if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    groups, of_group, outputs = draw(st.tuples(*[st.integers(1, 3)] * 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    dilation = draw(st.sampled_from([1, 2, (1, 2)]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    sizes = (groups * of_group, groups * outputs, kernel, stride, padding, dilation, groups)
    return nn.Conv2d(*sizes, draw(st.booleans()), mode)


@even_same
@settings(max_examples=100, deadline=None)
@given(
    convolutions(),
    st.sampled_from([*MULTIPLIERS, "exact"]),
    st.tuples(st.integers(0, 3), st.integers(3, 8), st.integers(3, 9)),
)
def test_a_convolution_is_the_summed_table(conv, name, sizes):
    B, H, W = sizes
    left, right, top, bottom = around = conv._reversed_padding_repeated_twice
    assume(H + top + bottom > conv.dilation[0] * (conv.kernel_size[0] - 1))
    assume(W + left + right > conv.dilation[1] * (conv.kernel_size[1] - 1))
    assume(conv.padding_mode == "zeros" or max(around) < min(H, W))  # as PyTorch asks
    x, layer = whole_numbers((B, conv.in_channels, H, W), name), made_of(conv, name).eval()
    mode = "constant" if conv.padding_mode == "zeros" or B == 0 else conv.padding_mode
    operands, w = F.pad(x, around, mode).to(torch.int8), layer.weight_codes()
    sums = summed_patches(operands, w, conv, name)
    if name == "exact":
        plain = copy.deepcopy(conv).double()  # which is exact for such whole numbers
        plain.weight.data, plain.bias = w.double(), None
        assert B == 0 or torch.equal(plain(x.double()).long(), sums)
    y = (sums.float().movedim(1, -1) * layer.weight_scale).movedim(-1, 1)
    y = y if conv.bias is None else y + conv.bias.detach().view(-1, 1, 1)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), y)
    assert torch.equal(layer(x).view(-1), y.reshape(-1))  # contiguous, for who calls view
    assert B == 0 or torch.equal(layer(x[0]), y[0])  # an image without a batch
    if conv.padding_mode == "zeros":
        assert torch.equal(layer.integers(x.to(torch.int8)).long(), sums)


@pytest.mark.parametrize("name", list(dict.fromkeys([*MULTIPLIERS, *TABLES])))
def test_a_fully_connected_layer_is_the_summed_table(name):
    layer = made_of(nn.Linear(19, 7), name).eval()
    for shape in ((19,), (5, 19), (2, 3, 19), (0, 19)):
        x = whole_numbers(shape, name)
        operands, w = x.reshape(-1, 19).to(torch.int8), layer.weight_codes()
        sums = summed_table(operands, w, get(name))
        assert name != "exact" or torch.equal(sums, pm.integer_product(operands, w))
        assert torch.equal(layer.integers(operands).long(), sums)
        y = sums.float() * layer.weight_scale + layer.bias
        assert torch.equal(layer(x), y.view(*shape[:-1], 7))


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("name", ["exact", "4 bits", "4 bits signed"])
def test_weights_have_a_scale_of_little_error_and_keep_it(weights, name):
    torch.manual_seed(0)
    conv, largest = nn.Conv2d(3, 20, 3), get(name).limits[0]
    conv.weight.data[1], conv.weight.data[2] = 0, conv.weight.data[2] * 1e-44  # some become 0
    layer = made_of(conv, name, weights=weights)
    codes = pm.fibonacci_codes(7) if weights == "fibonacci" else torch.arange(128)
    codes, w, kept = codes[codes <= largest], layer.weight_codes(), layer.weight_scale.clone()
    assert torch.isin(w.abs(), codes).all() and not w[1].any()
    found = (w * layer.by_channel() - layer.weight).square().mean()
    best = [pm.quantize_magnitudes(row, codes).mean_squared_error for row in layer.weight]
    assert found <= 1.2 * sum(best) / len(best)  # by fewer candidates for a scale
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(layer.weight_scale, kept)


def test_inputs_are_rounded_and_clamped_by_the_scale():
    codes = made_of(nn.Linear(4, 3), "4 bits signed", 0.5).input_codes
    assert codes(torch.tensor([0.74, -0.76, 1e9, -torch.inf])).tolist() == [1, -2, 7, -7]


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input, weight and bias, for an upstream gradient that is always the same."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.arange(y.numel()).sin().view(y.shape))
    return [x.grad, *(p.grad for p in layer.parameters())]


@even_same
@every_kind
def test_gradients_are_the_float_layers_at_the_operands_or_at_the_quantized_ones(plain, shape):
    x, plain, layer = torch.randn(shape), copy.deepcopy(plain), made_of(plain, "truncated", 0.02)
    fitted = made_of(plain, "exact", 0.02, gradient="fitted")
    torch.testing.assert_close(gradients(layer, x), gradients(plain, x), rtol=1e-4, atol=1e-4)
    plain.zero_grad()
    plain.weight.data = fitted.weight_codes() * fitted.by_channel()
    of_quantized = gradients(plain, fitted.input_codes(x) * fitted.input_scale)
    torch.testing.assert_close(gradients(fitted, x), of_quantized, rtol=1e-4, atol=1e-4)


def test_a_fitted_gradient_by_hand():
    # (w & 14) · x of 4 bits: a weight's slope is w & 14. Over -15..15 an input's is
    # x · sum of w (w & 14) / sum of w², which is 1176 / 1240.
    table = [[(w & 14) * x for x in range(16)] for w in range(16)]
    halved = pm.Multiplier.from_table(table, "halved", "unsigned", "weight, input")
    linear = nn.Linear(3, 1)
    linear.weight.data = torch.tensor([[15.0, -3.0, 8.0]])
    layer = made_of(linear, halved, 0.5, gradient="fitted")
    layer.weight_scale.fill_(1.0)
    x = torch.tensor([[2.0, -1.5, 0.0]], requires_grad=True)  # 4, -3 and 0
    layer(x).backward(torch.tensor([[10.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[140.0, -20.0, 80.0]]))
    slopes = torch.tensor([[4.0, -3.0, 0.0]]) * 1176 / 1240
    torch.testing.assert_close(layer.weight.grad, slopes * 0.5 * 10)
    assert layer.bias.grad.item() == 10
    # w · (x + 1): a padded zero has the slope of an operand 0, which is 1.
    made = pm.Multiplier.from_function(lambda w, x: w * (x + 1), "+1", "signed", check=False)
    layer = made_of(nn.Conv2d(1, 1, 3, padding=1), made, 0.5, gradient="fitted")
    layer(torch.zeros(1, 1, 4, 5)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((1, 1, 3, 3), 4 * 5 * 0.5))


@pytest.mark.parametrize(("plain", "shape"), [KINDS[1], KINDS[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_comes_out_as_it_went_in(plain, shape, dtype, monkeypatch):
    x, layer = torch.randn(shape) / 300, made_of(plain, "or_pairs", 1e-4)  # a small scale
    with torch.inference_mode():
        y = layer.eval()(x)
    monkeypatch.setitem(layers.BLOCK_BYTES, "cpu", 1)  # one image at a time
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)
    own = copy.deepcopy(layer).to(dtype)  # and the parameters with it
    for one in (layer, own):
        for one.gradient in layers.GRADIENTS:
            with torch.autocast("cpu", torch.bfloat16, enabled=one is layer):
                found = [one(x.to(dtype)), *gradients(one, x.to(dtype))]
            assert (found[0] - y).norm() < 0.1 * y.norm()
            assert found[0].dtype == found[1].dtype == dtype
            assert found[2].dtype == one.weight.dtype


def test_nothing_is_prepared_twice_in_eval_and_anew_when_weights_change(monkeypatch):
    prepare, made = layers.prepare_inexact, []
    monkeypatch.setattr(layers, "prepare_inexact", lambda *a: made.append(1) or prepare(*a))
    layer, other = (made_of(nn.Conv2d(2, 4, 3, groups=2)).eval() for _ in range(2))
    x, optimizer = torch.randn(2, 2, 5, 5), torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).sum().backward()
    for change, times in (
        (lambda: None, 0),
        (optimizer.step, 1),
        (lambda: layer.load_state_dict(other.state_dict()), 1),
        (lambda: layer.load_state_dict({"weight_scale": other.weight_scale * 2}, strict=False), 1),
        (lambda: setattr(layer.weight, "data", -layer.weight.data), 1),
        (lambda: (layer.weight.data.neg_(), layer.eval()), 1),  # behind PyTorch's back
        (layer.train, 2),  # in training nothing is kept
    ):
        change()
        expected = copy.deepcopy(layer).train()(x)
        made.clear()
        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
        assert len(made) == 2 * times  # there are two groups


def test_what_a_layer_refuses_names_it():
    linear, conv = made_of(nn.Linear(3, 4), name="head"), made_of(nn.Conv2d(3, 4, 3), name="conv")
    for layer, shape in ((conv, (1, 2, 8, 8)), (conv, (3, 8)), (linear, (3, 4)), (linear, ())):
        for call, dtype in ((layer, torch.float32), (layer.integers, torch.int8)):
            with pytest.raises(ValueError, match=rf"layer '{layer.name}' takes .* and got \("):
                call(torch.zeros(shape, dtype=dtype))
    with pytest.raises(ValueError, match=r"layer 'conv': 2 x 9, .* less than the kernel"):
        conv(torch.zeros(1, 3, 2, 9))
    with pytest.raises(TypeError, match=r"layer 'head' takes floats, and got torch\.int64"):
        linear(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer 'head' was given a NaN"):
        linear(torch.tensor([1.0, torch.nan, 2.0]))
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'head' has a weight that is NaN"):
        linear(torch.ones(3))
    for scale in (0.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="positive"):
            made_of(nn.Linear(3, 4), input_scale=scale)
    with pytest.raises(TypeError, match="ConvTranspose2d is no Conv2d"):
        made_of(nn.ConvTranspose2d(3, 4, 3))


@no_cuda
@pytest.mark.parametrize("name", MULTIPLIERS)
@every_kind
def test_cuda_gives_the_same_numbers_and_gradients(plain, shape, name):
    x, cpu = torch.randn(shape), made_of(plain, name, 0.02, gradient="fitted").eval()
    cuda = copy.deepcopy(cpu).cuda()
    if len(shape) != 3:  # which `integers` does not take
        codes = cpu.input_codes(x)
        assert torch.equal(cpu.integers(codes).long(), cuda.integers(codes.cuda()).long().cpu())
    torch.testing.assert_close(cuda(x.cuda()).cpu(), cpu(x), rtol=1e-3, atol=1e-2)
    found = [gradient.cpu() for gradient in gradients(cuda, x.cuda())]
    torch.testing.assert_close(found, gradients(cpu, x), rtol=1e-3, atol=1e-2)


@even_same
@every_kind
@pytest.mark.parametrize("name", MULTIPLIERS)
def test_layers_keep_to_what_a_strict_int8_gemm_takes(
    plain, shape, name, use_engine, strict_int8_gemm
):
    x, by_table = whole_numbers(shape, name), made_of(plain, name).eval()
    by_table.path = "lookup"
    expected = by_table(x)
    use_engine("padded")
    layer = made_of(plain, name).eval()
    layer.path = "gemm"
    assert torch.equal(layer(x), expected) and strict_int8_gemm
