"""Show the state of runs: finished, running or interrupted, the end of each attempt, and the command that resumes.

Usage: python tools/run_status.py --run runs/base[,runs/other]

Nothing is written. Exit codes: 0 every run is finished; 3 a run is interrupted, and its command resumes it; 4 none is
interrupted, but one still runs; 2 a folder holds no run. The launcher's own exit code is not reliable: DeepSpeed's is 0
if the process between it and the ranks is killed.

Examples:
    python tools/run_status.py --run runs/base
    python tools/run_status.py --run runs/exact,runs/fast
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_types
from trainer.config.command_line import CommandLine
from trainer.errors import ConfigError
from trainer.fault_tolerance.attempts import Attempt, attempts_of
from trainer.fault_tolerance.exit_codes import EXIT_USER_ERROR, run
from trainer.fault_tolerance.watchdog_process import beat_interval_s, state_of
from trainer.files import read_json

EXIT_INTERRUPTED_RUN = 3
EXIT_RUNNING = 4
_MAX_MISSED_BEATS = 5
_MAX_ATTEMPTS_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    run: str = ""
    """Runs of pretrain.py or finetune.py: their output_dir, several separated by commas."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a run."""

    state: Literal["finished", "running", "interrupted"]
    saved_step: int
    """Step of the newest checkpoint; 0 without one."""
    seen_step: int
    """Last step in metrics.jsonl; steps after the checkpoint will be repeated."""
    total_steps: int | None
    checkpoint: Path | None
    attempts: tuple[Attempt, ...]
    command: str
    folder: str
    """Folder in which the command was started."""


def status_of(output: Path) -> Status:
    """Read the state of a run from its folder.

    Raises:
        ConfigError: it holds no run.
    """
    from trainer.fault_tolerance.checkpoint import newest_manifest  # imports torch

    attempts = attempts_of(output)
    if not attempts:
        raise ConfigError(f"run names {output}, which holds no run: name the output_dir of pretrain.py or finetune.py")
    found = newest_manifest(output / "checkpoints")
    saved = int(found[1]["progress"]["step"]) if found else 0
    total = next((attempt.total_steps for attempt in reversed(attempts) if attempt.total_steps), None)
    start = read_json(output / "recipe.json").get("start", {})
    state: Literal["finished", "running", "interrupted"] = "interrupted"
    last = next((attempt for attempt in reversed(attempts) if not attempt.end.startswith("refused")), attempts[-1])
    if not last.end and is_alive(output / "logs", last):
        state = "running"
    elif (total is not None and saved >= total) or (total is None and last.end == "finished"):
        state = "finished"
    return Status(
        state,
        saved,
        _last_step(output / "metrics.jsonl"),
        total,
        found[0] if found else None,
        tuple(attempts),
        str(start.get("command", "")),
        str(start.get("folder", "")),
    )


def is_alive(logs: Path, attempt: Attempt) -> bool:
    """Whether a rank of an attempt is alive, by its heartbeats, or by its process on this host."""
    if attempt.host == socket.gethostname() and state_of(attempt.pid) not in ("gone", "Z"):
        return "python" in _command_of(attempt.pid)
    limit_s = _MAX_MISSED_BEATS * beat_interval_s(attempt.num_ranks)
    newest = 0.0
    for path in (logs / "heartbeats").glob("rank-*.json"):
        beat = read_json(path)
        if not beat.get("gone", True) and beat.get("host") != socket.gethostname():
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest < limit_s


def describe(output: Path, status: Status) -> list[str]:
    """Return the lines to print."""
    of = f" of {status.total_steps}" if status.total_steps else ""
    step = status.seen_step if status.state == "running" else status.saved_step
    finished = status.state == "finished"
    lines = [f"{output}: finished, {step} steps" if finished else f"{output}: {status.state} at step {step}{of}"]
    hidden = len(status.attempts) - _MAX_ATTEMPTS_SHOWN
    lines += [f"  {hidden} older attempts"] * (hidden > 0)
    for attempt in status.attempts[-_MAX_ATTEMPTS_SHOWN:]:
        began = "ended before its first step" if attempt.first_step is None else f"from step {attempt.first_step}"
        newest = attempt is status.attempts[-1]
        end = attempt.end or ("running" if newest and status.state == "running" else "killed or crashed: see its log")
        ranks = f"{attempt.num_ranks} rank{'s' * (attempt.num_ranks != 1)}"
        lines.append(f"  attempt {attempt.number}  {attempt.time} on {attempt.host}, {ranks}, {began}: {end}")
    lines.append(f"  checkpoint  {status.checkpoint or 'none yet'}")
    if status.state == "interrupted":
        lost = status.seen_step - status.saved_step
        lines += [f"  {lost} steps after the checkpoint will be done again"] * (lost > 0)
        again = f"cd {status.folder} && {status.command}" if status.command else "the command that began it"
        lines.append(f"  go on with  {again}   (under a scheduler: submit the same job again)")
    return lines


CLI = CommandLine(Settings, __doc__, required=("run",))


def main(settings: Settings) -> int:
    """Print how the runs stand; returns the exit code."""
    states, code = set(), 0
    for name in filter(None, settings.run.split(",")):
        try:
            status = status_of(Path(name).expanduser())
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
            continue
        states.add(status.state)
        print("\n".join(describe(Path(name), status)))
    if code:
        return code
    return EXIT_INTERRUPTED_RUN if "interrupted" in states else EXIT_RUNNING if "running" in states else 0


def _last_step(metrics: Path) -> int:
    steps = [0]
    for line in metrics.read_text().splitlines()[-3:] if metrics.exists() else []:
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # it is being written
    return max(steps)


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
