"""The driver: runs notebooks, keeps what they leave, draws and checks it. Never imports torch."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what was found and what to do."""
