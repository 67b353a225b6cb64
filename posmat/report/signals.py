"""Ctrl-C, SIGTERM and SIGHUP: end what runs, keep what is done, and say so."""

import signal
import threading
from contextlib import contextmanager

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_held: list[str] | None = None  # the names of signals that came while they were held back


class Stopped(KeyboardInterrupt):
    """The driver was told to stop; the message says by what."""


@contextmanager
def stoppable():
    """Within, the first of the signals raises `Stopped`, and the ones after it change nothing.

    Only the main thread can set this. A signal that is ignored (as under nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if before[number] is not signal.SIG_IGN]

    def stop(number, frame):
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        name = signal.Signals(number).name.replace("SIGINT", "Ctrl-C")
        if _held is None:
            raise Stopped(name)
        _held.append(name)

    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def held_back():
    """Within, the signals wait, so that files that belong together are moved together.

    Gives the list of those that came.
    """
    global _held  # noqa: PLW0603, a signal's handler has no other way to be told
    _held = []
    try:
        yield _held
    finally:
        _held = None
