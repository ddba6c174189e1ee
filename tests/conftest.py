"""Settings and fixtures of all tests. What tests call stands in tests/helpers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers.runs import forks
from tests.helpers.shards import members_of, write_tar

os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)
# The same cases in every run, so that main does not fail by luck; `make faults` draws new ones.
settings.register_profile("trainer", deadline=None, derandomize="TRAINER_MUTANTS" not in os.environ)
settings.load_profile("trainer")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 64 samples together; returns their folder."""
    for number, samples in enumerate((range(20), range(20, 50), range(50, 64))):
        write_tar(tmp_path / "shards" / f"s-{number:03d}.tar", members_of(samples))
    return tmp_path / "shards"


@pytest.fixture(scope="session", autouse=True)
def _end_of_session() -> Iterator[None]:
    yield
    if forks.cache_info().currsize:
        forks().close()
