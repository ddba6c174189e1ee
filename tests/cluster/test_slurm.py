"""Jobs on a real SLURM, asked to make room, preempted, killed and cut off, go on to the exact sample."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.helpers.cluster import Lab, consumed, flags_of, num_steps, wait_for
from tests.helpers.runs import argv_of, metrics

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.slurm]


def submit(cluster: Lab, flags: dict[str, str], *, nodes: int, **more: str) -> str:
    """Submit with tools/submit.py from the login node; returns the job's number."""
    words = ["--nodes", str(nodes), "--gpus", "1", "--cpus", "1", "--time", "00:30:00", *argv_of(flags)]
    told = cluster.slurm("python", "tools/submit.py", *words, **more)
    return told.splitlines()[-1].split()[0]


def state(cluster: Lab, job: str) -> dict[str, str]:
    told = cluster.slurm("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", told))


def log_of(output: Path) -> str:
    return "".join(path.read_text() for path in (output / "logs").glob("slurm-*.log"))


def controller_log(cluster: Lab) -> str:
    return (
        cluster.slurm("squeue")
        + cluster.slurm("sinfo", "-N")
        + (cluster.folder / "slurm/log/slurmctld.log").read_text()[-5000:]
    )


def wait_for_steps(output: Path, steps: int) -> None:
    wait_for(lambda: num_steps(output) >= steps, lambda: log_of(output)[-5000:])


def ledger(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(Path(f"{output}-ledger").iterdir())}


def losses(output: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in metrics(output)]


def attempts(output: Path) -> list[str]:
    """How each attempt ended; None for those that were killed."""
    ends = [path / "end.json" for path in sorted((output / "attempts").iterdir()) if path.name.isdecimal()]
    return [json.loads(end.read_text())["end"] if end.exists() else None for end in ends]


