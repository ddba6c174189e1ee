"""How far work has come: a bar in a terminal, a plain line now and then in a log.

A bar redraws one line; in a file that is a line of thousands of characters.
"""

import os
import sys
import time
from types import TracebackType
from typing import Any

_FIRST_S, _EVERY_S = 5.0, 30.0
"""When a log gets its first line, and after that each next one."""


class Progress:
    """Counts what is done of ``total`` and shows it on stderr; short work shows nothing."""

    def __init__(self, total: int, *, unit: str, what: str = "", initial: int = 0, shown: bool = True) -> None:
        """Begin to count.

        Args:
            total: when the work is done.
            unit: what is counted, in the singular.
            what: what is done.
            initial: what was done before.
            shown: show anything at all.
        """
        self.done = initial
        self._total, self._unit, self._what, self._notes = total, unit, what, ""
        self._first, self._start_s = initial, time.monotonic()
        self._next_s = self._start_s + _FIRST_S
        self._bar: Any = None
        self._writes = shown and not sys.stderr.isatty()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm  # a bar is drawn in a terminal only

            delay = 0.5  # what is done before that needs no bar
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                desc=what or None,
                dynamic_ncols=True,
                smoothing=0.05,
                delay=delay,
            )

    def update(self, count: int = 1) -> None:
        """Count some more."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._writes and time.monotonic() >= self._next_s:
            self._write()

    def note(self, **values: str) -> None:
        """Show these beside the count from now on."""
        self._notes = "".join(f", {name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Show how far it came."""
        if self._bar is not None:
            self._bar.close()
        elif self._writes and self._next_s > self._start_s + _FIRST_S:  # it has written before
            self._write()
        self._writes = False

    def _write(self) -> None:
        from tqdm import tqdm

        now = time.monotonic()
        self._next_s = now + _EVERY_S
        rate = (self.done - self._first) / max(now - self._start_s, 1e-9)
        left = (
            f", {tqdm.format_interval((self._total - self.done) / rate)} left"
            if rate and self.done < self._total
            else ""
        )
        pace = f"{rate:.3g} {self._unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s a {self._unit}"
        share = f" ({self.done / self._total:.0%})" if self._total else ""
        what = f"{self._what}: " if self._what else ""
        said = f"{what}{self._unit} {self.done} of {self._total}{share}, {pace}{left}{self._notes}"
        print(said, file=sys.stderr, flush=True)  # a bar is no log either

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writes = False  # a log has the reason instead
        self.close()


def say(text: str) -> None:
    """Say at once, on one rank, what begins: a start takes many seconds, and silence looks like a hang."""
    if is_main():
        print(f"{text} ...", file=sys.stderr, flush=True)


def is_main() -> bool:
    """Whether this is the one rank that talks to the user; true without ranks."""
    return os.environ.get("RANK", "0") == "0"
