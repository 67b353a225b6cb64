"""Fibonacci codes against their definition and against brute force, and quantization to them."""

import pytest
import torch

import posmat as pm


def test_codes_are_those_without_11_in_their_binary_form():
    every = torch.arange(2**16, dtype=torch.int32)
    expected = torch.tensor(["11" not in f"{value:b}" for value in range(2**16)])
    assert torch.equal(pm.is_fibonacci(every), expected)
    assert torch.equal(pm.fibonacci_codes(16), every[expected].long())
    for bits in range(1, 16):
        assert torch.equal(pm.fibonacci_codes(bits), every[: 2**bits][expected[: 2**bits]].long())
    assert len(pm.fibonacci_codes()) == 34
    pm.fibonacci_codes().zero_()  # a caller's own, and the next one's are as they were
    assert len(pm.fibonacci_codes().unique()) == 34


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 12, 16])
def test_nearest_is_that_of_brute_force_for_every_value(bits):
    codes = [value for value in range(2**bits) if "11" not in f"{value:b}"]
    # Codes ascend, so both neighbours of a value are met on the way up; a tie takes the upper one.
    expected, i = [], 0
    for value in range(2**bits):
        while i + 1 < len(codes) and abs(codes[i + 1] - value) <= abs(codes[i] - value):
            i += 1
        expected.append(codes[i])
    found = pm.nearest_fibonacci(torch.arange(2**bits, dtype=torch.int32).reshape(2, -1), bits)
    assert found.dtype == torch.int32 and found.shape == (2, 2**bits // 2)
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16])
def test_a_code_that_the_dtype_does_not_hold_is_refused(dtype):
    """In the tightest dtype, against every code of every width: the right one, or none."""
    limit = torch.iinfo(dtype).max
    for bits in {7, 8, 9, 15, 16}:
        codes = pm.fibonacci_codes(bits)
        values = torch.arange(min(limit, 2**bits - 1) + 1)
        fits = pm.nearest_fibonacci(values, bits) <= limit
        found = pm.nearest_fibonacci(values[fits].to(dtype), bits)
        assert found.dtype == dtype and bool(torch.isin(found.long(), codes).all())
        assert torch.equal(found.long(), pm.nearest_fibonacci(values[fits], bits))
        for value in values[~fits][:3].tolist():
            with pytest.raises(ValueError, match=rf"x holds {value} as {dtype}.*wider dtype"):
                pm.nearest_fibonacci(torch.tensor([0, value]).to(dtype), bits)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pm.is_fibonacci(torch.tensor([1.0])), TypeError, "float32"),
        (lambda: pm.is_fibonacci(torch.tensor([True])), TypeError, "bool"),
        (lambda: pm.is_fibonacci(torch.tensor([-3])), ValueError, "-3"),
        (lambda: pm.nearest_fibonacci(torch.tensor([128])), ValueError, "7 bits end at 127"),
        (lambda: pm.nearest_fibonacci(torch.tensor([1]), 17), ValueError, "bits=17"),
        (lambda: pm.fibonacci_codes(0), ValueError, "bits=0"),
        (lambda: pm.fibonacci_codes(True), ValueError, "bits=True"),
        (lambda: pm.quantize_fibonacci(torch.tensor([1])), TypeError, "int64"),
        (lambda: pm.quantize_fibonacci(torch.tensor([1.0, float("nan")])), ValueError, "finite"),
        (lambda: pm.quantize_fibonacci(torch.empty(0)), ValueError, "empty"),
        (lambda: pm.quantize_fibonacci(torch.ones(2), 8), ValueError, "7 bits"),
        (lambda: pm.quantize_magnitudes(torch.ones(2), torch.tensor([1, 2])), ValueError, "ascend"),
        (lambda: pm.quantize_magnitudes(torch.ones(2), [0, 1]), TypeError, "codes are list"),
        (lambda: pm.quantize_fibonacci(torch.ones(2).double() * 1e200), ValueError, r"is 1e\+200"),
        (lambda: pm.quantize_fibonacci(torch.ones(2).double() * 5e-324), ValueError, "multiply t"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


generator = torch.Generator().manual_seed(5)
normal = torch.randn(1000, generator=generator).double()
uniform = torch.rand(1000, generator=generator).double()
WEIGHTS = {
    "normal": normal,
    "uniform": uniform - 0.5,
    "Laplace": uniform.log() * normal.sign(),
    "one outlier": torch.cat([torch.tensor([30.0]), normal]),
    "many outliers": torch.where(uniform < 0.01, 100.0, 1.0) * normal,
    "Cauchy": normal / normal.roll(1),
    "log-normal": (3 * normal).exp() * normal.sign(),
    "sparse": normal * (uniform < 0.2),
    "one size": torch.ones(10).double(),
    "two sizes": torch.where(uniform < 0.6, 1.0, 3.0).double(),
}
CODES = {
    "Fibonacci": pm.fibonacci_codes(),
    "plain": torch.arange(128),
    "binary": torch.arange(2),
    "with a gap": torch.tensor([0, 1, 2, 127]),
}


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_no_scale_is_better_however_heavy_the_tails(weight, codes):
    found = pm.quantize_magnitudes(weight, codes)
    assert found.weight.dtype == torch.int8 and found.weight.shape == weight.shape
    magnitude = weight.abs()
    midpoints = (codes[1:] + codes[:-1]).double() / 2
    scales = magnitude.max() * torch.logspace(-14, 1, 600, base=2, dtype=torch.float64)[:, None]
    nearest = codes.double()[torch.bucketize(magnitude / scales, midpoints)]
    best = float((nearest * scales - magnitude).square().mean(1).min())
    assert found.mean_squared_error <= best * 1.001 + 1e-20
    # And what is said of the error is so.
    squared = (found.scale * found.weight.double() - weight).square().mean()
    assert found.mean_squared_error == pytest.approx(float(squared), rel=1e-9, abs=1e-20)
    relative = float((squared / weight.square().mean()).sqrt())
    assert found.relative_error == pytest.approx(relative, rel=1e-9, abs=1e-9)
    assert bool(torch.isin(found.weight.abs().long(), codes).all())


def test_quantization_of_zeros_of_tiny_and_of_half_precision_weights():
    zero = pm.quantize_fibonacci(torch.zeros(3, 2))
    assert not zero.weight.any() and zero.relative_error == 0
    torch.manual_seed(1)
    weight = torch.randn(64, 16)
    base = pm.quantize_fibonacci(weight)
    tiny = pm.quantize_fibonacci(weight.double() * 1e-200)
    assert torch.equal(tiny.weight, base.weight)
    assert pm.quantize_fibonacci(weight.half()).weight.dtype == torch.int8
