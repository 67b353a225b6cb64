"""The host: what a reader must know of the machine behind a number. Needs no torch."""

import hashlib
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import psutil

# Settings that change what a matrix product costs without showing in any argument.
_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "CUDA_", "CUBLAS_", "PYTORCH_")


def processor_name() -> str:
    """The processor's model name, or the architecture where the system gives none."""
    cpuinfo = _read("/proc/cpuinfo")
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].split())
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            check=False,
            capture_output=True,
            text=True,
        )
        if answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()


def host_identity() -> str:
    """A short hash that is the same at every start of one host and differs between hosts.

    It is made from the system's machine id, or the host's name where there is none, with the
    processor's name and the number of cores. A hash, because rows are published and names are not.
    """
    machine_id = _read("/etc/machine-id").strip() or socket.gethostname()
    parts = (machine_id, processor_name(), str(psutil.cpu_count()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def describe_host() -> dict:
    """The host's state now: hardware, system, load, frequency governor and timing variables."""
    try:
        load = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # not on Windows
        load = None
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return {
        "host_identity": host_identity(),
        "processor": processor_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "governor": governor or "not given by the system",
        "load_1min": load,
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
