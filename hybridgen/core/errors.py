"""What command lines print as one line: a user's mistake (exit code 2), and a lost peer (exit code 1)."""


class UserError(ValueError):
    """Something that the user can put right: its message names the value given and the values allowed."""


class PeerError(RuntimeError):
    """Another process of this program is missing or lost: the command is right, and may be run again."""
