"""Progress of long work: a bar in a terminal, a plain line from time to time in a log.

A bar redraws one line; in a file that would be a line of thousands of characters.
"""

import os
import sys
import time
from types import TracebackType
from typing import Any

_FIRST_LINE_S, _LINE_INTERVAL_S = 5.0, 30.0
"""Time until the first line of a log, and between the following ones."""


class Progress:
    """Counts units of work up to ``total`` and shows them on stderr; short work shows nothing."""

    def __init__(self, total: int, *, unit: str, what: str = "", initial: int = 0, shown: bool = True) -> None:
        """Start to count.

        Args:
            total: units of the whole work.
            unit: name of a unit, in the singular.
            what: name of the work.
            initial: units that were done before.
            shown: False shows nothing.
        """
        self.done = initial
        self._total, self._unit, self._what, self._notes = total, unit, what, ""
        self._first, self._start_s = initial, time.monotonic()
        self._next_s = self._start_s + _FIRST_LINE_S
        self._bar: Any = None
        self._writes = shown and not sys.stderr.isatty()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm  # a bar is drawn in a terminal only

            delay = 0.5  # shorter work needs no bar
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
        """Add ``count`` units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._writes and time.monotonic() >= self._next_s:
            self._write()

    def note(self, **values: str) -> None:
        """Show these values beside the count from now on."""
        self._notes = "".join(f", {name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Close the bar, or write the last line of a log."""
        if self._bar is not None:
            self._bar.close()
        elif self._writes and self._next_s > self._start_s + _FIRST_LINE_S:  # it has written a line before
            self._write()
        self._writes = False

    def _write(self) -> None:
        from tqdm import tqdm

        now = time.monotonic()
        self._next_s = now + _LINE_INTERVAL_S
        rate = (self.done - self._first) / max(now - self._start_s, 1e-9)
        left = (
            f", {tqdm.format_interval((self._total - self.done) / rate)} left"
            if rate and self.done < self._total
            else ""
        )
        pace = f"{rate:.3g} {self._unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s a {self._unit}"
        share = f" ({self.done / self._total:.0%})" if self._total else ""
        what = f"{self._what}: " if self._what else ""
        line = f"{what}{self._unit} {self.done} of {self._total}{share}, {pace}{left}{self._notes}"
        print(line, file=sys.stderr, flush=True)  # like a bar, not through logging

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writes = False  # the log gets the error instead
        self.close()


def announce(text: str) -> None:
    """Print on the main rank what begins now: a start takes many seconds, and silence looks like a hang."""
    if is_main():
        print(f"{text} ...", file=sys.stderr, flush=True)


def is_main() -> bool:
    """Whether this is the rank that prints; true without ranks."""
    return os.environ.get("RANK", "0") == "0"
