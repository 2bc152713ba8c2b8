"""The one exception that a user's mistake raises; command lines print it as one line and exit with code 2."""


class UserError(ValueError):
    """Something that the user can put right: its message names the value given and the values allowed."""
