"""Commands that users start, and the recipes they start from."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (whoever starts a command with an old Python shall read why it fails)
    sys.exit(f"error: Python 3.11 or newer is needed, but {sys.executable} is {sys.version.split()[0]}: see README.md")
