"""Fibonacci codes against their definition and against brute force, and quantization to them."""

import pytest
import torch

from posmat.multipliers.fibonacci import (
    fibonacci_codes,
    is_fibonacci,
    nearest_fibonacci,
    quantize_fibonacci,
    quantize_magnitudes,
)


def test_codes_are_those_without_11_in_their_binary_form():
    every = torch.arange(2**16, dtype=torch.int32)
    expected = torch.tensor(["11" not in f"{value:b}" for value in range(2**16)])
    assert torch.equal(is_fibonacci(every), expected)
    assert torch.equal(fibonacci_codes(16), every[expected].long())


def test_there_are_as_many_codes_as_a_fibonacci_number():
    counts = [len(fibonacci_codes(bits)) for bits in range(1, 17)]
    assert counts[:2] == [2, 3] and counts[6] == 34 and counts[7] == 55
    assert all(c == a + b for a, b, c in zip(counts, counts[1:], counts[2:], strict=False))


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 12, 16])
def test_nearest_is_that_of_brute_force_for_every_value(bits):
    codes = [value for value in range(2**bits) if "11" not in f"{value:b}"]
    # Codes ascend, so both neighbours of a value are met on the way up; a tie takes the upper one.
    expected, i = [], 0
    for value in range(2**bits):
        while i + 1 < len(codes) and abs(codes[i + 1] - value) <= abs(codes[i] - value):
            i += 1
        expected.append(codes[i])
    values = torch.arange(2**bits, dtype=torch.int32)
    found = nearest_fibonacci(values, bits)
    assert found.dtype == torch.int32
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16])
def test_a_code_that_the_dtype_does_not_hold_is_refused(dtype):
    """In the tightest dtype, against every code of every width: the right one, or none."""
    limit = torch.iinfo(dtype).max
    for bits in {7, 8, 9, 15, 16}:
        codes = fibonacci_codes(bits)
        values = torch.arange(min(limit, 2**bits - 1) + 1)
        fits = nearest_fibonacci(values, bits) <= limit
        found = nearest_fibonacci(values[fits].to(dtype), bits)
        assert found.dtype == dtype and bool(torch.isin(found.long(), codes).all())
        assert torch.equal(found.long(), nearest_fibonacci(values[fits], bits))
        for value in values[~fits][:3].tolist():
            with pytest.raises(ValueError, match=rf"x holds {value} as {dtype}.*wider dtype"):
                nearest_fibonacci(torch.tensor([0, value]).to(dtype), bits)


def test_a_tie_goes_up_and_the_width_decides_at_the_top():
    # 3 lies between 2 and 4, 6 nearer to 5; 127 is next to 128, which 7 bits do not hold.
    assert nearest_fibonacci(torch.tensor([3, 6, 86, 127])).tolist() == [4, 5, 85, 85]
    assert nearest_fibonacci(torch.tensor([127]), 8).tolist() == [128]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16])
def test_nearest_keeps_shape_and_dtype(dtype):
    values = torch.arange(128).reshape(4, 8, 4)
    found = nearest_fibonacci(values.to(dtype))
    assert found.dtype == dtype and found.shape == values.shape
    assert torch.equal(found.long(), nearest_fibonacci(values))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nearest_fibonacci(torch.tensor([1, 107], dtype=torch.int8), 8), ValueError, "107"),
        (lambda: is_fibonacci(torch.tensor([1.0])), TypeError, "float32"),
        (lambda: is_fibonacci(torch.tensor([-3])), ValueError, "-3"),
        (lambda: nearest_fibonacci(torch.tensor([128])), ValueError, "7 bits end at 127"),
        (lambda: nearest_fibonacci(torch.tensor([1]), 17), ValueError, "bits=17"),
        (lambda: fibonacci_codes(0), ValueError, "bits=0"),
        (lambda: quantize_fibonacci(torch.tensor([1])), TypeError, "int64"),
        (lambda: quantize_fibonacci(torch.tensor([1.0, float("nan")])), ValueError, "finite"),
        (lambda: quantize_fibonacci(torch.empty(0)), ValueError, "empty"),
        (lambda: quantize_fibonacci(torch.ones(2), 8), ValueError, "7 bits"),
        (lambda: quantize_magnitudes(torch.ones(2), torch.tensor([1, 2])), ValueError, "ascend"),
        (lambda: quantize_magnitudes(torch.ones(2), [0, 1]), TypeError, "codes are list"),
        (
            lambda: quantize_magnitudes(torch.ones(2), torch.tensor([0, 1.5])),
            TypeError,
            "codes are torch.float32",
        ),
        (
            lambda: quantize_fibonacci(torch.tensor([1e200, 1], dtype=torch.float64)),
            ValueError,
            r"largest magnitude is 1e\+200",
        ),
        (
            lambda: quantize_fibonacci(torch.tensor([5e-324, 1e-323], dtype=torch.float64)),
            ValueError,
            "multiply the weight",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("shape", ["normal", "uniform", "laplace"])
def test_quantization_is_as_good_as_a_dense_search(shape):
    torch.manual_seed(3)
    weight = {
        "normal": torch.randn(40, 50),
        "uniform": torch.rand(40, 50) - 0.5,
        "laplace": torch.rand(40, 50).log() * torch.randn(40, 50).sign(),
    }[shape]
    found = quantize_fibonacci(weight)
    assert found.weight.dtype == torch.int8 and found.weight.shape == weight.shape
    magnitude = found.weight.abs()
    assert bool(is_fibonacci(magnitude).all())
    assert bool((found.weight * weight >= 0).all())
    real = found.scale * found.weight.double()
    squared = float((real - weight.double()).square().mean())
    assert found.mean_squared_error == pytest.approx(squared, rel=1e-9)
    energy = float(weight.double().square().mean())
    assert found.relative_error == pytest.approx((squared / energy) ** 0.5, rel=1e-9)

    codes = fibonacci_codes().double()
    best = float("inf")
    for divisor in torch.linspace(40, 700, 3000).tolist():
        scale = float(weight.abs().max()) / divisor
        scaled = weight.double().abs() / scale
        nearest = codes[torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)]
        best = min(best, float((nearest * scale - weight.double().abs()).square().mean()))
    assert squared <= best * 1.0005


