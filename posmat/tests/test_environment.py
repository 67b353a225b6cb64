import pytest
import torch

import posmat as pm
from posmat import machine
from posmat.machine import NOT_GIVEN, host_identity, make_current, read_gpu, slow_clock_warnings
from posmat.report.store import in_detail


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:x", "", "cpu:", "cpu:5", "cuda:", "cuda:²", "cuda:01", "mps"]
)
def test_a_device_that_is_not_known_is_refused(name):
    with pytest.raises(ValueError, match="'cpu', 'cuda' or"):
        pm.require_device(name)


def test_a_device_that_is_not_there_is_refused_and_never_replaced():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(ValueError, match=rf"cuda:{count}.*device='cpu'"):
        pm.require_device(f"cuda:{count}")


def test_everything_that_takes_a_device_refuses_in_the_same_words():
    one, size = {"a": lambda: torch.ones(1)}, pm.ProblemSize(1, 1, 1)
    for ask in (
        lambda device: pm.random_operands(size, device=device),
        lambda device: pm.time_methods(one, reference=None, baseline="a", device=device),
        lambda device: pm.time_as_seed(one, 1, reference=None, device=device),
        lambda device: pm.peak_memory({"a": pm.linear_product}, size, device=device),
    ):
        with pytest.raises(ValueError, match="device='gpu' is not known"):
            ask("gpu")
        with pytest.raises(ValueError, match="device='cuda:99' was asked for"):
            ask("cuda:99")


def test_a_device_with_an_index_becomes_the_current_one(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for name in ("cpu", "cuda", "cuda:1"):
        make_current(torch.device(name))
    assert made == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_the_second_device_is_the_one_that_is_measured():
    before = torch.cuda.current_device()
    try:
        make_current(torch.device("cuda:1"))
        one = {"a": lambda: torch.ones(1, device="cuda")}
        rows = pm.time_methods(one, reference=None, rounds=1)
        assert (rows["state"] == "timed").all()
        assert torch.ones(1, device="cuda").device == torch.device("cuda:1")
    finally:
        torch.cuda.set_device(before)


def fake_nvidia_smi(folder, monkeypatch, answer):
    """An nvidia-smi that writes down how it was called, and answers; the file that it writes."""
    script, calls = folder / "nvidia-smi", folder / "calls"
    script.write_text(f"#!/bin/sh\necho \"$@\" >> '{calls}'\n{answer}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls


def test_the_clocks_of_a_gpu_are_read_by_its_uuid(tmp_path, monkeypatch):
    answer = "echo '1410, 1980, 312.45, 61, 570.86.15'"
    calls = fake_nvidia_smi(tmp_path, monkeypatch, answer)
    facts = {"sm_clock_mhz": 1410, "sm_clock_max_mhz": 1980, "power_w": 312.45}
    facts |= {"temperature_c": 61, "driver": "570.86.15"}
    assert read_gpu("0a1b-2c") == read_gpu("GPU-0a1b-2c") == facts
    for call in calls.read_text().splitlines():
        assert "--id=GPU-0a1b-2c " in call and "clocks.sm,clocks.max.sm,power.draw," in call


def test_what_nvidia_smi_does_not_tell_is_said(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo '1410, 1980, [N/A], 61, 570.86.15'")
    assert read_gpu("0a1b")["power_w"] == NOT_GIVEN and read_gpu("0a1b")["temperature_c"] == 61
    for answer in ("echo 'No devices were found'; exit 6", "echo nonsense"):
        fake_nvidia_smi(tmp_path, monkeypatch, answer)
        assert set(read_gpu("0a1b").values()) == {NOT_GIVEN}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert set(read_gpu("0a1b").values()) == {NOT_GIVEN}


def test_a_clock_below_three_quarters_of_its_maximum_is_flagged():
    def state(now, most=2000.0):
        return {"sm_clock_mhz": now, "sm_clock_max_mhz": most}

    assert slow_clock_warnings([state(1500.0), state(1980.0), state(NOT_GIVEN)], 0) == []
    assert slow_clock_warnings([], 0) == []
    (said,) = slow_clock_warnings([state(1499.0), state(1200.0), state(1980.0)], 2)
    assert "run 2" in said and "1,200 MHz, below 75% of its maximum of 2,000 MHz" in said


def test_the_versions_of_the_libraries_are_known():
    found = machine.describe_libraries()
    assert all(part[0].isdigit() for part in found.values())
    assert {"numpy", "python-flint"} <= set(found)


def test_the_device_is_described(device):
    facts = pm.describe_environment(device)
    assert facts["device"] == device and facts["processor"] and facts["torch"] == torch.__version__
    more = machine.describe_device(device)
    assert more["torch"] == torch.__version__ and more["onednn"] and more["mkl"]
    assert ("driver" in more) == (device == "cuda")


def test_the_host_is_described_and_known_again():
    facts = machine.describe_host()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**30 and facts["processor"]
    assert host_identity() == host_identity() == facts["host_identity"]
    assert len(host_identity()) == 16


ARM = "processor\t: 0\nFeatures\t: fp asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
VIRTUAL = "cpu family\t: 25\nmodel\t\t: 17\nflags\t\t: avx2 avx512_vnni hypervisor sse\n\nflags: x"
NOTHING = dict.fromkeys(("clock_mhz", "clock_max_mhz", "virtual"), NOT_GIVEN)
NOTHING |= {"caches_kib": {}, "instructions": []}


@pytest.mark.parametrize(
    ("cpuinfo", "facts", "words"),
    [
        ("", {}, ""),
        (
            ARM,
            {"implementer": "0x41", "part": "0xd40", "instructions": ["asimddp", "i8mm"]},
            "implementer 0x41, part 0xd40; asimddp, i8mm",
        ),
        (
            VIRTUAL,
            {"family": "25", "model": "17", "instructions": ["avx2", "avx512_vnni"]}
            | {"virtual": "yes, A Vendor"},
            "family 25, model 17; avx2, avx512_vnni; a virtual machine (A Vendor)",
        ),
        (
            VIRTUAL.replace("hypervisor", ""),
            {"family": "25", "model": "17", "instructions": ["avx2", "avx512_vnni"]}
            | {"virtual": "no"},
            "family 25, model 17; avx2, avx512_vnni; no virtual machine",
        ),
    ],
)
def test_of_a_processor_is_said_what_the_system_gives(monkeypatch, cpuinfo, facts, words):
    given = {"/proc/cpuinfo": cpuinfo, "/sys/class/dmi/id/sys_vendor": "A Vendor\n"}
    monkeypatch.setattr(machine, "_read", lambda path: given.get(str(path), ""))

    def no_clock():
        raise NotImplementedError("no CPU frequency here")

    monkeypatch.setattr(machine.psutil, "cpu_freq", no_clock)
    assert machine.describe_processor() == NOTHING | facts
    assert in_detail(NOTHING | facts) == words
    more = {"clock_mhz": 2600, "caches_kib": {"L1d": 48, "L3": 491520}}
    assert in_detail(more) == "2,600 MHz; L1d 48 KiB, L3 491,520 KiB"
    assert in_detail(more | {"clock_max_mhz": 3700}).startswith("up to 3,700 MHz; L1d")
