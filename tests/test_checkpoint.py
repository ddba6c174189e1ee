import dataclasses
import json
from pathlib import Path

import pytest

from trainer import checkpoint
from trainer.checkpoint import Identity, Progress
from trainer.errors import CheckpointError
from trainer.monitor import cut_after
from trainer.world import World

IDENTITY = Identity({"global_batch": 8, "seed": 0}, "abc", "", 1, 1, "fp32", 1)


def save(root: Path, step: int, keep: int = 3, fail: bool = False) -> Path:
    def write_state(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "weights.pt").write_bytes(bytes(range(200)) + step.to_bytes(4, "big"))
        if fail:
            raise OSError(28, "No space left on device")

    root.mkdir(exist_ok=True)
    return checkpoint.save(root, Progress(step), IDENTITY, {}, write_state=write_state, world=World(), keep=keep)


def test_the_newest_valid_one_wins_and_old_ones_go(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (1, 2, 3, 4):
        save(root, step)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000002", "step-00000003", "step-00000004"]
    found = checkpoint.find(root)
    assert found is not None
    assert found[1]["samples"] == 32
    assert (root / "latest").read_text() == "step-00000004\n"


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest"])
def test_damage_of_any_kind_is_passed_over(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "c"
    save(root, 1)
    path = save(root, 2)
    weights = path / "state" / "weights.pt"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "remove":
        weights.unlink()
    else:
        (path / "manifest.json").write_text('{"files": {}}')
    found = checkpoint.find(root)
    assert found is not None
    assert found[0].name == "step-00000001"
    (root / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoint.find(root)


def test_a_failed_write_leaves_the_older_one_and_no_rubbish(tmp_path: Path) -> None:
    root = tmp_path / "c"
    save(root, 1)
    with pytest.raises(CheckpointError, match="No space left"):
        save(root, 2, fail=True)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000001"]


def test_saving_a_step_again_replaces_only_a_damaged_one(tmp_path: Path) -> None:
    root = tmp_path / "c"
    path = save(root, 5)
    (path / "state" / "weights.pt").write_bytes(b"damaged")
    assert checkpoint.verify(save(root, 5))["progress"]["step"] == 5
    checkpoint.sweep(root)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000005"]


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
    path = save(tmp_path / "c", 1)
    manifest = checkpoint.verify(path)
    checkpoint.check_identity(manifest, IDENTITY, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_identity(manifest, dataclasses.replace(IDENTITY, **change), path)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.verify(path)


def test_records_beyond_the_checkpoint_and_torn_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
