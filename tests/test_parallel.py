"""Pools of processes."""

import os

import pytest

from trainer.parallel import parallel_map


@pytest.mark.parametrize("chosen", [None, "3"])
def test_each_process_of_a_pool_computes_with_one_thread_unless_the_user_chose(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    assert list(parallel_map(os.getenv, names, num_processes=2)) == [chosen or "1", "1"]
    assert [os.environ.get(name) for name in names] == [chosen, None]
