"""One process group of one rank for all tests in this process: DeepSpeed keeps the first one that it has seen."""

import logging
import os
from collections.abc import Iterator

import pytest

from trainer.distributed.engine import connect, disconnect
from trainer.distributed.world import World


@pytest.fixture(scope="session")
def _connected() -> Iterator[World]:
    before = os.environ.get("LOCAL_RANK")
    world = connect(World(), timeout_s=30)
    if before is None:
        del os.environ["LOCAL_RANK"]
    yield world
    disconnect()


@pytest.fixture
def world(_connected: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world of one rank that is connected."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed reads it
    yield _connected
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
