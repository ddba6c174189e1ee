"""Only the newest attempt changes a run's output, whatever an older one was doing when it was overtaken."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.runs import environment
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError, SupersededError
from trainer.fault_tolerance.attempts import Lease, acquire, check_crash_loop
from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver

IDENTITY = Identity({"global_batch": 8, "seed": 0}, "abc", "", 1, 1, "fp32", 1)


def test_attempts_are_numbered_and_the_newest_alone_may_write(tmp_path: Path) -> None:
    old = acquire(tmp_path, num_ranks=1)
    old.write(tmp_path / "file", "old")
    new = acquire(tmp_path, num_ranks=1)
    assert (old.number, new.number) == (1, 2)
    new.check()
    for act in (old.check, lambda: old.write(tmp_path / "file", "again"), lambda: old.discard(tmp_path / "file")):
        with pytest.raises(SupersededError, match="attempt 2 has taken over"):
            act()
    assert (tmp_path / "file").read_text() == "old"
    new.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("moment", ["before the draft", "while writing", "before the rename", "before latest"])
def test_an_overtaken_save_commits_nothing(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = acquire(tmp_path, num_ranks=1)
    saver = Saver(tmp_path / "checkpoints", IDENTITY, {}, lease=old, world=World(), keep=3)

    def write(folder: Path) -> list[Path]:
        if moment == "while writing":
            acquire(tmp_path, num_ranks=1)
        path = folder / "weights"
        path.write_bytes(b"old")
        return [path]

    def overtaken(act: Callable[..., None]) -> Callable[..., None]:
        def overtake_first(self: Lease, *words: object) -> None:
            acquire(tmp_path, num_ranks=1)
            act(self, *words)

        return overtake_first

    saver.save(Progress(1), lambda copy: write) if moment != "while writing" else None
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    if moment == "before the draft":
        acquire(tmp_path, num_ranks=1)
    elif moment == "before the rename":
        monkeypatch.setattr(Lease, "move", overtaken(Lease.move))
    elif moment == "before latest":
        monkeypatch.setattr(Lease, "write", overtaken(Lease.write))
    with pytest.raises(SupersededError):
        saver.save(Progress(2), lambda copy: write)
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    if moment == "before latest":  # the commit came first; what is there is whole
        after = {path: payload for path, payload in after.items() if "step-00000002" not in str(path)}
    assert after == before


def test_what_an_overtaken_process_appends_goes_nowhere(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a")
    with (tmp_path / "events").open("a") as events:
        old = acquire(tmp_path, num_ranks=1)
        with old.append_to(tmp_path / "rows", "1\n") as rows:
            new = acquire(tmp_path, num_ranks=1)
            new.detach(tmp_path / "events")
            with new.append_to(tmp_path / "rows", (tmp_path / "rows").read_text()) as more:
                for file, text in ((rows, "old\n"), (more, "2\n"), (events, "old"), (rows, "old\n")):
                    file.write(text)
                    file.flush()
    assert (tmp_path / "rows").read_text() == "1\n2\n"
    assert (tmp_path / "events").read_text() == "a"
    with pytest.raises(SupersededError):
        old.append_to(tmp_path / "rows", "")
    assert (tmp_path / "rows").read_text() == "1\n2\n"


def test_starts_at_the_same_moment_get_different_numbers_and_one_survives(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from trainer.fault_tolerance.attempts import acquire; sys.stdin.read();"
        "print(acquire(Path(sys.argv[1]), num_ranks=1).folder)"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    starts = [
        subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(lambda start: start.communicate("")[0].strip(), starts))
    assert sorted(int(Path(folder).name) for folder in folders) == [1, 2, 3, 4, 5, 6]
    alive = [folder for folder in folders if (Path(folder) / "drafts").is_dir()]
    assert [int(Path(folder).name) for folder in alive] == [6]


def attempt(output: Path, step: int, end: str = "") -> Lease:
    lease = acquire(output, num_ranks=1)
    lease.began(step)
    if end:
        lease.ended(end)
    return lease


def test_a_run_that_dies_at_the_same_step_again_and_again_is_stopped(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "stopped by a signal")
    attempt(tmp_path, 8)
    attempt(tmp_path, 8, "refused: a typing error")
    attempt(tmp_path, 8)
    acquire(tmp_path, num_ranks=1)  # killed before it had begun
    now = acquire(tmp_path, num_ranks=1)
    check_crash_loop(now, 8, limit=4)
    check_crash_loop(now, 8, limit=0)
    with pytest.raises(ConfigError, match=r"max_restarts is 3, and attempts 2 to 5 all began at step 8"):
        check_crash_loop(now, 8, limit=3)
    now.began(8)
    check_crash_loop(acquire(tmp_path, num_ranks=1), 12, limit=1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("a file")
    with pytest.raises(CheckpointError, match="attempts cannot be written"):
        acquire(tmp_path, num_ranks=1)


def test_drafts_are_private_to_an_attempt(tmp_path: Path) -> None:
    lease = acquire(tmp_path, num_ranks=1)
    assert lease.draft("x") != lease.draft("x")
    assert os.listdir(lease.folder / "drafts") == []  # noqa: PTH208  (names only)
