"""The guardian of one rank: a small process that sees the rank hang or die, says which rank is to blame, ends the rest.

`watchdog` starts it beside each rank as ``python -I -S watchdog_process.py SETTINGS``. It needs the standard library
only, and it is a process of its own because a stopped or wedged rank can do nothing for itself. The rank writes marks
(step and phase) into shared memory; the guardian reads them twice a second and

* writes OUTPUT/logs/heartbeats/rank-00003.json, which tells the other guardians where this rank stands;
* when a phase outlasts its limit, or the rank is gone without having said so, names the culprit once for the whole job
  in OUTPUT/logs/[attempt]_watchdog.txt and on stderr;
* when that file exists, whoever wrote it, keeps the stacks of its rank in OUTPUT/logs/stacks and kills the rank. A
  launcher that hangs with a stopped rank would not.

Killing never waits for a file: whatever touches the output folder runs in a thread that may hang with the storage.
"""

import contextlib
import enum
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

TICK_S = 0.5
PHASE_RECORD = struct.Struct("=QQQ")
"""What a rank tells: number of the mark, step, phase."""
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write its Python stacks (`faulthandler`); schedulers that send it on their own do no harm."""

_SETTLE_S = 1.0
"""How long the others get for their last words before the culprit is named."""
_FOREIGN_SLEEP_S = 4 * TICK_S
_NAMED_RANKS = 8
_FOUND_ON = "  found on "
_SILENT_BEATS = 5


class Phase(enum.IntEnum):
    """Where a rank stands within a step, in the order of the loop; the last three lead out of the run."""

    STARTING = 0
    DATA = 1
    STEP = 2
    MEASURING = 3
    DRAWING = 4
    SAVING = 5
    LEAVING = 6
    FAILED = 7
    LOST = 8


WORDS = {
    Phase.STARTING: "starting",
    Phase.DATA: "waiting for data",
    Phase.STEP: "computing the step and its collectives",
    Phase.MEASURING: "measuring",
    Phase.DRAWING: "drawing pictures",
    Phase.SAVING: "saving",
    Phase.LEAVING: "leaving",
    Phase.FAILED: "ending after an error of its own, which it reports itself",
    Phase.LOST: "leaving because it lost another rank",
}
_STATES = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "blocked in the kernel (storage or driver)"}

Beat = dict[str, Any]


def beat_interval_s(num_ranks: int) -> float:
    """Return the seconds between heartbeats: up to a thousand ranks write at most 50 small files a second together."""
    return min(max(2.0, num_ranks / 50), 20.0)


def grace_s(num_ranks: int) -> float:
    """Return the seconds from naming the culprit to killing: every guardian looks, keeps stacks, and then kills."""
    return 2 * beat_interval_s(num_ranks) + 1


def state_of(pid: int) -> str:
    """Return the kernel's letter for the state of a process (R, S, D, T, Z), or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def heartbeat_path(logs: Path, rank: int) -> Path:
    """Return where a rank's heartbeat stands."""
    return logs / "heartbeats" / f"rank-{rank:05d}.json"


def read_beats(logs: Path, attempt: str, num_ranks: int) -> list[Beat | None]:
    """Read the heartbeats of this attempt in rank order, each with its ``age_s``; None where a rank has none.

    Ages are differences of file times, because the clocks of hosts differ and the storage has one.
    """
    beats: list[Beat | None] = []
    for rank in range(num_ranks):
        path, beat = heartbeat_path(logs, rank), None
        with contextlib.suppress(OSError, ValueError):
            written_s = path.stat().st_mtime
            beat = json.loads(path.read_text()) | {"written_s": written_s}
        beats.append(beat if beat and beat["attempt"] == attempt else None)
    newest_s = max((beat["written_s"] for beat in beats if beat), default=0.0)
    for beat in beats:
        if beat:
            beat["age_s"] = newest_s - beat["written_s"]
    return beats


def blame(beats: Sequence[Beat | None], *, silent_beats: int = _SILENT_BEATS) -> list[str]:
    """Name the ranks that keep the others waiting, one line each: lost, silent, stopped, or else those behind.

    A rank is silent when its newest heartbeat is so many intervals older than the newest of all.
    """
    silent_s = silent_beats * beat_interval_s(len(beats))
    lost = sorted(
        (beat for beat in beats if beat and (beat["gone"] or beat["phase"] == Phase.FAILED)), key=lambda b: b["time"]
    )
    lost = [beat for beat in lost if beat["phase"] != Phase.LOST]
    lines = [f"{_name(beat)} {'died' if beat['gone'] else 'fails'} {_place(beat)}" for beat in lost]
    for rank, beat in enumerate(beats):
        if beat is None:
            lines.append(f"rank {rank} has given no sign of life in this attempt")
        elif not beat["gone"] and beat["age_s"] > silent_s:
            lines.append(f"{_name(beat)} has given no sign of life for {beat['age_s']:.0f} s; last seen {_place(beat)}")
        elif beat["state"] in ("T", "t"):
            lines.append(f"{_name(beat)} is {_STATES[beat['state']]} {_place(beat)}")
    return lines or _behind([beat for beat in beats if beat and beat["phase"] != Phase.LOST])


