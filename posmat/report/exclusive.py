"""One timing job at a time per device of a host, and how busy the host is otherwise."""

import getpass
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

BUSY_CORES = 0.5  # others' work beyond which a measurement is warned of


@contextmanager
def one_at_a_time(device: str, waits: Callable[[], None] = lambda: None):
    """Hold the lock of a device of this host; `waits` is called when another run holds it.

    The system releases the lock when its process ends, however it ends. It stands where all
    checkouts and users of a host find it, whatever TMPDIR is; POSMAT_LOCKS names another folder.
    """
    folder = "/tmp" if os.name == "posix" else tempfile.gettempdir()
    path = Path(os.environ.get("POSMAT_LOCKS", folder)) / f"posmat-{device}.lock"
    lock = FileLock(path, mode=0o666)
    try:
        try:
            lock.acquire(timeout=0)
        except PermissionError:  # another user's file: a lock among one's own runs is left
            lock = FileLock(path.with_name(f"posmat-{device}-{getpass.getuser()}.lock"))
            lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire(poll_interval=1)
    try:
        yield
    finally:
        lock.release()


def busy_warning() -> str:
    """A sentence when others use the processor now, before the kernel is started; '' if not."""
    busy = psutil.cpu_percent(interval=0.5) / 100 * psutil.cpu_count()
    if busy < BUSY_CORES:
        return ""
    return (
        f"{busy:.1f} of {psutil.cpu_count()} cores were busy with other work when this run began: "
        "trust its ratios before its times."
    )
