"""What the driver is doing, on stderr: one refreshed line on a terminal, plain lines elsewhere.

It costs next to nothing, because what it watches is being timed: one look a second.
"""

import shutil
import sys
import threading
import time
from contextlib import contextmanager

LONG_S = 5  # a cell that takes longer gets a plain line of its own
AGAIN_S = 300  # and another one after so long
LOOK_S = 1  # between two looks
_CLEAR = "\r\x1b[K"  # back to the line's begin, and empty it


class Progress:
    """The state of the running job, told as it changes.

    Args:
        quiet: tell failures only.
        stream: where to; stderr by default.
    """

    def __init__(self, quiet: bool = False, stream=None):
        self.stream = stream or sys.stderr
        self.terminal, self.quiet = self.stream.isatty(), quiet
        self._label = self._at = ""
        self._expected = None
        self._began = self._cell_began = self._told = 0.0

    @contextmanager
    def of(self, label: str, expected: float | None):
        """A job runs; `expected` is how many seconds it took the last time, if that is known."""
        self._label, self._at, self._expected = label, "starting", expected
        self._began = self._cell_began = self._told = time.monotonic()
        if not self.terminal:
            self.say(label + (f", about {seconds(expected)} as last time" if expected else ""))
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(ended,), daemon=True)
        if not self.quiet:
            ticker.start()
        try:
            yield
        finally:
            ended.set()
            if not self.quiet:
                ticker.join()
                print(_CLEAR * self.terminal, end="", file=self.stream, flush=True)

    def cell(self, number: int, total: int, line: str) -> None:
        """A cell begins."""
        self._at = f"cell {number} of {total} ({line})"
        self._cell_began = self._told = time.monotonic()

    def say(self, text: str, always: bool = False) -> None:
        """One line that stays."""
        if always or not self.quiet:
            print(f"{_CLEAR * self.terminal}{text}", file=self.stream, flush=True)

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(LOOK_S):
            now = time.monotonic()
            elapsed = seconds(now - self._began)
            of = f" of about {seconds(self._expected)}" if self._expected else ""
            text = f"{self._label}: {self._at}, {elapsed}{of}"
            if self.terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"{_CLEAR}{text[:width]}", end="", file=self.stream, flush=True)
            elif now - self._told > (AGAIN_S if self._told > self._cell_began else LONG_S):
                self._told = now
                print(text, file=self.stream, flush=True)


def seconds(number: float) -> str:
    """A duration for people: 8 s, 2 min 5 s, 3 h 4 min."""
    whole = round(number)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
