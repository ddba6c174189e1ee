"""Mutated manifests, configurations and command lines end in an error with one readable message, or are accepted.

The long form of `make faults` sets TRAINER_MUTANTS: so many of each.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.ds_configs import OWNED
from trainer.config.command_line import configure
from trainer.config.recipes import FINETUNING, PRETRAINING
from trainer.data.order.mixture import read_sources
from trainer.distributed.ds_config import fill_ds_config, read_ds_config
from trainer.distributed.world import World
from trainer.errors import ConfigError, TrainerError
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import acquire
from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver

MUTANTS = settings(
    max_examples=int(os.environ.get("TRAINER_MUTANTS", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def mutated(data: st.DataObject, value: Any) -> Any:
    """Replace, drop or add something somewhere in a JSON value."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        name = data.draw(st.sampled_from(sorted(value)))
        how = data.draw(st.sampled_from(["into", "into", "drop", "rename"]))
        rest = {key: entry for key, entry in value.items() if key != name}
        if how == "drop":
            return rest
        if how == "rename":
            return rest | {data.draw(st.text(max_size=10)): value[name]}
        return value | {name: mutated(data, value[name])}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        return [mutated(data, value[0]), *value[1:]]
    return data.draw(JSON)


def cut_or_flipped(data: st.DataObject, text: str) -> bytes:
    """Damage the bytes of a file as a disk does."""
    payload = bytearray(text.encode())
    if data.draw(st.booleans()):
        return bytes(payload[: data.draw(st.integers(0, len(payload)))])
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(payload)


def readable(error: TrainerError) -> None:
    assert len(str(error)) < 2000, error
    assert "Traceback" not in str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    identity = Identity({"global_batch": 8, "seed": 0}, "abc", "", 1, 1, "fp32", 1)

    def write(folder: Path) -> list[Path]:
        (folder / "weights").write_bytes(b"12345678")
        return [folder / "weights"]

    lease = acquire(output, num_ranks=1)
    Saver(output / "checkpoints", identity, {}, lease=lease, world=World(), keep=3).save(
        Progress(8), lambda copy: write
    )
    return output / "checkpoints" / "step-00000008"


@MUTANTS
@given(st.data())
def test_a_mutated_manifest_is_refused_or_says_the_same(saved: Path, data: st.DataObject) -> None:
    path = saved / "manifest.json"
    right = path.read_text()
    try:
        if data.draw(st.booleans()):
            path.write_text(json.dumps(mutated(data, json.loads(right))))
        else:
            path.write_bytes(cut_or_flipped(data, right))
        try:
            manifest = checkpoint.verify(saved)
            current = Identity(**json.loads(right)["identity"])
            progress = checkpoint.check_identity(manifest, current, saved)
            assert progress.step == progress.data_step == manifest["progress"]["step"]
        except TrainerError as error:
            readable(error)
    finally:
        path.write_text(right)


@MUTANTS
@given(st.data())
def test_a_mutated_ds_config_is_refused_or_filled(data: st.DataObject) -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
    right = data.draw(st.sampled_from(files)).read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ds.json")
        if data.draw(st.booleans()):
            path.write_text(json.dumps(mutated(data, json.loads(right))))
        else:
            path.write_bytes(cut_or_flipped(data, right))
        try:
            filled = fill_ds_config(read_ds_config(path), OWNED)
            assert filled["train_batch_size"] == 8
        except ConfigError as error:
            readable(error)


NAMES = [
    "mask_ratio",
    "seed",
    "epochs",
    "data",
    "resume",
    "lora_target_modules",
    "class_weights",
    "model",
    "recipe",
    "x",
]
WORDS = st.one_of(
    st.sampled_from(NAMES).map(lambda name: f"--{name}"),
    st.tuples(st.sampled_from(NAMES), st.text(max_size=8)).map("--{0[0]}={0[1]}".format),
    st.tuples(st.sampled_from(NAMES), st.text(max_size=8)).map("--override={0[0]}={0[1]}".format),
    st.sampled_from(["--override", "--", "-", "--=", "0", "1e400", "[1,2]", "none", "true", "--local_rank=0"]),
    st.text(max_size=12),
)


@MUTANTS
@given(st.lists(WORDS, max_size=6), st.booleans())
def test_any_command_line_is_refused_or_configured(words: list[str], detector: bool) -> None:
    try:
        configure(words, FINETUNING if detector else PRETRAINING)
    except ConfigError as error:
        readable(error)


@MUTANTS
@given(st.text(alphabet="ab*?[]{}.,@:/0123456789-~$|% ", max_size=24))
def test_any_list_of_shards_is_refused_or_found(text: str) -> None:
    try:
        read_sources(text.replace("/", ""), setting="--data")  # the machine's own folders are not walked
    except TrainerError as error:
        readable(error)
