"""The device that a notebook asks for, and what is worth knowing of it."""

import platform
import re

import torch

from posmat.host import NOT_GIVEN, processor_name, read_gpu


def require_device(device: str | torch.device) -> torch.device:
    """The device that was asked for, or an error: never another one in its place.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".

    Raises:
        ValueError: the name is not a device's that posmat knows, or the device is not there.
    """
    asked = str(device)
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", asked)
    if not known:
        raise ValueError(f"device={asked!r} is not known: give 'cpu', 'cuda' or 'cuda:<index>'.")
    if asked != "cpu":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(known[1] or 0) >= found:
            sees = f"{found} CUDA device{'s' if found > 1 else ''}" if found else "no CUDA device"
            raise ValueError(
                f"device={asked!r} was asked for, but this PyTorch ({torch.__version__}) sees "
                f"{sees}. Run with device='cpu', or install a CUDA build of PyTorch on a machine "
                "that has the device."
            )
    return torch.device(asked)


def make_current(device: torch.device) -> None:
    """Make a CUDA device that has an index the current one, which "cuda" alone means from then on.

    `torch.utils.benchmark` waits for the current device only.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def describe_environment(device: str | torch.device) -> dict[str, str]:
    """The columns that every row carries of where it was measured: device, processor, torch."""
    device = require_device(device)
    on_gpu = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_gpu else processor_name()
    return {"device": device.type, "processor": processor, "torch": torch.__version__}


def gpu_uuid(device: torch.device) -> str:
    """The UUID of a CUDA device; without an index, of the current one of the thread that asks."""
    return str(torch.cuda.get_device_properties(device).uuid)


def describe_device(device: str | torch.device) -> dict:
    """What the provenance says of the device and of PyTorch, beyond the columns of the rows."""
    device = require_device(device)
    build = torch.__config__.show()
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads_available": torch.get_num_threads(),
        "onednn": _version_in(build, r"MKL-DNN v(\S+)"),
        "mkl": _version_in(build, r"Math Kernel Library Version (\S+)"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_uuid": str(properties.uuid),
            "gpu_memory_bytes": properties.total_memory,
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": read_gpu(gpu_uuid(device))["driver"],
        }
    return facts


def _version_in(build: str, pattern: str) -> str:
    """The version of a library that PyTorch was built with."""
    found = re.search(pattern, build)
    return found[1] if found else NOT_GIVEN
