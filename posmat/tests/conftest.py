"""What several tests share."""

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Each device that a method must be right on; CUDA is skipped where there is none."""
    return request.param
