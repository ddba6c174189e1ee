"""The rank and world size of this process, and the few decisions that all ranks take together.

Only small host-side payloads travel here: flags, results, short texts. They are JSON, never pickles. Gradients are the
engine's business. Decisions have a process group of their own (gloo, on the CPU, with a long time-out), because rank 0
may index terabytes while the others wait.

Why decisions are common: a rank that raises alone leaves the others waiting in their next collective until it times
out. So a rank that fails sends its error as a value, and then every rank raises the same error::

    rank 0: work() returns 7       -> sends null                      -> raises DataError("shard 3 is cut")
    rank 1: work() raises          -> sends {"kind", "error": "..."}  -> raises DataError("shard 3 is cut")
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
    """Process group for host-side payloads; None in a world of one."""
    background: Any = field(default=None, repr=False, compare=False)
    """A second such group, for one background thread. Collectives of one group must come in the same order on every
    rank, and two threads keep no common order."""

    def in_background(self) -> "World":
        """Return this world with the process group of the background thread."""
        return replace(self, decisions=self.background)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes shared files and talks to the user."""
        return self.rank == 0

    def any_over_ranks(self, flag: bool) -> bool:
        """Return, on every rank, whether the flag is true on any of them."""
        return any(self.gather_over_ranks(flag))

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Give every rank the JSON-able value of each rank, in rank order."""
        if self.size == 1:
            return [value]
        # An all-gather wants tensors of one size, so the lengths travel first. With payloads b"true" and b"false" the
        # lengths are [4, 5], both are sent as 5 bytes, and the receivers cut the first one back to 4.
        payload = _payload(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(payload)]), group=self.decisions)
        padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
        padded[: len(payload)] = payload
        payloads = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(payloads, padded, group=self.decisions)
        return [json.loads(p[: int(n)].numpy().tobytes()) for p, n in zip(payloads, lengths, strict=True)]

    def _from_main(self, value: Any) -> Any:
        """Give every rank the JSON-able value of rank 0."""
        if self.size == 1:
            return value
        payload = _payload(value)
        length = torch.tensor([len(payload)])
        dist.broadcast(length, src=0, group=self.decisions)
        received = payload.clone() if self.is_main else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=self.decisions)
        return json.loads(received.numpy().tobytes())

    def on_main(self, decide: Callable[[], T]) -> T:
        """Run ``decide`` on rank 0 and give its JSON-able result to all; its `TrainerError` is raised on all."""
        outcome: dict[str, Any] = {}
        if self.is_main:
            try:
                outcome = {"value": decide()}
            except TrainerError as error:
                outcome = _to_dict(error)
        outcome = self._from_main(outcome)
        if "error" in outcome:
            raise _to_error(outcome)
        value: T = outcome["value"]
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails anywhere with `TrainerError`, that error is raised everywhere."""
        result, failure = None, None
        try:
            result = work()
        except TrainerError as error:
            failure = _to_dict(error)
        for failure_of_rank in self.gather_over_ranks(failure):
            if failure_of_rank:  # of several, all ranks raise that of the lowest rank
                raise _to_error(failure_of_rank)
        return result  # type: ignore[return-value]  # no rank failed, so work() returned

    def wait_for_all(self) -> None:
        """Return when every rank has called this: a barrier."""
        self.gather_over_ranks(None)


def _payload(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _to_dict(error: TrainerError) -> dict[str, str]:
    return {"error": str(error), "kind": type(error).__name__}


def _to_error(outcome: dict[str, str]) -> TrainerError:
    return _KINDS.get(outcome["kind"], DataError)(outcome["error"])


def world_from_environment() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE as the deepspeed launcher and torchrun set them.

    Raises:
        ConfigError: a variable is not an integer, some of them are missing, or srun or mpirun started several processes
            without them.
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
    """Refuse to start when srun or mpirun started several processes without RANK: each would train alone.

    The script of a batch job and the shell of salloc also see the number of tasks of their job, but they are one
    process. They have a job id and no step id.
    """
    is_batch_shell = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ and not _number("SLURM_PROCID")
    slurm_tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    for name, starter in (
        *([] if is_batch_shell else [(slurm_tasks, "srun")]),
        *((name, "mpirun") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
    ):
        if _number(name) > 1:
            raise ConfigError(
                f"{starter} has started {_number(name)} of these processes ({name}), but RANK is not set, so each "
                "would train alone and write into one output_dir: start with deepspeed or torchrun, or submit with "
                "tools/submit.py or the scripts of launch/slurm, which set RANK for every task"
            )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
