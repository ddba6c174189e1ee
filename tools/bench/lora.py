"""LoRA-only against full fine-tuning: optimizer state, checkpoint bytes, step time and peak memory.

Counted first: a full step costs three forwards (forward, gradients of activations, gradients of weights), a LoRA step
two and a little, because the weights of frozen layers need no gradient; so 0.67x is the floor. Steps are interleaved in
one process and their medians compared; memory is the peak of a process of its own for each mode.

Usage: python tools/bench/lora.py [--model NAME] [--micro_batch N] [--repeats N]
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trainer.config.command_line import CommandLine
from trainer.config.settings import check_types
from trainer.fault_tolerance.exit_codes import run
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.lora import add_lora, save_adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    model: str = "vit_base_patch16_224"
    """timm's name of the encoder."""
    image_size: int = 224
    """Side of the view [pixels]."""
    micro_batch: int = 4
    """Images in a step [images]."""
    repeats: int = 5
    """Steps of each mode."""
    lora_r: int = 4
    """Rank."""
    only: str | None = None
    """Run one mode, full or lora, and print its peak memory; the benchmark calls itself with this."""

    def __post_init__(self) -> None:
        check_types(self)


class Mode:
    """A detector and its optimizer."""

    def __init__(self, settings: Settings, *, lora: bool) -> None:
        torch.manual_seed(0)
        encoder = PatchEncoder(settings.model, image_size=settings.image_size)
        if lora:
            add_lora(encoder.vit, r=settings.lora_r)
        self.model = MorphDetector(encoder, normalisation="imagenet", head=HeadOptions()).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        size = settings.image_size
        self._images = torch.randint(0, 256, (settings.micro_batch, 3, size, size), dtype=torch.uint8)
        self._labels = torch.arange(settings.micro_batch) % 2

    def step(self) -> float:
        """Take one step; returns its time [s]."""
        start = time.perf_counter()
        loss = self.model(self._images, self._labels, torch.zeros(len(self._labels), self.model.num_draws))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """Count AdamW's two moments [bytes]."""
        return sum(2 * 4 * parameter.numel() for parameter in self.trained)


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    if settings.only:
        mode = Mode(settings, lora=settings.only == "lora")
        mode.step()
        mode.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return 0
    memory = {name: _peak_bytes(name, sys.argv[1:]) for name in ("full", "lora")}
    modes = {"full": Mode(settings, lora=False), "lora": Mode(settings, lora=True)}
    for mode in modes.values():
        mode.step()
    times: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(settings.repeats):
        for name, mode in modes.items():
            times[name].append(mode.step())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    state = {name: mode.state_bytes() for name, mode in modes.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = modes["lora"].model
        save_adapter(Path(folder), model.encoder.vit, _state_of(model.head), base_model=settings.model)
        adapter_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    ratio = {"state": state["full"] / state["lora"], "time": seconds["lora"] / seconds["full"]}
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {settings}")
    print(
        f"optimizer state   full {state['full'] / 1e6:.1f} MB, LoRA {state['lora'] / 1e6:.3f} MB: {ratio['state']:.0f}x"
    )
    print(f"adapter and head  {adapter_bytes / 1e6:.2f} MB")
    print(f"step time         full {seconds['full']:.2f} s, LoRA {seconds['lora']:.2f} s: {ratio['time']:.2f}x")
    print(f"peak memory       full {memory['full'] / 2**30:.2f} GiB, LoRA {memory['lora'] / 2**30:.2f} GiB")
    return 0


def _state_of(head: nn.Module) -> dict[str, torch.Tensor]:
    return dict(head.state_dict())


def _peak_bytes(name: str, words: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, __file__, *words, "--only", name], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
