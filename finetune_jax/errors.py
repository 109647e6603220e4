"""The one exception for a user's mistake; the command line prints it as one line and exits with code 2."""

import os
import re

_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_HUB_TOKEN = re.compile(r"\bhf_\w{10,}")
_NAME_OF_A_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8


class UserError(ValueError):
    """Input that cannot be used. The message names the value, the limit and the fix, on one line, and no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def without_secrets(text: str) -> str:
    """The text without passwords in addresses, hub tokens, and values of environment variables that are named as secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _NAME_OF_A_SECRET.search(name):
            text = text.replace(value, f"${name}")
    return _HUB_TOKEN.sub("hf_***", _USER_IN_URL.sub("***@", text))
