"""Errors for users. Every message names the setting or file, its value, and ends with a remedy.

No message shows the query of a URL (behind ``?``) or its password: a signed URL is a key.
"""

import re

_QUERY = re.compile(r"""(https?://[^\s?#'"<>\\]*)\?[^\s,'"<>\\]*[^\s,'"<>\\:;.)\]]""")
_USER = re.compile(r"""(\w://)[^\s/@'"]+@""")


def without_secrets(text: str) -> str:
    """Replace the queries of URLs by ``?...``, and remove their user names and passwords."""
    return _USER.sub(r"\1", _QUERY.sub(r"\1?...", text))


class TrainerError(Exception):
    """A mistake that the user can fix: shown as one message without a traceback, exit code 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class ConfigError(TrainerError):
    """A setting is unknown, malformed, out of range, or contradicts another."""


class DataError(TrainerError):
    """A shard or a sample is damaged, or breaks the rules of the data format."""


class CheckpointError(TrainerError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class SupersededError(TrainerError):
    """A newer attempt at the same run has taken over its output; this one ends."""


class SampleError(DataError):
    """One sample cannot be used. The stream replaces it and counts ``reason``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
