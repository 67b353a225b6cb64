import pytest
import torch

from posmat.layer.signmag import SignMagnitude, as_sign_magnitude, to_sign_magnitude

EVERY = torch.arange(-128, 128).to(torch.int8)


def test_all_256_values_and_all_65_536_products(device):
    sign, magnitude = to_sign_magnitude(EVERY.to(device))
    values = range(-128, 128)
    assert sign.dtype == torch.int8 and magnitude.dtype == torch.uint8
    assert magnitude.tolist() == [abs(value) for value in values]
    assert sign.tolist() == [(value > 0) - (value < 0) for value in values]
    products = (magnitude.int()[:, None] * magnitude.int()) * (sign[:, None] * sign)
    assert products.tolist() == [[a * b for b in values] for a in values]


def test_weights_are_split_once_and_parts_that_are_not_of_one_tensor_are_refused():
    parts = to_sign_magnitude(EVERY)
    assert as_sign_magnitude(parts) is parts
    assert torch.equal(as_sign_magnitude(EVERY).magnitude, parts.magnitude)
    with pytest.raises(TypeError, match="int16"):
        to_sign_magnitude(EVERY.short())
    with pytest.raises(TypeError, match=r"magnitude is torch\.int8"):
        as_sign_magnitude(SignMagnitude(torch.sign(EVERY), EVERY.abs()))
    with pytest.raises(ValueError, match=r"\(256,\).*\(255,\)"):
        as_sign_magnitude(SignMagnitude(parts.sign, parts.magnitude[:-1]))
