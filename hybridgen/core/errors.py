"""Errors that a command prints as one line: UserError (exit code 2), PeerError and StorageError (exit code 1)."""


class UserError(ValueError):
    """A mistake that the user can correct: the message states the given value and the allowed values."""


class PeerError(RuntimeError):
    """Another process of this program is missing or lost: the same command may succeed when run again."""


class StorageError(RuntimeError):
    """The storage did not answer: the same command may succeed when run again."""
