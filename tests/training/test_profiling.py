"""Traces of some steps: a file that viewers of Chrome traces open, with the steps and phases by name."""

import gzip
import json
from pathlib import Path

import pytest

from tests.helpers.runs import TINY, launch, metrics
from tests.helpers.states import last_state
from trainer.config.settings import PretrainRuntime
from trainer.errors import ConfigError

WORDS = TINY | {"global_batch": "8", "micro_batch": "4", "epochs": "1"}


@pytest.mark.slow
@pytest.mark.ranks
def test_the_trace_names_the_steps_and_their_phases_and_the_training_stays(shards: Path, tmp_path: Path) -> None:
    common = WORDS | {"data": f"{shards}/*.tar"}
    traced = tmp_path / "traced"
    done = launch(common | {"output_dir": str(traced), "profile_steps": "3:4"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert launch(common | {"output_dir": str(tmp_path / "plain")}).returncode == 0
    rows, plain = metrics(traced), metrics(tmp_path / "plain")
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in plain]
    assert last_state(traced) == last_state(tmp_path / "plain")

    with gzip.open(traced / "profile" / "rank-0-steps-3-4.pt.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if str(e["name"]).startswith("training step")}
    assert list(spans) == ["training step 3", "training step 4"]
    assert spans["training step 3"][1] <= spans["training step 4"][0]
    for name, count in (("wait for data", 2), ("forward", 4), ("backward", 4), ("optimizer step", 4)):
        found = [e for e in events if e["name"] == name and e.get("cat") == "user_annotation"]
        assert len(found) == count, f"{name}: two steps of two micro batches"
        inside = [any(a <= e["ts"] and e["ts"] + e["dur"] <= b + 1 for a, b in spans.values()) for e in found]
        assert all(inside), name
    assert any(e["name"] == "aten::addmm" for e in events)
    assert "aten::addmm" in (traced / "profile" / "rank-0-steps-3-4.txt").read_text()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_trace_goes_to_the_last_step_and_steps_beyond_it_are_refused(shards: Path, tmp_path: Path) -> None:
    common = WORDS | {"data": f"{shards}/*.tar", "output_dir": str(tmp_path / "out")}
    done = launch(common | {"profile_steps": "9:10"})
    assert done.returncode == 2
    assert "profile_steps is 9:10, but the schedule ends at step 8" in done.stderr
    done = launch(common | {"profile_steps": "8:20"}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in sorted((tmp_path / "out" / "profile").iterdir())] == [
        "rank-0-steps-8-20.pt.trace.json.gz",
        "rank-0-steps-8-20.txt",
    ]


@pytest.mark.parametrize("text", ["5", "a:b", "0:3", "4:3", "1:101", "-1:2", "1:2:3", " "])
def test_only_a_short_range_of_steps_can_be_traced(text: str) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps is .*, but must be FIRST:LAST"):
        PretrainRuntime(profile_steps=text)


def test_a_trace_behind_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"begins behind stop_at_step \(4\)"):
        PretrainRuntime(profile_steps="5:6", stop_at_step=4)
    assert PretrainRuntime(profile_steps="4:6", stop_at_step=4).profiled_steps == (4, 6)
