import multiprocessing
from typing import Any

import pytest

from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.world import World, check_devices, world_from_environment


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


def _talk(rank: int, port: int, answers: Any) -> None:
    import os

    from trainer.engine import connect, disconnect

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


@pytest.mark.slow
@pytest.mark.ranks
def test_decisions_and_errors_of_one_rank_are_everyones() -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_talk, args=(rank, 29750, answers)) for rank in range(2)]
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
