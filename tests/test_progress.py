import io
import sys
import time

import pytest
import tqdm

from trainer.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(total: int, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, shown: bool = True) -> str:
    """Do so many pieces of work, of a second each by the clock."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total, unit="step", initial=10, shown=shown) as bar:
        for _ in range(total - 10):
            now[0] += 1.0
            bar.update()
            bar.note(loss="0.5")
    return stream.getvalue()


def test_a_log_gets_a_plain_short_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = work(110, monkeypatch, io.StringIO()).splitlines()
    assert lines[0] == "step 15 of 110 (14%), 1 steps/s, 01:35 left, loss 0.5"
    assert lines[-1] == "step 110 of 110 (100%), 1 steps/s, loss 0.5"
    assert len(lines) == 2 + (100 - 5) // 30
    assert all("\r" not in line and len(line) < 100 for line in lines)


def test_short_work_and_hidden_work_write_nothing_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(14, monkeypatch, io.StringIO()) == ""
    assert work(110, monkeypatch, io.StringIO(), shown=False) == ""


def test_a_terminal_gets_a_bar_that_redraws_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: real(**(options | {"file": terminal, "delay": 0})))
    with Progress(3, unit="step", what="indexing") as bar:
        bar.update(3)
        assert bar.done == 3
    assert "\rindexing: 100%" in terminal.getvalue()
