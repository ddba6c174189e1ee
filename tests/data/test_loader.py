"""Batches reach the training process whatever the size of /dev/shm; a worker that cannot send one says so at once."""

import dataclasses
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import ROOT, environment
from tests.helpers.shards import members_of, write_tar
from trainer.data import loader
from trainer.data.loader import Loader
from trainer.data.shards.index import ShardIndex, list_shards, open_index
from trainer.data.stream import Batch, Stream, fixed_stream
from trainer.data.transforms.views import CenterView
from trainer.errors import DataError

CAN_MOUNT = (
    os.geteuid() == 0
    and not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, check=False
    ).returncode
)


def stream_of(index: ShardIndex, *, size: int = 15, noise: int = 3) -> Stream:
    return fixed_stream(index, list(range(len(index))), CenterView(size=size), batch=7, noise_per_sample=noise)


@pytest.fixture
def index(shards: Path) -> ShardIndex:
    return open_index(list_shards(str(shards), setting="--data"))


@pytest.mark.parametrize("noise", [0, 3])
def test_a_batch_of_a_worker_is_bitwise_that_of_none_with_the_same_layout(index: ShardIndex, noise: int) -> None:
    alone, workers = (list(Loader(stream_of(index, noise=noise), num_workers=number)) for number in (0, 2))
    assert len(alone) == len(workers) == 10
    for one, two in zip(alone, workers, strict=True):
        assert torch.equal(one.images_BCHW, two.images_BCHW)
        assert one.images_BCHW.stride() == two.images_BCHW.stride()
        assert torch.equal(one.noise_BN, two.noise_BN)
        assert [one.positions, one.keys, one.labels, one.bad] == [two.positions, two.keys, two.labels, two.bad]
        two.images_BCHW.zero_()  # it is the training's own memory
        two.noise_BN.zero_()


_READ = """
import sys
from trainer.data.transforms.views import CenterView
from trainer.data.loader import Loader
from trainer.data.shards.index import list_shards, open_index
from trainer.data.stream import fixed_stream

index = open_index(list_shards(sys.argv[1], setting="--data"))
stream = fixed_stream(index, list(range(len(index))), CenterView(size=224), batch=16, noise_per_sample=1)
print(sum(int(batch.images_BCHW.sum()) > 0 for batch in Loader(stream, num_workers=2, prefetch=2)))
"""


@pytest.mark.skipif(not CAN_MOUNT, reason="needs root and the right to mount")
def test_a_container_with_a_tiny_dev_shm_loads_every_batch(shards: Path) -> None:
    mounted = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    words = ["unshare", "-m", "bash", "-c", mounted, "bash", sys.executable, "-c", _READ, str(shards)]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "4\n", done.stderr[-2000:]


def test_a_worker_without_a_free_descriptor_says_so_as_a_data_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", members_of(range(3)))
    batch = next(iter(stream_of(open_index(list_shards(str(tmp_path), setting="--data")))))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        found = loader._SharedBatch.of(batch)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(found, DataError)
    assert "cannot hand over its batch of" in str(found)
    assert "Too many open files" in str(found)


class Unsendable(Stream):
    """Its batches hold what no process can send to another."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            yield dataclasses.replace(batch, keys=[threading.Lock()])  # type: ignore[list-item]

    def expected_positions(self) -> Iterator[list[int]]:
        return self._stream.expected_positions()


def test_a_worker_that_cannot_send_its_batch_ends_the_run_at_once(
    index: ShardIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"loader worker \d+ exited unexpectedly: .* lower num_workers"):
        next(iter(Loader(Unsendable(stream_of(index)), num_workers=1)))
    assert time.monotonic() - began < 30
    assert "a loader worker cannot hand over its batch (TypeError" in capfd.readouterr().err


def test_a_worker_that_is_killed_is_a_plain_error(index: ShardIndex) -> None:
    """The kernel ends the largest process when memory runs out, and that may be a worker."""
    batches = iter(Loader(stream_of(index), num_workers=1, prefetch=1))
    others = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(DataError, match=rf"worker {worker.pid} (exited unexpectedly|was killed by signal: Killed)"):
        for _ in batches:
            pass