def _behind(beats: Sequence[Beat]) -> list[str]:
    places = {(beat["step"], beat["phase"]) for beat in beats}
    if len(places) == 1 and len(beats) > 1:
        hosts = ", ".join(sorted({beat["host"] for beat in beats})[:_NAMED_RANKS])
        return [
            f"no rank is behind: all {len(beats)} are {_place(beats[0])}, on {hosts}: look at what they share, the "
            "network between them or the storage"
        ]
    return [
        f"{_name(beat)} is {_STATES.get(beat['state'], 'alive')} {_place(beat)}"
        + ", behind the others" * (len(beats) > 1)
        for beat in beats
        if (beat["step"], beat["phase"]) == min(places)
    ]


def _name(beat: Beat) -> str:
    return f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']})"


def _place(beat: Beat) -> str:
    return f"in step {beat['step']}, {WORDS[Phase(beat['phase'])]} for {beat['for_s']:.0f} s"


def verdict_path(logs: Path, attempt: str) -> Path:
    """Return the file whose existence ends the attempt."""
    return logs / f"{attempt}_watchdog.txt"


def tell(logs: Path, attempt: str, num_ranks: int, headline: str, *, silent_beats: int = _SILENT_BEATS) -> None:
    """Name the culprit for the whole job: whoever comes first writes the file and speaks."""
    time.sleep(_SETTLE_S)
    culprits = blame(read_beats(logs, attempt, num_ranks), silent_beats=silent_beats)
    more = [f"  and {len(culprits) - _NAMED_RANKS} more"] * (len(culprits) > _NAMED_RANKS)
    text = "\n".join(
        [
            f"watchdog: {headline}",
            *(f"  {line}" for line in culprits[:_NAMED_RANKS]),
            *more,
            f"  stacks of every rank: {logs / 'stacks'}. All ranks are being ended; the same command goes on from the "
            "last checkpoint.",
            _FOUND_ON + socket.gethostname(),
        ]
    )
    with contextlib.suppress(FileExistsError):
        try:
            with verdict_path(logs, attempt).open("x") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise
        except OSError as error:
            text += f"\n  ({error})"
        say(text)