def weights_of(shape: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(1000, generator=generator).double()
    uniform = torch.rand(1000, generator=generator).double()
    return {
        "one outlier": torch.cat([torch.tensor([30.0]), normal]),
        "many outliers": torch.where(uniform < 0.01, 100.0, 1.0) * normal,
        "Cauchy": normal / normal.roll(1),
        "log-normal": (3 * normal).exp() * normal.sign(),
        "sparse": normal * (uniform < 0.2),
        "one size": torch.ones(10, dtype=torch.float64),
        "two sizes": torch.where(uniform < 0.6, 1.0, 3.0),
    }[shape]


@pytest.mark.parametrize("codes", ["Fibonacci", "plain", "binary", "with a gap"])
@pytest.mark.parametrize(
    "shape",
    ["one outlier", "many outliers", "Cauchy", "log-normal", "sparse", "one size", "two sizes"],
)
def test_no_scale_is_better_however_heavy_the_tails(shape, codes):
    weight = weights_of(shape)
    codes = {
        "Fibonacci": fibonacci_codes(),
        "plain": torch.arange(128),
        "binary": torch.arange(2),
        "with a gap": torch.tensor([0, 1, 2, 127]),
    }[codes]
    found = quantize_magnitudes(weight, codes)
    magnitude = weight.abs()
    midpoints = (codes[1:] + codes[:-1]).double() / 2
    scales = magnitude.max() * torch.logspace(-14, 1, 600, base=2, dtype=torch.float64)[:, None]
    nearest = codes.double()[torch.bucketize(magnitude / scales, midpoints)]
    best = float((nearest * scales - magnitude).square().mean(1).min())
    assert found.mean_squared_error <= best * 1.001 + 1e-20


def test_a_large_weight_with_one_outlier():
    torch.manual_seed(0)
    weight = torch.randn(2**20)
    weight[0] = 100.0
    found = quantize_fibonacci(weight)
    codes = fibonacci_codes()
    for scale in (0.03, 0.04, 0.06, 0.0831, 0.1237):
        units = weight.abs() / scale
        nearest = codes[torch.bucketize(units, (codes[1:] + codes[:-1]) / 2)]
        error = float((nearest * scale - weight.abs()).double().square().mean())
        assert found.mean_squared_error <= error
    assert found.mean_squared_error < 0.02


def test_the_searched_scale_beats_that_of_plain_int8():
    torch.manual_seed(0)
    weight = torch.rand(100, 100) * 2 - 1
    naive_scale = float(weight.abs().max()) / 127
    rounded = nearest_fibonacci((weight.abs() / naive_scale).round().to(torch.uint8))
    naive = float((rounded * naive_scale - weight.abs()).square().mean())
    found = quantize_fibonacci(weight)
    assert found.mean_squared_error < naive / 2
    assert quantize_magnitudes(weight).mean_squared_error < found.mean_squared_error


def test_quantization_of_zeros_of_tiny_and_of_half_precision_weights():
    zero = quantize_fibonacci(torch.zeros(3, 2))
    assert not zero.weight.any() and zero.relative_error == 0
    torch.manual_seed(1)
    weight = torch.randn(64, 16)
    base = quantize_fibonacci(weight)
    tiny = quantize_fibonacci(weight.double() * 1e-200)
    assert torch.equal(tiny.weight, base.weight)
    assert quantize_fibonacci(weight.half()).weight.dtype == torch.int8
