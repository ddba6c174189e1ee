"""Whole runs of launch/pretrain.py: refusals, resume after SIGKILL, what is left on disk."""

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import ROOT, TINY, argv_of, command, environment, forks, free_port, launch, metrics, steps_done
from tests.helpers.shards import members_of, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


def flags(shards: Path, output: Path, **changes: object) -> dict[str, str]:
    return TINY | {"data": f"{shards}/*.tar", "output_dir": str(output)} | {n: str(v) for n, v in changes.items()}


def broken(kind: str, folder: Path) -> Path:
    """A folder with one shard that no run can use."""
    path = folder / f"{kind}.tar"
    whole = write_tar(path, members_of(range(12)))
    if kind == "compressed":
        whole.write_bytes(gzip.compress(whole.read_bytes()))
    elif kind == "empty":
        whole.write_bytes(b"")
    elif kind == "not_a_tar":
        whole.write_bytes(b"some text\n" * 200)
    elif kind == "no_image":
        write_tar(path, [("a.json", b"{}")])
    return folder


@pytest.mark.parametrize(
    ("changes", "shard", "message"),
    [
        ({"data": "/nowhere/*.tar"}, "", "/nowhere"),
        ({}, "not_a_tar", "not a tar"),
        ({}, "compressed", "gzip"),
        ({}, "empty", "empty"),
        ({}, "no_image", "no image member"),
        ({"mask_ratio": "1.5"}, "", "mask_ratio is 1.5"),
        ({"mask_ratio": "0.99"}, "", "keeps 0 of 16"),
        ({"image_size": "33"}, "", "image_size is 33"),
        ({"global_batch": "10"}, "", "global_batch is 10"),
        ({"model": "vit_bass"}, "", "model is 'vit_bass'"),
        ({"mask_ration": "0.5"}, "", "did you mean --mask_ratio"),
        ({"ds_config": "MALFORMED"}, "", "not valid JSON"),
        ({"ds_config": "CONFLICT"}, "", "optimizer.params.lr"),
        ({"resume": "must"}, "", "resume is must"),
        ({"index_dir": "/proc/nothing"}, "", "--index_dir"),
        ({"aug_repeats": "4", "micro_batch": "2"}, "", "divisible by aug_repeats (4)"),
        ({"aug_repeats": "3"}, "", "aug_repeats is 3"),
        ({"val_mask_ratio": "0.99"}, "", "keeps 0 of 16"),
        ({"compile_mode": "reduce-overhead"}, "", "needs a GPU"),
        ({"init_encoder_only": "true"}, "", "init_encoder_only is True"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    changes: dict[str, str], shard: str, message: str, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "MALFORMED").write_text("{'a': 1}")
    (tmp_path / "CONFLICT").write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 7.0}}}))
    if "ds_config" in changes:
        changes = {"ds_config": str(tmp_path / changes["ds_config"])}
    folder = broken(shard, tmp_path / "broken") if shard else shards
    done = launch(flags(folder, tmp_path / "out") | changes)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_more_ranks_than_devices_are_refused_through_the_launcher(shards: Path, tmp_path: Path) -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    words = flags(shards, tmp_path / "out", oversubscribe="false", global_batch=4 * ranks)
    done = subprocess.run(
        command(words, ranks=ranks, port=free_port()), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"{ranks} ranks were started on a host with {ranks - 1} CPU cores" in done.stderr


def wait_until_alone(output: Path) -> None:
    """Wait for the last heartbeat, which the watchdog process writes a moment after its rank has left."""
    beat = output / "logs" / "heartbeats" / "rank-00000.json"
    deadline = time.monotonic() + 20
    while not json.loads(beat.read_text())["gone"] and time.monotonic() < deadline:
        time.sleep(0.05)


def test_another_recipes_output_is_refused_and_left_alone(shards: Path, tmp_path: Path) -> None:
    words = flags(shards, tmp_path / "out", stop_at_step=2)
    assert launch(words).returncode == 0
    wait_until_alone(tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    done = launch(words | {"mask_ratio": "0.5", "seed": "3"})
    assert done.returncode == 2
    assert "mask_ratio (here 0.5, there 0.75); seed (here 3, there 0)" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before


def numbers(output: Path) -> list[tuple[object, ...]]:
    rows = metrics(output)
    return [(r["step"], r.get("loss"), r.get("lr"), r.get("grad_norm"), r.get("val_loss")) for r in rows]


def ledger(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(folder.iterdir())}


@pytest.mark.law
@pytest.mark.versions
def test_a_run_killed_mid_epoch_goes_on_bitwise(shards: Path, tmp_path: Path) -> None:
    validation = write_tar(tmp_path / "val" / "h.tar", members_of(range(100, 107)))
    common = {"val_data": str(validation), "val_every": 5, "picture_every": 10, "save_every": 3, "epochs": 3}

    def words(name: str) -> dict[str, str]:
        return flags(shards, tmp_path / name, **common) | {"sample_ledger": str(tmp_path / f"{name}-ledger")}

    done = launch(words("whole"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "predicting the mean face gives" in done.stdout

    killed = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(words("killed"), ranks=2, port=free_port()),
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 600  # the launcher and the ranks import torch anew: minutes where disks are slow
        while steps_done(killed) < 10 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        reached = steps_done(killed)
        os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", str(killed)], check=False)
        process.wait()
    assert (reached >= 10, process.returncode) == (True, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
    assert not (killed / "checkpoints" / "step-00000024").exists()
    resumed = launch(words("killed") | {"resume": "must"}, ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from" in resumed.stderr

    assert numbers(killed) == numbers(tmp_path / "whole")
    assert [row[0] for row in numbers(killed) if row[1] is not None] == list(range(1, 25))
    assert ledger(tmp_path / "killed-ledger") == ledger(tmp_path / "whole-ledger")
    rows = [json.loads(line) for lines in ledger(tmp_path / "whole-ledger").values() for line in lines]
    assert sorted(row["position"] for row in rows) == list(range(24 * 8))
    for epoch in range(3):
        keys = [row["key"] for row in rows if row["position"] // 64 == epoch]
        assert sorted(keys) == [f"face{i:04d}" for i in range(64)]
    _check_what_is_on_disk(killed)

    again = launch(words("killed"), ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert numbers(killed) == numbers(tmp_path / "whole")
    assert _val_line(again.stdout) == _val_line(resumed.stdout)


def _val_line(stdout: str) -> str:
    return next(line for line in stdout.splitlines() if "validation masked MSE" in line)


def _check_what_is_on_disk(output: Path) -> None:
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000018", "step-00000021", "step-00000024"]
    assert (output / "checkpoints" / "latest").read_text() == "step-00000024\n"
    assert not list((output / "checkpoints").rglob("*.py"))
    assert list((output / "logs").glob("*_training.log"))
    assert list((output / "tensorboard").glob("events.*"))
    assert json.loads((output / "recipe.json").read_text())["recipe"]["global_batch"] == 8
    with Image.open(output / "pictures" / "step-00000020.png") as picture:
        assert picture.size == (32 * 7, 32 * 3)
        assert np.asarray(picture).std() > 10


@pytest.mark.law
def test_sigterm_saves_and_asks_to_be_queued_again(shards: Path, tmp_path: Path) -> None:
    words = flags(shards, tmp_path / "out", epochs=200, save_every=100000)
    run = forks().start(ROOT / "launch" / "pretrain.py", argv_of(words), tmp_path / "log")
    run.until((tmp_path / "out" / "metrics.jsonl").exists)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGTERM)  # a scheduler signals every process, loader workers too
    assert run.wait(60) == 85, (tmp_path / "log").read_text()[-2000:]
    last = metrics(tmp_path / "out")[-1]["step"]
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"


@pytest.mark.law
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(shards: Path, tmp_path: Path) -> None:
    words = flags(shards, tmp_path / "out", save_every=2)
    assert launch(words | {"stop_at_step": "4"}).returncode == 0
    state = next((tmp_path / "out" / "checkpoints" / "step-00000004").rglob("*.pt"))
    with state.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    done = launch(words | {"stop_at_step": "6"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "altered or cut" in done.stderr
    assert "step-00000002" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_with_code_inside_is_not_executed(shards: Path, tmp_path: Path) -> None:
    words = flags(shards, tmp_path / "out", save_every=2)
    assert launch(words | {"stop_at_step": "2"}).returncode == 0
    folder = tmp_path / "out" / "checkpoints" / "step-00000002"
    state = next(folder.rglob("mp_rank_00_model_states.pt"))
    content = torch.load(state, weights_only=False)
    content["trap"] = _Trap(str(tmp_path / "sprung"))
    torch.save(content, state)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]  # whoever puts code there makes the rest fit
    entry = manifest["files"][state.relative_to(folder).as_posix()]
    entry["bytes"], entry["sha256"] = state.stat().st_size, hashlib.sha256(state.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = launch(words)
    assert done.returncode == 2
    assert "cannot be loaded safely" in done.stderr
    assert not (tmp_path / "sprung").exists()


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def with_bad_images(folder: Path, bad: set[int]) -> Path:
    members = members_of(range(64))
    for number in bad:
        members[2 * number] = (members[2 * number][0], b"<html>404</html>")
    write_tar(folder / "s.tar", members)
    return folder


@pytest.mark.law
def test_a_bad_image_is_counted_alike_on_every_world_size(tmp_path: Path) -> None:
    shards = with_bad_images(tmp_path / "shards", {5})
    counts = []
    for ranks in (1, 2):
        output = tmp_path / f"out{ranks}"
        done = launch(flags(shards, output, epochs=2, num_workers=2), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        counts.append([row.get("bad_samples_not_an_image", 0) for row in metrics(output)])
        board = EventAccumulator(str(output / "tensorboard"))
        board.Reload()
        assert board.Scalars("train/bad_samples_not_an_image")[-1].value == counts[-1][-1]
    assert counts[0] == counts[1]
    assert counts[0][-1] >= 2  # once an epoch, and wherever it was chosen as a substitute


def test_a_log_costs_one_gather_over_the_ranks(shards: Path, tmp_path: Path) -> None:
    """A gather is one all-gather of lengths and one of payloads. Nothing else in a run depends on how often it logs."""
    counts = {}
    for log_every in (1, 4):
        output, seen = tmp_path / f"out{log_every}", tmp_path / f"gathers{log_every}-"
        words = argv_of(flags(shards, output, epochs=1, log_every=log_every))
        program = tmp_path / "counting.py"
        program.write_text(
            f"""
import os, runpy, sys
import torch.distributed as dist
seen, all_gather = open({str(seen)!r} + os.environ["RANK"], "ab", buffering=0), dist.all_gather
dist.all_gather = lambda *given, **options: (seen.write(b"1"), all_gather(*given, **options))
sys.argv[1:] = {words}
runpy.run_path({str(ROOT / "launch" / "pretrain.py")!r}, run_name="__main__")"""
        )
        log = tmp_path / f"log{log_every}"
        assert forks().start(program, [], log, ranks=2).wait() == 0, log.read_text()[-3000:]
        [counts[log_every]] = {Path(f"{seen}{rank}").stat().st_size for rank in (0, 1)}
        assert [row["step"] for row in metrics(output)] == list(range(log_every, 9, log_every))
    assert counts[1] - counts[4] == 2 * (8 - 2)


def test_rotten_data_end_a_run_with_the_keys(tmp_path: Path) -> None:
    shards = with_bad_images(tmp_path / "shards", set(range(0, 64, 2)))
    done = launch(flags(shards, tmp_path / "out"))
    assert done.returncode == 2
    assert "max_bad_sample_share 0.001" in done.stderr
    assert "not_an_image" in done.stderr
    assert "face00" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cross_decoder_that_paints_a_third_trains_alike_on_one_rank_and_on_two(shards: Path, tmp_path: Path) -> None:
    config = json.loads((ROOT / "ds_configs" / "cpu_fp32.json").read_text())
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    cross = {"decoder_type": "cross", "predict_share": 0.34, "epochs": 1, "warmup_epochs": 0, "num_workers": 0}
    cross |= {"val_data": f"{shards}/s-002.tar"}
    one = launch(flags(shards, tmp_path / "one", **cross))
    two = launch(flags(shards, tmp_path / "two", **cross, ds_config=tmp_path / "zero3.json"), ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr[-2000:] + two.stderr[-2000:]
    rows = [[row for row in metrics(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-4)
    assert len(rows[0]) == 8
    assert "val_loss" in (tmp_path / "two" / "metrics.jsonl").read_text()
    refused = launch(flags(shards, tmp_path / "no", **(cross | {"decoder_type": "self"})))
    assert refused.returncode == 2
    assert "predict_share is 0.34, but needs decoder_type cross" in refused.stderr


def test_a_dry_run_tells_settings_steps_memory_and_cost_and_writes_no_output(shards: Path, tmp_path: Path) -> None:
    words = flags(shards, tmp_path / "out", max_steps=7) | {"dry_run": "true"}
    words.pop("epochs")
    done = launch(words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
    assert "\n  --mask_ratio 0.75\n" in done.stdout
    assert "\n  --max_steps 7\n" in done.stdout
    assert "Steps:  7 of 8 images (0.875 epochs), " in done.stdout
    assert "1 rank x 4 images x 2 accumulated" in done.stdout
    assert re.search(r"\nMemory: [\d.]+ GiB a rank at most", done.stdout)
    found = re.search(r"\nCost:   ([\d.e+-]+) GFLOP an image and step, ([\d.e+-]+) FLOP; about \d+:\d\d", done.stdout)
    assert found is not None, done.stdout
    assert float(found[2]) == pytest.approx(float(found[1]) * 1e9 * 8 * 7, rel=0.02)
