"""Weights by their name on the Hugging Face hub: from its cache, downloaded, or an error within seconds.

Without a network, the libraries themselves retry for more than a minute.
"""

import contextlib
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub
from huggingface_hub import snapshot_download

from trainer.errors import ConfigError

_ANSWER_TIMEOUT_S = 5.0
_FILES = ("model.safetensors", "pytorch_model.bin")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(text: str) -> bool:
    """Whether a setting that names no file or folder here may be OWNER/NAME on the hub."""
    return bool(_NAME.fullmatch(text)) and Path(text).suffix not in (".pth", ".pt", ".bin", ".safetensors", ".tar")


def fetch_folder(name: str, given: str) -> Path:
    """Return the folder of a model of transformers: its weights and its configuration.

    Args:
        name: OWNER/NAME.
        given: the setting and its value, for messages.

    Raises:
        ConfigError: it is not in the cache, and the hub does not answer or has no such model.
    """
    files = "config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin)"
    remedy = f"download {files} of it where there is a network into one folder, and name that folder"
    with within_seconds(name, f"{given}: there is no such file or folder here", remedy):
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*config.json", _FILES[0]]))
            if not (folder / _FILES[0]).is_file():
                folder = Path(snapshot_download(name, allow_patterns=["*config.json", _FILES[1]]))
        except Exception as error:
            raise ConfigError(f"{given}: the hub does not return such a model ({error}): {remedy}") from error
    return folder


@contextlib.contextmanager
def within_seconds(name: str, given: str, remedy: str) -> Iterator[None]:
    """Use the hub's cache where there is no network, and refuse at once what is not in it.

    Raises:
        ConfigError: the hub does not answer, and nothing of that name is in the cache.
    """
    if not name or _answers():
        yield
        return
    cached = Path(hub.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    if not cached.is_dir():
        raise ConfigError(
            f"{given}, and {hub.ENDPOINT}/{name} cannot be reached (no answer in {_ANSWER_TIMEOUT_S:g} s): {remedy}"
        )
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # the environment variable is read once, at the import
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _answers() -> bool:
    """Whether the hub answers in time; asked in a thread, because a name lookup has no time limit."""
    if hub.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_TIMEOUT_S)
    return answered.is_set()
