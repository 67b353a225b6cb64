"""The driver: runs notebooks, keeps what they leave, draws and checks it. Never imports torch."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what was found and what to do."""


def near(word: str, there: Iterable[str]) -> str:
    """The end of a message on an unknown word: those that it is near to, or all that there are."""
    close = difflib.get_close_matches(word, there, n=2, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there)}."
