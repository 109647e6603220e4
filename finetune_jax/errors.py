"""The one exception for a user's mistake; the command line prints it as one line and exits with code 2."""


class UserError(ValueError):
    """Input that cannot be used. The message names the value, the limit and the fix, on one line."""
