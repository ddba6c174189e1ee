"""Nothing that stands in data or in a checkpoint is executed, and what we write obeys the umask."""

import gzip
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.helpers.shards import jpeg, write_tar
from trainer.data.order.plan import Plan
from trainer.data.shards.index import open_index
from trainer.data.stream import Slice, train_stream
from trainer.data.transforms.views import PretrainView
from trainer.distributed.world import World
from trainer.distributed.zero_state import load_safely
from trainer.errors import CheckpointError
from trainer.fault_tolerance.attempts import acquire
from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver

SUFFIXES = ("pyd", "pickle", "pkl", "pth", "PYD", "x.pyd", "pyd.gz")
"""What webdataset's own decoders unpickle."""


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_seven_payloads_in_a_shard_leave_no_trace(tmp_path: Path) -> None:
    payload, members = pickle.dumps(Trap(tmp_path / "sprung")), []
    for number, suffix in enumerate(SUFFIXES):
        hidden = gzip.compress(payload) if suffix.endswith("gz") else payload
        members += [(f"f{number}.jpg", jpeg(number)), (f"f{number}.{suffix}", hidden)]
    index = open_index([str(write_tar(tmp_path / "s.tar", members))])
    view = PretrainView(size=16, crop_scale=(0.5, 1.0), flip_probability=0.5, seed=0, fast=True)
    stream = train_stream(index, Plan(len(index), seed=0), Slice(7, 7), view, first_step=0, noise_per_sample=1)
    assert sorted(next(iter(stream)).keys) == [f"f{number}" for number in range(7)]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_payload_in_a_checkpoint_is_refused_and_leaves_no_trace(tmp_path: Path, form: str) -> None:
    path, state = tmp_path / "model_states.pt", {"module": {}, "trap": Trap(tmp_path / "sprung")}
    if form == "bare":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        load_safely(str(path))
    assert not (tmp_path / "sprung").exists()
    if form != "bare":  # the trap works where nobody looks
        torch.load(path, weights_only=False)
        assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_obeys_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        lease = acquire(tmp_path / "out", num_ranks=1)
        lease.began(0)

        def write(folder: Path) -> list[Path]:
            torch.save({}, folder / "state.pt")
            return [folder / "state.pt"]

        identity = Identity({"global_batch": 8}, "", "", 1, 1, "fp32", 1)
        saver = Saver(tmp_path / "out" / "checkpoints", identity, {}, lease=lease, world=World(), keep=1)
        saver.save(Progress(1), lambda copy: write)
        lease.append_to(tmp_path / "out" / "rows", "").close()
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
