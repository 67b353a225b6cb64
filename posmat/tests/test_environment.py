import pytest
import torch

from posmat.environment import describe_device, describe_environment, require_device
from posmat.host import describe_host, host_identity


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:", "mps"])
def test_a_device_that_is_not_known_is_refused(name):
    if name == "cpu:":
        assert require_device("cpu").type == "cpu"
        return
    with pytest.raises(ValueError, match="'cpu', 'cuda' or"):
        require_device(name)


def test_a_device_that_is_not_there_is_refused_and_never_replaced():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(ValueError, match=rf"cuda:{count}.*device='cpu'"):
        require_device(f"cuda:{count}")


def test_the_device_is_described(device):
    facts = describe_environment(device)
    assert facts["device"] == device and facts["processor"] and facts["torch"] == torch.__version__
    assert describe_device(device)["torch"] == torch.__version__


def test_the_host_is_described_and_known_again():
    facts = describe_host()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**30 and facts["processor"]
    assert host_identity() == host_identity() == facts["host_identity"]
    assert len(host_identity()) == 16
