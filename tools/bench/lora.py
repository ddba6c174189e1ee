"""LoRA-only against full fine-tuning: optimizer state, checkpoint bytes, step time and peak memory.

Counted first: a full step costs three forwards (forward, gradients of activations, gradients of weights), a LoRA step
two and a little, because the weights of frozen layers need no gradient; so 0.67x is the floor. Steps are interleaved in
one process and their medians compared; memory is the peak of a process of its own for each mode.

Usage: python tools/bench/lora.py [--model NAME] [--micro_batch N] [--repeats N]

Examples:
    python tools/bench/lora.py --micro_batch 8
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench.common import machine, medians, run_alone, seconds, take_turns
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.config.settings import DetectorRecipe
from trainer.fault_tolerance.exit_codes import run

MODES = ("full", "lora")


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
    device: str = "cpu"
    """cpu or cuda, where weights are bf16."""
    only: str | None = None
    """Run one mode, full or lora, and print its peak memory; the benchmark calls itself with this."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)


CLI = CommandLine(Settings, __doc__)


class Mode:
    """A detector and its optimizer."""

    def __init__(self, settings: Settings, *, lora: bool) -> None:
        import torch

        from trainer.models.detector import HeadOptions, MorphDetector
        from trainer.models.encoder import PatchEncoder
        from trainer.models.lora import add_lora

        torch.manual_seed(0)
        encoder = PatchEncoder(settings.model, image_size=settings.image_size)
        if lora:
            add_lora(encoder.vit, r=settings.lora_r)
        detector = MorphDetector(encoder, normalisation="imagenet", head=HeadOptions.of(DetectorRecipe()))
        dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
        self.model = detector.to(settings.device, dtype).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        size, batch = settings.image_size, settings.micro_batch
        self._images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=settings.device)
        self._labels = torch.arange(batch, device=settings.device) % 2
        self._draws = torch.zeros(batch, self.model.num_draws, device=settings.device)

    def step(self) -> None:
        """Take one step."""
        self.model(self._images, self._labels, self._draws).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Count AdamW's two moments [bytes]."""
        return sum(2 * 4 * parameter.numel() for parameter in self.trained)

    def adapter_bytes(self, base_model: str) -> int:
        """Count the bytes of adapter and head on disk."""
        from trainer.models.lora import save_adapter

        with tempfile.TemporaryDirectory() as folder:
            head = dict(self.model.head.state_dict())
            save_adapter(Path(folder), self.model.encoder.vit, head, base_model=base_model)
            return sum(path.stat().st_size for path in Path(folder).iterdir())


def peak_gib(settings: Settings, *, lora: bool) -> float:
    """Take two steps; returns the highest memory above that of an idle process [GiB]."""
    from trainer.training.throughput import forget_peak, peak_resident_gib

    idle_gib = forget_peak()
    mode = Mode(settings, lora=lora)
    mode.step()
    mode.step()
    if settings.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_gib() - idle_gib


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    if settings.only:
        print(peak_gib(settings, lora=settings.only == "lora"))
        return 0
    memory = {name: float(run_alone(__file__, "--only", name)) for name in MODES}
    modes = {name: Mode(settings, lora=name == "lora") for name in MODES}
    step_s = medians(
        take_turns(
            {name: partial(seconds, mode.step, settings.device) for name, mode in modes.items()},
            repeats=settings.repeats,
        )
    )
    state = {name: mode.state_bytes() for name, mode in modes.items()}
    ratio = {"state": state["full"] / state["lora"], "time": step_s["lora"] / step_s["full"]}
    print(f"{machine(settings.device)}, {settings}")
    print(
        f"optimizer state   full {state['full'] / 1e6:.1f} MB, LoRA {state['lora'] / 1e6:.3f} MB: {ratio['state']:.0f}x"
    )
    print(f"adapter and head  {modes['lora'].adapter_bytes(settings.model) / 1e6:.2f} MB")
    print(f"step time         full {step_s['full']:.2f} s, LoRA {step_s['lora']:.2f} s: {ratio['time']:.2f}x")
    print(f"peak memory       full {memory['full']:.2f} GiB, LoRA {memory['lora']:.2f} GiB above an idle process")
    return 0


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
