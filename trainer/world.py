"""Who we are among the ranks, as a plain value, and the few decisions that all ranks take together.

Only host-side words travel here: flags, verdicts, short texts, as JSON and never as pickles. Gradients are the
engine's business. Decisions use a process group of their own (gloo, on the CPU, with a long time-out), because rank 0
may index terabytes while the others wait.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import CheckpointError, ConfigError, DataError, SupersededError, TrainerError

T = TypeVar("T")
_PATIENCE = timedelta(days=2)
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
        ConfigError: a variable is not an integer, or the set of them is incomplete.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    numbers = {}
    for name, fallback in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", None), ("LOCAL_SIZE", "1")):
        text = os.environ.get(name) or os.environ.get("LOCAL_WORLD_SIZE" if name == "LOCAL_SIZE" else "") or fallback
        if text is None or not text.isdecimal():
            raise ConfigError(f"environment variable {name} is {text!r}, but must be an integer: start with deepspeed")
        numbers[name] = int(text)
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_SIZE"])


def check_devices(world: World, num_devices: int, kind: str, *, oversubscribe: bool) -> None:
    """Refuse more ranks on this host than it has devices.

    Args:
        world: this process.
        num_devices: GPUs, or CPU cores where there is no GPU.
        kind: "cuda" or "cpu".
        oversubscribe: let CPU ranks share cores (slow, for tests).
    """
    if world.local_size <= num_devices or (kind == "cpu" and oversubscribe):
        return
    remedy = f"start with --num_gpus {num_devices}"
    if kind == "cpu":
        remedy += ", or pass --oversubscribe true to let CPU ranks share cores"
    noun = "GPUs" if kind == "cuda" else "CPU cores"
    raise ConfigError(f"{world.local_size} ranks were started on a host with {num_devices} {noun}: {remedy}")


def join(world: World) -> World:
    """Return the same world with its groups for decisions; the default process group must exist."""
    if world.size == 1:
        return world
    groups = [dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2)]
    return replace(world, decisions=groups[0], background=groups[1])
