"""The watchdog process of one rank: it notices a rank that hangs or dies, names the culprit, and ends the job.

`watchdog` starts it beside each rank as ``python -I -S watchdog_process.py SETTINGS``. It imports the standard library
only. It is a separate process because a stopped or hanging rank can do nothing for itself. The rank writes its step and
phase into shared memory; the watchdog process reads them twice a second and

* writes OUTPUT/logs/heartbeats/rank-00003.json, which shows the other watchdog processes where this rank is;
* names the culprit, once for the whole job, in OUTPUT/logs/[attempt]_watchdog.txt and on stderr, when a phase exceeds
  its limit or the rank is gone without having reported that it leaves;
* saves the stacks of its rank in OUTPUT/logs/stacks and kills the rank, as soon as that file exists, whoever wrote it.
  A launcher that hangs with a stopped rank would not end it.

Killing never waits for a file: everything that touches the output folder runs in a thread that may hang with the
storage.

How the culprit is found (`blame`). The rank that exceeds its limit is rarely the cause: it waits in a collective for
another one. So the heartbeats of all ranks decide, by the first rule that applies::

    a rank is gone or reported an error      "died", "fails", earliest first
    no heartbeat yet, or too old a one       its host or its watchdog process is lost, or the storage hangs there
    the kernel says stopped                  SIGSTOP, a debugger
    else the least advanced ranks            rank 1 in step 4 waiting for data, the others in step 4 computing: rank 1
    all ranks at the same place              the network between them, or the storage
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
"""What a rank reports: number of the record, step, phase."""
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write its Python stacks (`faulthandler`); a scheduler may send it too, without harm."""

_LAST_BEAT_WAIT_S = 1.0
"""Time for the last heartbeats of other ranks to arrive before the culprit is named."""
_MAX_COUNTED_TICK_S = 4 * TICK_S
_MAX_NAMED_RANKS = 8
_FOUND_ON = "  found on "
_SILENT_BEATS = 5


class Phase(enum.IntEnum):
    """What a rank is doing within a step, in the order of the loop; the last three are ways out of the run."""

    STARTING = 0
    CONNECTING = 1
    DATA = 2
    STEP = 3
    MEASURING = 4
    DRAWING = 5
    SAVING = 6
    LEAVING = 7
    FAILED = 8
    LOST = 9


