import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.distributed.world import World
from trainer.errors import CheckpointError
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import acquire
from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver
from trainer.fault_tolerance.ledger import rows_until

IDENTITY = Identity({"global_batch": 8, "seed": 0}, "abc", "", 1, 1, "fp32", 1)


class Run:
    """One rank's saver, and a state of a few bytes."""

    def __init__(self, output: Path, keep: int = 3, background: bool = False) -> None:
        self.root = output / "checkpoints"
        self.saver = Saver(
            self.root, IDENTITY, {}, lease=acquire(output, num_ranks=1), world=World(), keep=keep, background=background
        )

    def save(self, step: int, fail: bool = False) -> Path:
        def write(folder: Path) -> list[Path]:
            path = folder / "state" / "weights.pt"
            path.parent.mkdir()
            path.write_bytes(bytes(range(200)) + step.to_bytes(4, "big"))
            if fail:
                raise OSError(28, "No space left on device")
            return [path]

        self.saver.save(Progress(step), lambda copy: write)
        return self.root / f"step-{step:08d}"

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture(params=[False, True], ids=["at-once", "in-background"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(tmp_path / "out", background=request.param)


@pytest.mark.versions
def test_the_newest_valid_one_wins_and_old_ones_go(run: Run) -> None:
    for step in (1, 2, 3, 4):
        run.save(step)
    run.saver.finish()
    assert run.names() == ["latest", "step-00000002", "step-00000003", "step-00000004"]
    found = checkpoint.find(run.root)
    assert found is not None
    assert found[1]["samples"] == 32
    assert (run.root / "latest").read_text() == "step-00000004\n"
    assert not list((run.root.parent / "attempts" / "000001" / "drafts").iterdir())


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest"])
def test_damage_of_any_kind_is_passed_over(tmp_path: Path, damage: str) -> None:
    run = Run(tmp_path)
    run.save(1)
    path = run.save(2)
    weights = path / "state" / "weights.pt"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "remove":
        weights.unlink()
    else:
        (path / "manifest.json").write_text('{"files": {}}')
    found = checkpoint.find(run.root)
    assert found is not None
    assert found[0].name == "step-00000001"
    (run.root / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoint.find(run.root)


def test_only_what_is_whole_counts_as_kept(run: Run) -> None:
    for step in (1, 2, 3):
        run.save(step)
    run.saver.wait()
    (run.root / "step-99999999").mkdir()  # a copy that was broken off
    (run.root / "step-00000003" / "state" / "weights.pt").unlink()
    run.save(4)
    run.saver.finish()
    assert run.names() == ["latest", *(f"step-{n:08d}" for n in (1, 2, 3, 4, 99999999))]
    run.save(5)
    run.saver.finish()
    assert run.names() == ["latest", *(f"step-{n:08d}" for n in (2, 3, 4, 5, 99999999))]


def test_a_failed_write_leaves_the_older_one_and_no_rubbish(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(1)
    run.save(2, fail=True)
    run.saver.wait()
    assert "No space left" in caplog.text
    assert run.names() == ["latest", "step-00000001"]
    with pytest.raises(CheckpointError, match="last checkpoint of this run"):
        run.saver.finish()
    run.save(3)
    run.saver.finish()
    assert run.names() == ["latest", "step-00000001", "step-00000003"]


def test_the_third_failure_in_a_row_ends_the_run(run: Run) -> None:
    run.save(1, fail=True)
    run.save(2, fail=True)
    with pytest.raises(CheckpointError, match="3 saves in a row"), run.saver:  # which waits when it is left
        run.save(3, fail=True)


def test_a_background_save_that_is_still_writing_is_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path, background=True)
    go_on, seen = threading.Event(), []

    def slow(folder: Path) -> list[Path]:
        assert go_on.wait(30)
        seen.append("written")
        return []

    run.saver.save(Progress(1), lambda copy: slow)
    assert not seen
    assert not list(run.root.glob("step-*"))
    threading.Timer(0.2, go_on.set).start()
    run.save(2)
    assert seen == ["written"]
    run.saver.finish()
    assert run.names() == ["latest", "step-00000001", "step-00000002"]


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.save(1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=203))
    run.save(2)
    assert "needs 204 bytes" in caplog.text
    assert run.names() == ["latest", "step-00000001"]


def test_saving_a_step_again_replaces_only_a_damaged_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = run.save(5)
    before = path.stat().st_ino
    assert run.save(5).stat().st_ino == before
    (path / "state" / "weights.pt").write_bytes(b"damaged")
    assert checkpoint.verify(run.save(5))["progress"]["step"] == 5
    assert run.names() == ["latest", "step-00000005"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"global_batch": 8, "seed": 1}}, r"seed \(here 1, there 0\)"),
        ({"data_fingerprint": "xyz"}, "--data"),
        ({"plan_version": 2}, "plan_version"),
        ({"zero_stage": 3}, "zero_stage 1, but this run has 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path: Path, change: dict, message: str) -> None:
    path = Run(tmp_path).save(1)
    manifest = checkpoint.verify(path)
    checkpoint.check_identity(manifest, IDENTITY, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_identity(manifest, dataclasses.replace(IDENTITY, **change), path)


@pytest.mark.parametrize(("old", "new"), [('"seed"', '"sved"'), ('"sha256": "', '"shb256": "'), ('"abc"', '"abb"')])
def test_damage_to_a_manifest_is_damage_and_no_other_recipe(tmp_path: Path, old: str, new: str) -> None:
    path = Run(tmp_path).save(1)
    manifest = path / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(new.join(text.rsplit(old, 1)))
    with pytest.raises(CheckpointError, match=r"manifest\.json is unreadable"):
        checkpoint.verify(path)
    former = json.loads(text)
    del former["sha256"]  # as release 0.1 wrote it
    manifest.write_text(json.dumps(former))
    checkpoint.verify(path)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    path = Run(tmp_path).save(1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.verify(path)


def test_records_beyond_the_checkpoint_and_torn_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert rows_until(path, 2) == '{"step": 1}\n{"step": 2}\n'
    assert rows_until(tmp_path / "none", 2) == ""
