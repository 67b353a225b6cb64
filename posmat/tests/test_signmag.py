import pytest
import torch

from posmat.layer.signmag import (
    SignMagnitude,
    as_sign_magnitude,
    from_sign_magnitude,
    to_sign_magnitude,
)

EVERY = torch.arange(-128, 128).to(torch.int8)


def test_all_256_values(device):
    sign, magnitude = to_sign_magnitude(EVERY.to(device))
    assert sign.dtype == torch.int8 and magnitude.dtype == torch.uint8
    assert magnitude.tolist() == [abs(value) for value in range(-128, 128)]
    assert sign.tolist() == [(value > 0) - (value < 0) for value in range(-128, 128)]
    assert torch.equal(from_sign_magnitude(sign, magnitude).cpu(), EVERY)


def test_all_65_536_products(device):
    sign, magnitude = to_sign_magnitude(EVERY.to(device))
    products = (magnitude.int()[:, None] * magnitude.int()) * (sign[:, None] * sign)
    values = range(-128, 128)
    assert products.tolist() == [[a * b for b in values] for a in values]


def test_what_is_no_int8_is_refused():
    with pytest.raises(TypeError, match="int16"):
        to_sign_magnitude(EVERY.short())
    with pytest.raises(TypeError, match="int16"):
        from_sign_magnitude(EVERY.sign(), EVERY.abs().short())


def test_weights_are_split_once_and_parts_that_are_not_of_one_tensor_are_refused():
    parts = to_sign_magnitude(EVERY)
    assert as_sign_magnitude(parts) is parts
    assert torch.equal(as_sign_magnitude(EVERY).magnitude, parts.magnitude)
    with pytest.raises(TypeError, match=r"magnitude is torch\.int8"):
        as_sign_magnitude(SignMagnitude(torch.sign(EVERY), EVERY.abs()))
    with pytest.raises(ValueError, match=r"\(256,\).*\(255,\)"):
        as_sign_magnitude(SignMagnitude(parts.sign, parts.magnitude[:-1]))


def test_plus_128_has_no_place_in_int8():
    with pytest.raises(ValueError, match="128"):
        from_sign_magnitude(
            torch.tensor([1], dtype=torch.int8), torch.tensor([128], dtype=torch.uint8)
        )
