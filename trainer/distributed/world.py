"""Who we are among the ranks, as a plain value, and the few decisions that all ranks take together.

Only host-side words travel here: flags, verdicts, short texts, as JSON and never as pickles. Gradients are the
engine's business. Decisions use a process group of their own (gloo, on the CPU, with a long time-out), because rank 0
may index terabytes while the others wait.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import CheckpointError, ConfigError, DataError, SupersededError, TrainerError

T = TypeVar("T")
_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, SupersededError)}


@dataclass(frozen=True, slots=True)
class World:
    """This process among ``size`` processes; ``local_rank`` of ``local_size`` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    decisions: Any = field(default=None, repr=False, compare=False)
    """Process group for host-side words; None in a world of one."""
    background: Any = field(default=None, repr=False, compare=False)
    """A second such group, for one thread beside the main one: words of two threads must not meet in one group."""

    def in_background(self) -> "World":
        """Return this world for use by a background thread."""
        return replace(self, decisions=self.background)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes shared files and talks to the user."""
        return self.rank == 0

    def any_over_ranks(self, flag: bool) -> bool:
        """Tell every rank whether the flag is up on any of them."""
        return any(self.gather_over_ranks(flag))

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Give every rank the JSON-able value of each rank, in rank order."""
        if self.size == 1:
            return [value]
        word = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(word)]), group=self.decisions)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(word)] = word
        words = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(words, padded, group=self.decisions)
        return [json.loads(w[: int(n)].numpy().tobytes()) for w, n in zip(words, lengths, strict=True)]

    def _from_main(self, value: Any) -> Any:
        """Give every rank the JSON-able value of rank 0."""
        if self.size == 1:
            return value
        word = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(word)])
        dist.broadcast(length, src=0, group=self.decisions)
        received = word.clone() if self.is_main else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=self.decisions)
        return json.loads(received.numpy().tobytes())

    def on_main(self, decide: Callable[[], T]) -> T:
        """Run ``decide`` on rank 0 and give its JSON-able result to all; its `TrainerError` is raised on all."""
        verdict: dict[str, Any] = {}
        if self.is_main:
            try:
                verdict = {"value": decide()}
            except TrainerError as error:
                verdict = {"error": str(error), "kind": type(error).__name__}
        verdict = self._from_main(verdict)
        if "error" in verdict:
            raise _KINDS.get(verdict["kind"], DataError)(verdict["error"])
        value: T = verdict["value"]
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails anywhere with `TrainerError`, that error is raised everywhere."""
        result, problem = None, None
        try:
            result = work()
        except TrainerError as error:
            problem = {"error": str(error), "kind": type(error).__name__}
        for found in self.gather_over_ranks(problem):
            if found:
                raise _KINDS.get(found["kind"], DataError)(found["error"])
        return result  # type: ignore[return-value]  # no rank failed, so work() returned

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        self.gather_over_ranks(None)


def world_from_environment() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE as the deepspeed launcher and torchrun set them.

    Raises:
        ConfigError: a variable is not an integer, the set of them is incomplete, or this is one of several processes
            that know nothing of each other.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        _refuse_lone_tasks()
        return World()
    numbers = {}
    for name, fallback in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", None), ("LOCAL_SIZE", "1")):
        text = os.environ.get(name) or os.environ.get("LOCAL_WORLD_SIZE" if name == "LOCAL_SIZE" else "") or fallback
        if text is None or not text.isdecimal():
            raise ConfigError(f"environment variable {name} is {text!r}, but must be an integer: start with deepspeed")
        numbers[name] = int(text)
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_SIZE"])


def _refuse_lone_tasks() -> None:
    """Refuse one of several processes of srun or mpirun: each would train alone, all into one output_dir.

    The script of a batch job and the shell of salloc see the number of tasks of their job too, but are one process:
    they have a job id and no step id.
    """
    alone = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ and not _number("SLURM_PROCID")
    slurm_tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    for name, starter in (
        *([] if alone else [(slurm_tasks, "srun")]),
        *((name, "mpirun") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
    ):
        if _number(name) > 1:
            raise ConfigError(
                f"{starter} has started {_number(name)} of these processes ({name}), but RANK is not set, so that each "
                "would train alone and write into one output_dir: start with deepspeed or torchrun, or submit with "
                "tools/submit.py or the scripts of launch/slurm, which set RANK for every task"
            )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