def test_a_job_interrupted_three_times_consumes_what_an_undisturbed_one_does(
    cluster: Lab, shards: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    steps = 500  # it must last longer than the 30 s after which SLURM looks at time limits again
    job = submit(cluster, flags_of(shards, output, steps), nodes=2)

    wait_for_steps(output, 5)
    began = time.monotonic()
    cluster.slurm(
        "scontrol", "update", f"JobId={job}", "TimeLimit=8"
    )  # so that SLURM's signal 10 minutes before is due
    wait_for(lambda: state(cluster, job)["Restarts"] == "1", lambda: log_of(output)[-3000:])
    cluster.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    asked_s = time.monotonic() - began
    assert "asking the ranks to save" in log_of(output)

    done = num_steps(output)
    wait_for_steps(output, done + 10)
    urgent = cluster.slurm(
        "sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    wait_for(lambda: state(cluster, job)["Restarts"] == "2", lambda: log_of(output)[-3000:])
    wait_for(lambda: state(cluster, urgent.strip())["JobState"] == "COMPLETED", lambda: cluster.slurm("squeue"))

    done = num_steps(output)
    wait_for_steps(output, done + 10)
    cluster.on("hostb", "pkill", "-KILL", "-f", "launch/pretrain.py")
    wait_for(lambda: state(cluster, job)["Restarts"] == "3", lambda: log_of(output)[-3000:])
    wait_for(lambda: state(cluster, job)["JobState"] not in "PENDING RUNNING", lambda: log_of(output)[-5000:], 240)

    assert state(cluster, job)["JobState"] == "COMPLETED", log_of(output)[-3000:]
    assert attempts(output) == ["stopped by a signal", "stopped by a signal", None, "finished"]
    assert len(re.findall(r"=== .* attempt \d: 2 ranks on hosta,hostb", log_of(output))) == 4
    assert log_of(output).count("rendezvous    2 ranks on 2 hosts") == 4  # the doctor was there each time
    assert list((output / "tensorboard").glob("events*"))
    whole_job = submit(cluster, flags_of(shards, whole, steps), nodes=2, TRAINER_DOCTOR="0")
    wait_for(lambda: state(cluster, whole_job)["JobState"] == "COMPLETED", lambda: log_of(whole)[-3000:])
    assert ledger(output) == ledger(whole)
    assert losses(output) == losses(whole)
    print(
        f"from the shorter time limit, which SLURM looks at every 30 s, to the job back in the queue: {asked_s:.1f} s"
    )


def test_a_job_whose_budget_of_restarts_is_spent_fails(cluster: Lab, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    once = {"TRAINER_DOCTOR": "0", "TRAINER_MAX_REQUEUES": "0"}
    job = submit(cluster, flags_of(shards, output, 100_000), nodes=1, **once)
    wait_for_steps(output, 2)
    cluster.on(state(cluster, job)["NodeList"], "pkill", "-KILL", "-f", "launch/pretrain.py")
    wait_for(lambda: state(cluster, job)["JobState"] == "FAILED", lambda: log_of(output)[-3000:])
    assert "not queued again: TRAINER_MAX_REQUEUES is 0" in log_of(output)
    assert state(cluster, job)["Restarts"] == "0"


def test_a_sweep_is_a_job_array_with_a_run_for_each_value(cluster: Lab, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = flags_of(shards, output, 2)
    words = ["--nodes", "1", "--gpus", "1", "--cpus", "1", "--sweep", "mask_ratio 0.5 0.75", *argv_of(flags)]
    del words[words.index("--sample_ledger") : words.index("--sample_ledger") + 2]
    job = cluster.slurm("python", "tools/submit.py", *words, TRAINER_DOCTOR="0").splitlines()[-1].split()[0]
    wait_for(lambda: not cluster.slurm("squeue", "-h", "-j", job), lambda: cluster.slurm("squeue"))
    for value in (0.5, 0.75):
        run = output / f"mask_ratio-{value}"
        assert json.loads((run / "recipe.json").read_text())["recipe"]["mask_ratio"] == value
        assert attempts(run) == ["finished"]


def test_what_cannot_run_is_refused_before_the_queue_or_in_the_first_minute(
    cluster: Lab, shards: Path, tmp_path: Path
) -> None:
    flags = flags_of(shards, tmp_path / "out", 2)
    for nodes, gpus, more, message in (
        (4, 1, {"micro_batch": "2"}, "SLURM refuses the job"),
        (1, 3, {"global_batch": "9", "micro_batch": "3"}, "SLURM refuses the job"),  # a node has two
        (2, 2, {}, "global_batch is 8, but must be divisible by ranks x micro_batch = 4 x 4: start 1 or 2 ranks"),
        (1, 1, {"mask_ratoi": "0.5"}, "unknown setting --mask_ratoi: did you mean --mask_ratio"),
    ):
        words = ["--nodes", str(nodes), "--gpus", str(gpus), "--cpus", "1", *argv_of(flags | more)]
        assert message in cluster.slurm("python", "tools/submit.py", *words, code=2)
    job = submit(cluster, flags | {"data": str(tmp_path / "nowhere" / "*.tar")}, nodes=1)
    wait_for(lambda: state(cluster, job)["JobState"] == "FAILED", lambda: log_of(tmp_path / "out"), 60)
    assert state(cluster, job)["ExitCode"] == "2:0"
    assert "nowhere" in log_of(tmp_path / "out")
    assert state(cluster, job)["Restarts"] == "0"
    job = submit(
        cluster, flags | {"resume": "must"}, nodes=2, TRAINER_DOCTOR="0"
    )  # found by the training, on all ranks
    wait_for(lambda: state(cluster, job)["JobState"] == "FAILED", lambda: log_of(tmp_path / "out"), 60)
    assert state(cluster, job)["ExitCode"] == "2:0"
    assert "resume is must" in log_of(tmp_path / "out")
    assert state(cluster, job)["Restarts"] == "0"


def test_a_node_that_is_cut_off_is_replaced_and_its_rank_ends_itself(
    cluster: Lab, shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = submit(cluster, flags_of(shards, output, 100_000, global_batch="8"), nodes=1, TRAINER_DOCTOR="0")
    wait_for_steps(output, 20)
    assert state(cluster, job)["NodeList"] == "hosta"
    cluster("cut", "hosta")
    try:
        wait_for(lambda: "attempt 2: 1 ranks on hostb" in log_of(output), lambda: cluster.slurm("sinfo"))
        last_words = "attempt 1 ends: attempt 2 has taken over"
        wait_for(lambda: last_words in log_of(output), lambda: log_of(output)[-3000:])  # while the cable is still out
        # srun on the cut host says how its rank ended some time after the rank's own last words.
        ended = "task 0: Exited with exit code 87"
        wait_for(lambda: ended in log_of(output), lambda: log_of(output)[-3000:])
        done = num_steps(output)
        wait_for_steps(output, done + 10)
    finally:
        cluster("heal", "hosta")
    # Back on the network, the old srun may end "its" step 0, which is the newer attempt's: that one then saves and is
    # queued again. So this is the last test: SLURM may take its time until both nodes are free.
    cluster.slurm("scancel", job)
    wait_for(lambda: state(cluster, job)["JobState"] == "CANCELLED", lambda: controller_log(cluster))
    wait_for(lambda: attempts(output)[-1] is not None, lambda: log_of(output)[-3000:])
    assert attempts(output)[0] is None
    assert set(attempts(output)[1:]) == {"stopped by a signal"}
    steps = [row["step"] for row in metrics(output)]
    assert steps == list(range(1, len(steps) + 1))
    assert consumed(output) == list(range(8 * len(steps)))