def say(text: str) -> None:
    """Write to stderr, if anybody still listens."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class WatchdogProcess:
    """Watches one rank until it ends, or ends it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._logs = Path(settings["logs"])
        self._rank, self._pid, self._num_ranks = settings["rank"], settings["pid"], settings["num_ranks"]
        self._limits = {Phase(int(phase)): limit for phase, limit in settings["limits"].items()}
        self._memory = mmap(settings["marks_fd"], PHASE_RECORD.size)
        self._record, self._phase_s, self._since = (0, 0, 0), 0.0, time.time()
        self._beating: threading.Thread | None = None
        self._condemned = self._has_written = False

    def watch(self) -> None:
        """Return when the rank is gone and everything is said."""
        last = next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            self._read_record(now - last)
            last = now
            if os.getppid() != self._pid:
                return self._report_loss()
            _, limit_s = self._limits.get(self._phase, ("", 0))
            overdue = 0 < limit_s < self._phase_s
            if overdue or (self._condemned and self._phase < Phase.FAILED):
                return self._end_rank(overdue=overdue)
            if now >= next_beat and not (self._beating and self._beating.is_alive()):
                next_beat = now + beat_interval_s(self._num_ranks)
                self._beating = _in_background(self._beat)
            time.sleep(TICK_S)

    @property
    def _phase(self) -> Phase:
        return Phase(self._record[2])

    def _read_record(self, slept_s: float) -> None:
        """Follow the rank. A tick that took far longer was a frozen or suspended machine, and no time of the rank's."""
        record = PHASE_RECORD.unpack_from(self._memory)
        self._phase_s += min(slept_s, _FOREIGN_SLEEP_S)
        if record != self._record:
            self._record, self._phase_s, self._since = record, 0.0, time.time()

    def _beat(self) -> None:
        """Write where the rank stands, and look whether the job is condemned."""
        self._condemned = verdict_path(self._logs, self._settings["attempt"]).exists()
        path = heartbeat_path(self._logs, self._rank)
        with contextlib.suppress(OSError, ValueError):
            if self._has_written and json.loads(path.read_text())["attempt"] != self._settings["attempt"]:
                return  # a newer attempt has taken over while this host was away
        state = state_of(self._pid) if os.getppid() == self._pid else "gone"
        beat = {
            **{name: self._settings[name] for name in ("rank", "host", "pid", "attempt")},
            **{"step": self._record[1], "phase": self._record[2], "doing": WORDS[self._phase], "since": self._since},
            **{"for_s": round(self._phase_s, 1), "time": time.time(), "state": state, "gone": state == "gone"},
        }
        draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        draft.write_text(json.dumps(beat) + "\n")
        draft.replace(path)
        self._has_written = True

    def _report_loss(self) -> None:
        """Leave a last word; a rank that did not say that it leaves was killed, and the whole job must know."""
        _within(5.0, lambda: self._beat())
        if self._phase < Phase.LEAVING:
            _within(10.0, lambda: self._tell("a rank was killed or crashed"))

    def _end_rank(self, *, overdue: bool) -> None:
        """Keep the stacks, name the culprit, wait until the other guardians have done the same, and kill."""
        deadline = time.monotonic() + grace_s(self._num_ranks)
        stacks = self._stacks()
        saying = _in_background(lambda: self._keep(stacks))
        if overdue:
            setting, limit_s = self._limits[self._phase]
            headline = (
                f"rank {self._rank} on {self._settings['host']} (pid {self._pid}) is {WORDS[self._phase]} in step "
                f"{self._record[1]} for {self._phase_s:.0f} s, but {setting} is {limit_s} s"
            )
            _within(deadline - time.monotonic(), lambda: self._tell(headline))
        if self._rank == 0:
            _within(deadline - time.monotonic(), self._repeat)
        while time.monotonic() < deadline and os.getppid() == self._pid:
            time.sleep(TICK_S / 5)
        self._kill()
        saying.join(1.0)
        _within(5.0, lambda: self._beat())

    def _tell(self, headline: str) -> None:
        self._beat()
        tell(self._logs, self._settings["attempt"], self._num_ranks, headline)

    def _repeat(self) -> None:
        """Say what another host has found: its own words may never reach the user."""
        path = verdict_path(self._logs, self._settings["attempt"])
        while _FOUND_ON not in (text := path.read_text()):
            time.sleep(TICK_S / 5)  # it is being written
        if not text.rstrip().endswith(_FOUND_ON + socket.gethostname()):
            say(text.rstrip())

    def _stacks(self) -> str:
        """Return what the kernel says of the rank and, unless it is stopped, its Python stacks."""
        lines = [f"{self._settings['attempt']} rank {self._rank} on {self._settings['host']} (pid {self._pid})"]
        lines += [f"in step {self._record[1]}, {WORDS[self._phase]} for {self._phase_s:.0f} s", ""]
        for name in ("wchan", "stack", "status"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{self._pid}/{name}").read_text()
                lines += [f"/proc/{self._pid}/{name}:", *text.splitlines()[: 4 if name == "status" else 40]]
        if state_of(self._pid) in ("R", "S"):
            os.kill(self._pid, DUMP_SIGNAL)
            for _ in range(10):
                time.sleep(TICK_S / 5)
                if text := os.pread(self._settings["stacks_fd"], 1 << 20, 0).decode(errors="replace"):
                    lines += ["", text]
                    break
        return "\n".join(lines)

    def _keep(self, stacks: str) -> None:
        folder = self._logs / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{self._rank:05d}.txt").write_text(stacks, encoding="utf-8")

    def _kill(self) -> None:
        """End the rank and its loader workers, which might hang with it. SIGKILL also ends a stopped process."""
        if os.getppid() != self._pid:
            return
        for pid in [*(pid for pid in _children(self._pid) if pid != os.getpid()), self._pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while os.getppid() == self._pid:
            time.sleep(TICK_S / 5)


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _in_background(work: Callable[[], Any]) -> threading.Thread:
    def attempt() -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    return thread


def _within(seconds: float, work: Callable[[], Any]) -> None:
    _in_background(work).join(max(0.0, seconds))


def main() -> NoReturn:
    """Watch the rank that started this process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # launchers and schedulers end the rank; the guardian leaves after it
    WatchdogProcess(json.loads(sys.argv[1])).watch()
    os._exit(0)  # a thread that hangs with the storage must not keep this process


if __name__ == "__main__":
    main()