PHASE_TEXT = {
    Phase.STARTING: "starting",
    Phase.CONNECTING: "starting DeepSpeed and loading the state",
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
    """Return the seconds from naming the culprit to killing: every watchdog process must notice and save the stacks."""
    return 2 * beat_interval_s(num_ranks) + 1


def state_of(pid: int) -> str:
    """Return the kernel's letter for the state of a process (R, S, D, T, Z), or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def heartbeat_path(logs: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat."""
    return logs / "heartbeats" / f"rank-{rank:05d}.json"


def read_beats(logs: Path, attempt: str, num_ranks: int) -> list[Beat | None]:
    """Read the heartbeats of this attempt in rank order, each with its ``age_s``; None where a rank has none.

    Ages are differences of file times on the storage, because the clocks of the hosts differ. The newest heartbeat of
    all has age 0, so a rank that wrote 30 s before it has age 30 even if every clock is wrong.
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
    """Name the ranks that the others wait for, one line each: lost, silent, stopped, or else the least advanced.

    A rank is silent when its newest heartbeat is ``silent_beats`` intervals older than the newest of all. With 2 ranks
    the interval is 2 s, so 5 beats are 10 s; with 500 ranks it is 10 s, so they are 50 s.
    """
    silent_s = silent_beats * beat_interval_s(len(beats))
    lost = sorted(
        (beat for beat in beats if beat and (beat["gone"] or beat["phase"] == Phase.FAILED)), key=lambda b: b["time"]
    )
    lost = [beat for beat in lost if beat["phase"] != Phase.LOST]  # it left because of another rank
    lines = [f"{_name(beat)} {'died' if beat['gone'] else 'fails'} {_place(beat)}" for beat in lost]
    for rank, beat in enumerate(beats):
        if beat is None:
            lines.append(f"rank {rank} has sent no heartbeat in this attempt")
        elif not beat["gone"] and beat["age_s"] > silent_s:
            lines.append(f"{_name(beat)} has sent no heartbeat for {beat['age_s']:.0f} s; last seen {_place(beat)}")
        elif beat["state"] in ("T", "t"):
            lines.append(f"{_name(beat)} is {_STATES[beat['state']]} {_place(beat)}")
    return lines or _behind([beat for beat in beats if beat and beat["phase"] != Phase.LOST])


def _behind(beats: Sequence[Beat]) -> list[str]:
    places = {(beat["step"], beat["phase"]) for beat in beats}
    if len(places) == 1 and len(beats) > 1:
        hosts = ", ".join(sorted({beat["host"] for beat in beats})[:_MAX_NAMED_RANKS])
        return [
            f"no rank is behind: all {len(beats)} are {_place(beats[0])}, on {hosts}: check what they share, the "
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
    return f"in step {beat['step']}, {PHASE_TEXT[Phase(beat['phase'])]} for {beat['for_s']:.0f} s"


def verdict_path(logs: Path, attempt: str) -> Path:
    """Return the file whose existence ends the attempt."""
    return logs / f"{attempt}_watchdog.txt"


def report_culprit(
    logs: Path, attempt: str, num_ranks: int, headline: str, *, silent_beats: int = _SILENT_BEATS
) -> None:
    """Name the culprit for the whole job; only the first caller of all writes the file and prints the message."""
    time.sleep(_LAST_BEAT_WAIT_S)
    culprits = blame(read_beats(logs, attempt, num_ranks), silent_beats=silent_beats)
    more = [f"  and {len(culprits) - _MAX_NAMED_RANKS} more"] * (len(culprits) > _MAX_NAMED_RANKS)
    text = "\n".join(
        [
            f"watchdog: {headline}",
            *(f"  {line}" for line in culprits[:_MAX_NAMED_RANKS]),
            *more,
            f"  stacks of every rank: {logs / 'stacks'}. All ranks are being ended; the same command continues from "
            "the last checkpoint.",
            _FOUND_ON + socket.gethostname(),
        ]
    )
    with contextlib.suppress(FileExistsError):
        try:
            with verdict_path(logs, attempt).open("x") as file:  # fails where another rank has reported already
                file.write(text + "\n")
        except FileExistsError:
            raise
        except OSError as error:
            text += f"\n  ({error})"
        _write_to_stderr(text)


def _write_to_stderr(text: str) -> None:
    """Write to stderr, which may be closed by now."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class WatchdogProcess:
    """Watches one rank until it ends, or ends it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._logs = Path(settings["logs"])
        self._rank, self._pid, self._num_ranks = settings["rank"], settings["pid"], settings["num_ranks"]
        self._limits = {Phase(int(phase)): limit for phase, limit in settings["limits"].items()}
        self._memory = mmap(settings["phase_fd"], PHASE_RECORD.size)
        self._record, self._phase_s, self._since = (0, 0, 0), 0.0, time.time()
        self._beating: threading.Thread | None = None
        self._job_must_end = self._has_written = False

    def watch(self) -> None:
        """Return when the rank is gone and its end is reported."""
        last = next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            self._read_record(now - last)
            last = now
            if os.getppid() != self._pid:
                return self._report_loss()
            _, limit_s = self._limits.get(self._phase, ("", 0))
            overdue = 0 < limit_s < self._phase_s
            if overdue or (self._job_must_end and self._phase < Phase.FAILED):
                return self._end_rank(overdue=overdue)
            if now >= next_beat and not (self._beating and self._beating.is_alive()):
                next_beat = now + beat_interval_s(self._num_ranks)
                self._beating = _in_background(self._beat)
            time.sleep(TICK_S)

    @property
    def _phase(self) -> Phase:
        return Phase(self._record[2])

    def _read_record(self, slept_s: float) -> None:
        """Read the rank's phase and add the tick to its time.

        A tick of far more than 0.5 s means that the machine was suspended. Only 2 s of it count, so a virtual machine
        that was paused for an hour does not exceed a limit of 30 minutes when it wakes up.
        """
        record = PHASE_RECORD.unpack_from(self._memory)
        self._phase_s += min(slept_s, _MAX_COUNTED_TICK_S)
        if record != self._record:
            self._record, self._phase_s, self._since = record, 0.0, time.time()

    def _beat(self) -> None:
        """Write the heartbeat, and check whether a culprit was named, which ends the job."""
        self._job_must_end = verdict_path(self._logs, self._settings["attempt"]).exists()
        path = heartbeat_path(self._logs, self._rank)
        with contextlib.suppress(OSError, ValueError):
            if self._has_written and json.loads(path.read_text())["attempt"] != self._settings["attempt"]:
                return  # a newer attempt has taken over while this host was away
        state = state_of(self._pid) if os.getppid() == self._pid else "gone"
        beat = {
            **{name: self._settings[name] for name in ("rank", "host", "pid", "attempt")},
            **{"step": self._record[1], "phase": self._record[2], "doing": PHASE_TEXT[self._phase]},
            **{
                "since": self._since,
                "for_s": round(self._phase_s, 1),
                "time": time.time(),
                "state": state,
                "gone": state == "gone",
            },
        }
        draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        draft.write_text(json.dumps(beat) + "\n")
        draft.replace(path)
        self._has_written = True

    def _report_loss(self) -> None:
        """Write the last heartbeat. A rank that had not reported that it leaves was killed: report it to the job."""
        _within(5.0, lambda: self._beat())
        if self._phase < Phase.LEAVING:
            _within(10.0, lambda: self._report("a rank was killed or crashed"))

    def _end_rank(self, *, overdue: bool) -> None:
        """Save the stacks, name the culprit, give the other watchdog processes time to do the same, and kill."""
        deadline = time.monotonic() + grace_s(self._num_ranks)
        stacks = self._stacks()
        saving = _in_background(lambda: self._save_stacks(stacks))
        if overdue:
            setting, limit_s = self._limits[self._phase]
            headline = (
                f"rank {self._rank} on {self._settings['host']} (pid {self._pid}) is {PHASE_TEXT[self._phase]} in step "
                f"{self._record[1]} for {self._phase_s:.0f} s, but {setting} is {limit_s} s"
            )
            _within(deadline - time.monotonic(), lambda: self._report(headline))
        if self._rank == 0:
            _within(deadline - time.monotonic(), self._repeat_report)
        while time.monotonic() < deadline and os.getppid() == self._pid:
            time.sleep(TICK_S / 5)
        self._kill()
        saving.join(1.0)
        _within(5.0, lambda: self._beat())

    def _report(self, headline: str) -> None:
        self._beat()
        report_culprit(self._logs, self._settings["attempt"], self._num_ranks, headline)

    def _repeat_report(self) -> None:
        """Print the report of another host: the stderr of that host may never reach the user."""
        path = verdict_path(self._logs, self._settings["attempt"])
        while _FOUND_ON not in (text := path.read_text()):
            time.sleep(TICK_S / 5)  # the other host is still writing it
        if not text.rstrip().endswith(_FOUND_ON + socket.gethostname()):
            _write_to_stderr(text.rstrip())

    def _stacks(self) -> str:
        """Return what /proc shows of the rank and, unless it is stopped, its Python stacks."""
        lines = [f"{self._settings['attempt']} rank {self._rank} on {self._settings['host']} (pid {self._pid})"]
        lines += [f"in step {self._record[1]}, {PHASE_TEXT[self._phase]} for {self._phase_s:.0f} s", ""]
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

    def _save_stacks(self, stacks: str) -> None:
        folder = self._logs / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{self._rank:05d}.txt").write_text(stacks, encoding="utf-8")

    def _kill(self) -> None:
        """Kill the rank and its loader workers, which may hang with it. SIGKILL also ends a stopped process."""
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
        with contextlib.suppress(OSError):  # a full disk must not stop the watchdog
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    return thread


def _within(seconds: float, work: Callable[[], Any]) -> None:
    _in_background(work).join(max(0.0, seconds))


def main() -> NoReturn:
    """Watch the rank that started this process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # launchers and schedulers end the rank; this process ends after it
    WatchdogProcess(json.loads(sys.argv[1])).watch()
    os._exit(0)  # does not wait for a thread that hangs with the storage


if __name__ == "__main__":
    main()
