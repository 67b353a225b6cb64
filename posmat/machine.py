"""The machine: what a reader must know of the host behind a number, and the device asked for.

Torch is imported only where a device is meant, so that the driver does without.
"""

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

JOB_VARIABLE = "POSMAT_JOB"  # what the driver tells a process: machine, run, stem, folders
NOT_GIVEN = "not given by the system"
LEAST_CLOCK_SHARE = 0.75  # of a GPU's highest SM clock; below it times are not those of the card

# Settings that change what a matrix product costs without showing in any argument.
_MATTERS = re.compile("(OMP|MKL|KMP|GOMP|ONEDNN|DNNL|CUDA|CUBLAS|PYTORCH)_").match
# Instruction sets that decide how fast int8 numbers are multiplied, as Linux names them.
_FOR_INT8 = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
# Not torch, whose version stands in every row.
_LIBRARIES = ("numpy", "pandas", "scikit-learn", "matplotlib", "seaborn", "papermill")
_OF_THE_GPU = {  # our name, with its unit, and that of nvidia-smi
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "driver": "driver_version",
}


def job_order() -> dict:
    """What the driver told this process; nothing where there is none."""
    return json.loads(os.environ.get(JOB_VARIABLE, "{}"))


def processor_name() -> str:
    """The processor's model name, or the architecture where the system gives none."""
    found = re.search(r"^model name\s*:(.*)", _read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return " ".join(found[1].split())
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            if said := _answer(["sysctl", "-n", "machdep.cpu.brand_string"]):
                return said
    return platform.processor() or platform.machine()


def host_identity() -> str:
    """A short hash that is the same at every start of one host and differs between hosts.

    Of the machine id, or the host's name where there is none, with the processor's name and the
    number of cores. A hash, because rows are published and names are not.
    """
    machine_id = _read("/etc/machine-id").strip() or socket.gethostname()
    parts = (machine_id, processor_name(), str(psutil.cpu_count()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def describe_host() -> dict:
    """The host's state now: hardware, system, load, frequency governor and timing variables."""
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return {
        "host_identity": host_identity(),
        "processor": processor_name(),
        **describe_processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "governor": governor or NOT_GIVEN,
        "load_1min": round(psutil.getloadavg()[0], 2),
        "variables": {name: os.environ[name] for name in filter(_MATTERS, sorted(os.environ))},
    }


def describe_processor() -> dict:
    """What a paper asks of a processor beyond its name, as far as the system tells it."""
    lines = [line.partition(":") for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    flags = (told.get("flags") or told.get("Features", "")).split()  # x86, Arm
    of_model = {"family": "cpu family", "model": "model", "stepping": "stepping"}  # x86
    of_model |= {"implementer": "CPU implementer", "part": "CPU part"}  # Arm
    vendor = _read("/sys/class/dmi/id/sys_vendor").strip()
    clock = None
    with suppress(Exception):  # psutil knows no clock of some systems, and says so in many ways
        clock = psutil.cpu_freq()
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / one).strip() for one in ("level", "type", "size"))
        if kind in ("Data", "Unified") and size.endswith("K"):
            caches[f"L{level}" + "d" * (kind == "Data")] = int(size[:-1])
    virtual = "no" if "cpu family" in told else NOT_GIVEN  # Arm has no such flag
    if "hypervisor" in flags:
        virtual = f"yes, {vendor}" if vendor else "yes"
    return {
        **{name: told[key] for name, key in of_model.items() if key in told},
        "clock_mhz": round(clock.current) if clock and clock.current else NOT_GIVEN,
        "clock_max_mhz": round(clock.max) if clock and clock.max else NOT_GIVEN,
        "caches_kib": caches,
        "instructions": [one for one in _FOR_INT8 if one in flags],
        "virtual": virtual,
    }


def describe_libraries() -> dict[str, str]:
    """The versions of the libraries that compute, draw and run, without importing them."""
    return {name: version(name) for name in (*_LIBRARIES, "python-flint")}


def read_gpu(uuid: str) -> dict:
    """What nvidia-smi says of a GPU now: `sm_clock_mhz`, `sm_clock_max_mhz`, `power_w`,
    `temperature_c` and `driver`, each 'not given by the system' where it says nothing.

    The `uuid` is PyTorch's, with or without the 'GPU-' of nvidia-smi. An index would not do: the
    two may count the devices in another order.
    """
    order = ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}"]
    order += [f"--query-gpu={','.join(_OF_THE_GPU.values())}", "--format=csv,noheader,nounits"]
    facts = dict.fromkeys(_OF_THE_GPU, NOT_GIVEN)
    # It may be missing, or know no such GPU; of what the card does not tell it says "[N/A]".
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        said = dict(zip(_OF_THE_GPU, _answer(order).split(", "), strict=True))
        facts["driver"] = said.pop("driver")
        known = {name: text for name, text in said.items() if re.fullmatch(r"[0-9.]+", text)}
        facts |= {name: float(text) for name, text in known.items()}
    return facts


def slow_clock_warnings(states: list[dict], run: int) -> list[str]:
    """A sentence where a state that `read_gpu` gave during `run` had a slow SM clock, or none."""
    clocks = [(state["sm_clock_mhz"], state["sm_clock_max_mhz"]) for state in states]
    now, most = min((pair for pair in clocks if NOT_GIVEN not in pair), default=(1, 1))
    if now >= LEAST_CLOCK_SHARE * most:
        return []
    return [
        f"run {run}: the GPU's SM clock fell to {now:,.0f} MHz, below {LEAST_CLOCK_SHARE:.0%} of "
        f"its maximum of {most:,.0f} MHz, so the times are not those of the card at full speed"
    ]


def require_device(device: "str | torch.device") -> "torch.device":
    """The device that was asked for, "cpu", "cuda" or "cuda:<index>", never another in its place.

    Raises:
        ValueError: the name is not a device's that posmat knows, or the device is not there.
    """
    import torch

    asked = str(device)
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", asked)
    if not known:
        raise ValueError(f"device={asked!r} is not known: give 'cpu', 'cuda' or 'cuda:<index>'.")
    found = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    if asked != "cpu" and int(known[1] or 0) >= found:
        raise ValueError(
            f"device={asked!r} was asked for, but this PyTorch ({torch.__version__}) sees "
            f"{found or 'no'} CUDA device{'' if found == 1 else 's'}. Run with device='cpu', or "
            "install a CUDA build of PyTorch on a machine that has the device."
        )
    return torch.device(asked)


def make_current(device: "torch.device") -> None:
    """Make a CUDA device with an index the current one; torch.utils.benchmark awaits no other."""
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def describe_environment(device: "str | torch.device") -> dict[str, str]:
    """The columns that every row carries of where it was measured: device, processor, torch."""
    import torch

    device = require_device(device)
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else processor_name()
    return {"device": device.type, "processor": processor, "torch": torch.__version__}


def gpu_uuid(device: "torch.device") -> str:
    """The UUID of a CUDA device; without an index, of the current one of the thread that asks."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def describe_device(device: "str | torch.device") -> dict:
    """What the provenance says of the device and of PyTorch, beyond the columns of the rows."""
    import torch

    device = require_device(device)
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads_available": torch.get_num_threads(),
    }
    for name, words in {"onednn": "MKL-DNN v", "mkl": "Math Kernel Library Version "}.items():
        found = re.search(words + r"(\S+)", torch.__config__.show())
        facts[name] = found[1] if found else NOT_GIVEN
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_uuid": gpu_uuid(device),
            "gpu_memory_bytes": properties.total_memory,
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": read_gpu(gpu_uuid(device))["driver"],
        }
    return facts


def _answer(order: list[str]) -> str:
    how = {"encoding": "utf-8", "errors": "replace", "timeout": 30}
    return subprocess.run(order, check=True, capture_output=True, **how).stdout.strip()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
