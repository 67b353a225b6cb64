"""The digits' network: the same seed gives the same one, and integers that agree agree to the end.

Also the charts of notebook 09 that two kinds of tables share.
"""

import pytest
import torch

from posmat.charts.catalogue import draw_figure
from posmat.multipliers.fibonacci import is_fibonacci, quantize_fibonacci
from posmat.multipliers.shipped import find_multiplier, multiplier_names
from posmat.network import digits
from posmat.network.digits import accuracy, load_digit_images, quantize_network, train_network
from posmat.tests.sample import MACHINES, make_rows


@pytest.fixture(scope="module")
def images():
    return load_digit_images(seed=0)


@pytest.fixture(scope="module")
def network(images):
    return train_network(images, hidden_features=16, epochs=60, seed=0)


def test_the_split_is_whole_and_by_seed(images):
    assert len(images.train) + len(images.test) == 1797
    assert images.train.min() == 0 and images.train.max() == 1
    assert set(images.test_labels.tolist()) == set(range(10))
    assert torch.equal(images.test, load_digit_images(seed=0).test)
    assert not torch.equal(images.test_labels, load_digit_images(seed=1).test_labels)
    seen = {tuple(row) for row in images.train.tolist()}
    assert not any(tuple(row) in seen for row in images.test.tolist())  # no image is in both parts


def test_training_learns_and_is_by_seed(images, network):
    assert accuracy(network(images.test), images.test_labels) > 0.9
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = train_network(images, hidden_features=16, epochs=60, seed=0)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is left alone
    assert torch.equal(again[0].weight, network[0].weight)
    untrained = train_network(images, hidden_features=16, epochs=0, seed=0)
    assert accuracy(untrained(images.test), images.test_labels) < 0.4


@pytest.mark.parametrize("name", multiplier_names())
def test_the_quantized_network_is_its_definition(name, images, network):
    quantized, table = quantize_network(network, images.train), find_multiplier(name).table
    output = quantized.run(images.test, name)
    values = images.test.double()
    for layer, sums in zip(quantized.layers, output.sums, strict=True):
        codes = (values / layer.input_scale).round().clamp(0, 127).long()
        products = torch.tensor(table)[layer.weight.abs().long(), codes[:5, None]]
        assert torch.equal(sums[:5].long(), (products * layer.weight.sign()).sum(-1))
        logits = layer.scale * sums.double() + layer.bias
        values = logits.relu()
    assert torch.equal(output.logits, logits)
    if name == "exact":  # it is near the float network, whose weights and inputs it rounded
        expected = network(images.test)
        assert (output.logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_calibration_is_on_the_images_that_were_given(images, network):
    bright, dim = (quantize_network(network, images.train * share) for share in (1, 0.5))
    assert dim.layers[0].input_scale == pytest.approx(bright.layers[0].input_scale / 2)
    # Beyond what was seen, inputs are clamped rather than wrapped.
    top = torch.full((1, 64), 9.0)
    assert torch.equal(dim.run(top).logits, dim.run(2 * top).logits)


def test_or_pairs_is_exact_on_fibonacci_weights_and_not_on_plain_ones(images, network):
    fibonacci = quantize_network(network, images.train, quantize_fibonacci)
    assert all(is_fibonacci(layer.weight.abs()).all() for layer in fibonacci.layers)
    plain = quantize_network(network, images.train)
    for quantized, same in ((fibonacci, True), (plain, False)):
        exact, merged = (quantized.run(images.test, name) for name in ("exact", "or_pairs"))
        assert all(map(torch.equal, exact.sums, merged.sums)) == same
        assert torch.equal(exact.logits, merged.logits) == same


def test_few_splits_have_no_interval_and_many_a_wide_one():
    for count in range(1, 5):
        assert digits.mean_difference([0.5] * count) == (0.5, None, None)
    with pytest.raises(ValueError, match="no differences"):
        digits.mean_difference([])
    found = digits.mean_difference([1, 2, 3, 4, 5])
    # Variance 2.5, times 1/5 + 1/3 for splits that share their images; 2.776 is t's quantile.
    assert found.mean == 3
    assert found.high - 3 == 3 - found.low == pytest.approx(2.776445 * (2.5 * 8 / 15) ** 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_integers(images, network):
    quantized = quantize_network(network, images.train)
    here = quantized.run(images.test, "or_pairs")
    there = quantized.to("cuda").run(images.test.cuda(), "or_pairs")
    assert torch.equal(there.sums[0].cpu(), here.sums[0])


def test_random_tables_stand_in_one_chart_and_not_in_the_other():
    facts = {
        "torch._int_mm": (1e-3, None, None),
        "or_pairs": (3e-3, "gemm", 2),
        "random table, rank 4": (8e-3, "gemm", 5),
        "look-up": (0.2, "lookup", None),
    }
    rows = make_rows({name: seconds for name, (seconds, *_) in facts.items()}, *MACHINES[0])
    for i, column in enumerate(("path", "gemms"), start=1):
        rows[column] = [facts.get(name, (None,) * 3)[i] for name in rows["method"]]
    rows = rows.assign(multiplier=rows["method"]).convert_dtypes()
    times = [text.get_text() for text in draw_figure("inexact-multipliers", rows).axes[0].texts]
    assert "or_pairs" in times and not any("random" in text for text in times)
    axes = draw_figure("cost-against-rank", rows).axes[0]
    found = {tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"}
    assert found == {(1.0,), (2.0,), (5.0,)}  # the first is the control's
