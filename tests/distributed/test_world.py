import contextlib
import io
import multiprocessing
import os
import re
import signal
import socket
import time
from typing import Any

import pytest

from tests.helpers.runs import free_port
from trainer.distributed.devices import check_devices
from trainer.distributed.rendezvous import rendezvous
from trainer.distributed.world import World, world_from_environment
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.fault_tolerance.exit_codes import EXIT_USER_ERROR, explain


def test_the_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(5, 8, 1, 4)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK is 'first'"):
        world_from_environment()


def test_more_ranks_than_devices_are_refused_with_the_fitting_number() -> None:
    with pytest.raises(ConfigError, match="--num_gpus 2"):
        check_devices(World(0, 4, 0, 4), 2, "cuda", oversubscribe=True)
    with pytest.raises(ConfigError, match="--oversubscribe true"):
        check_devices(World(0, 4, 0, 4), 2, "cpu", oversubscribe=False)
    check_devices(World(0, 4, 0, 4), 2, "cpu", oversubscribe=True)
    with pytest.raises(ConfigError, match=r"shows no GPU.*DS_ACCELERATOR=cpu"):
        check_devices(World(), 0, "cuda", oversubscribe=False)


BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("variables", "starter"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun"),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, "srun"),
        (BATCH | {"SLURM_PROCID": "3"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "4"}, "mpirun"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ""),
        (BATCH, ""),  # the shell of salloc
        (BATCH | {"SLURM_PROCID": "0"}, ""),  # the script of a batch job
        (BATCH | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),  # srun --ntasks 1
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ],
)
def test_several_processes_that_know_nothing_of_each_other_do_not_train(
    variables: dict[str, str], starter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not starter:
        assert world_from_environment() == World()
        return
    with pytest.raises(ConfigError, match=f"^{starter} has started .* launch/slurm"):
        world_from_environment()


def _talk(rank: int, port: int, answers: Any) -> None:
    from trainer.distributed.engine import connect, disconnect

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    world = connect(World(rank, 2, rank, 2), timeout_s=60)
    heard: dict[str, Any] = {
        "any": world.any_over_ranks(rank == 1),
        "gathered": world.gather_over_ranks({"rank": rank, "text": "é" * (rank + 1)}),
        "main": world.on_main(lambda: [rank, "decided"]),
    }

    def refuse() -> None:
        raise CheckpointError("damaged: remove it")

    for name, attempt in (("on_main", world.on_main), ("together", world.together)):
        try:
            attempt(refuse if rank == 0 or name == "on_main" else lambda: None)
        except CheckpointError as error:
            heard[name] = str(error)
    answers.put((rank, heard))
    disconnect()


def _join(rank: int, size: int, port: int, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        store = rendezvous(World(rank, size), timeout_s=6)
        answers.put((rank, "joined"))
        store.wait([f"read/{other}" for other in range(size)])
    except ConfigError as error:
        answers.put((rank, str(error)))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ([0, 1, 2], "joined"),
        ([0, 2], r"rank 1, 3-4 of 5 did not join at 127.0.0.1:\d+ within 6 s; joined: .* \(rank 0, 2\)"),
        ([1], r"rank 1 on .* cannot reach rank 0 at 127.0.0.1:\d+ within 6 s"),
    ],
)
def test_missing_ranks_are_named_on_every_rank_that_joined(started: list[int], expected: str) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    size, port = (3 if expected == "joined" else 5), free_port()
    ranks = [context.Process(target=_join, args=(rank, size, port, answers)) for rank in started]
    for process in ranks:
        process.start()
    outcomes = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert sorted(outcomes) == started
    assert all(re.match(expected, text) for text in outcomes.values()), outcomes


def _refuse(rank: int, port: int, with_main: bool, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    rendezvous(World(rank, 2), timeout_s=30)
    began = time.monotonic()
    if rank == 0 and not with_main:
        time.sleep(1)  # while the other waits
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        code = explain(ConfigError("no such recipe"))
    answers.put((code, time.monotonic() - began, shown.getvalue()))


@pytest.mark.ranks
@pytest.mark.parametrize("with_main", [True, False])
def test_a_refusal_of_all_ranks_is_shown_once_and_nobody_waits_for_a_main_rank_that_has_left(with_main: bool) -> None:
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=_refuse, args=(rank, port, with_main, answers)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    ends = [answers.get(timeout=60) for _ in range(1 + with_main)]
    assert {code for code, _, _ in ends} == {EXIT_USER_ERROR}
    assert max(seconds for _, seconds, _ in ends) < 5
    assert "".join(shown for _, _, shown in ends) == "\nerror: no such recipe\n"
    for process in ranks:
        process.join(60)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"port {port} is taken on .* --master_port {port + 1}"):
            rendezvous(World(0, 2), timeout_s=5)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match="MASTER_ADDR is empty"):
        rendezvous(World(0, 2), timeout_s=5)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
def test_decisions_and_errors_of_one_rank_are_everyones() -> None:
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=_talk, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    heard = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert heard[0] == heard[1]
    assert heard[0] == {
        "any": True,
        "gathered": [{"rank": 0, "text": "é"}, {"rank": 1, "text": "éé"}],
        "main": [0, "decided"],
        "on_main": "damaged: remove it",
        "together": "damaged: remove it",
    }


def test_a_world_of_one_needs_no_group() -> None:
    world = World()
    assert world.is_main
    assert world.any_over_ranks(True)
    assert world.on_main(lambda: 3) == 3
    with pytest.raises(DataError):
        world.together(lambda: (_ for _ in ()).throw(DataError("x: y")))
