"""Weights by their name on the Hugging Face hub: from its cache or downloaded, or a message within seconds.

The libraries themselves try again for more than a minute where there is no network.
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

_PATIENCE_S = 5.0
_FILES = ("model.safetensors", "pytorch_model.bin")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(text: str) -> bool:
    """Whether a setting that names no file or folder here may be OWNER/NAME on the hub."""
    return bool(_NAME.fullmatch(text)) and Path(text).suffix not in (".pth", ".pt", ".bin", ".safetensors", ".tar")


def fetch_folder(name: str, said: str) -> Path:
    """Return the folder of a model of transformers: its weights and what describes them.

    Args:
        name: OWNER/NAME.
        said: the setting and its value, for messages.

    Raises:
        ConfigError: it is not in the cache, and the hub does not answer or has none of that name.
    """
    files = "config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin)"
    remedy = f"download {files} of it where there is a network, put them into one folder, and name that folder"
    with within_seconds(name, f"{said}: there is no such file or folder here", remedy):
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*config.json", _FILES[0]]))
            if not (folder / _FILES[0]).is_file():
                folder = Path(snapshot_download(name, allow_patterns=["*config.json", _FILES[1]]))
        except Exception as error:
            raise ConfigError(f"{said}: the hub gives no such model ({error}): {remedy}") from error
    return folder


@contextlib.contextmanager
def within_seconds(name: str, said: str, remedy: str) -> Iterator[None]:
    """Let what is in the hub's cache be taken without a network, and refuse at once what is not.

    Raises:
        ConfigError: the hub does not answer, and nothing of that name is in the cache.
    """
    if not name or _answers():
        yield
        return
    cached = Path(hub.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    if not cached.is_dir():
        raise ConfigError(
            f"{said}, and {hub.ENDPOINT}/{name} cannot be reached (no answer in {_PATIENCE_S:g} s): {remedy}"
        )
    was, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # its own switch is read once, at the import
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = was


def _answers() -> bool:
    """Ask the hub for a page; a thread, because looking a name up knows no time limit."""
    if hub.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PATIENCE_S).close()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return answered.is_set()
