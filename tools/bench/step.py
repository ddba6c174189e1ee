"""One training step of variants of the MAE beside transformers' ViTMAE and beside the machine's own limit, in one run.

Counted first (ViT-B/16, 224 pixels, 8 decoder blocks): 56.6 GFLOP an image, 3.7 % below the published form, whose last
decoder block and pixel layer also run for tokens that nobody reads, and whose first one projects every image's hidden
tokens again. The decoder takes 55 % of it; so half its depth saves 27 %, and a cross decoder that paints a third of the
hidden patches saves 47 %. What a step takes above
FLOPs / GEMM peak is memory traffic: norms, GELU, softmax, gathers, the optimizer.

A step is: mask, forward, backward, fused AdamW. The peer, and the published form as a module of this project's own
weights (`--variants exact,published`), have the weights of the exact variant, and the test holds their losses equal.
Variants take turns; medians are compared. The peak is the best of
three matrix products of the model's own shapes, measured between the steps. On a GPU weights are bf16.

Usage: python tools/bench/step.py [--model NAME] [--micro_batch N] [--repeats N] [--variants exact,cross_third]
           [--device cuda] [--num_threads N] [--memory true]

Examples:
    python tools/bench/step.py --variants exact,fast --device cuda --micro_batch 64
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.common import machine, run_alone, seconds, take_turns
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainer.models.mae import MaskedAutoencoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What differs from the published form."""

    depth: int = 8
    decoder_type: Any = "self"
    predict_share: float = 1.0
    mask_ratio: float = 0.75
    grad_checkpointing: bool = False
    compiled: bool = False
    embeds: bool = False
    """In place of a step, a forward pass of the encoder on whole images, as a probe makes it."""


PEER, PUBLISHED = "transformers", "published"
VARIANTS = {
    "exact": Variant(),
    PUBLISHED: Variant(),
    "depth4": Variant(depth=4),
    "mask85": Variant(mask_ratio=0.85),
    "cross": Variant(decoder_type="cross"),
    "cross_third": Variant(decoder_type="cross", predict_share=1 / 3),
    "cross_third_depth4": Variant(decoder_type="cross", predict_share=1 / 3, depth=4),
    "fast": Variant(decoder_type="cross", predict_share=0.33, depth=4, mask_ratio=0.8),
    "checkpointing": Variant(grad_checkpointing=True),
    "compiled": Variant(compiled=True),
    "probe": Variant(embeds=True),
}


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
    """Steps of each variant that count; two more come first."""
    num_threads: int = 2
    """Threads of the CPU."""
    device: str = "cpu"
    """cpu or cuda."""
    steps_in_a_row: int = 1
    """Steps of a variant in one turn, of which a GPU is given the next before the last is done [steps]."""
    patch_size: int | None = None
    """Side of a patch; none keeps the model's own [pixels]."""
    encoder_depth: int | None = None
    """Transformer blocks in the encoder; none keeps the model's own."""
    variants: tuple[str, ...] = tuple(
        name for name, variant in VARIANTS.items() if not (variant.compiled or variant.embeds)
    )
    """Which to time, beside transformers' ViTMAE. Compiling takes minutes on a CPU and a probe is no step, hence these
    must be named."""
    memory: bool = False
    """Measure the peak memory of each instead, in a process of its own on the CPU."""
    only: str | None = None
    """Run one variant and print its peak memory; the benchmark calls itself with this."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        names = (*self.variants, *((self.only,) if self.only else ()))
        unknown = [name for name in names if name not in (*VARIANTS, PEER)]
        if unknown:
            raise ConfigError(f"variants has {unknown[0]!r}, but takes only {', '.join(VARIANTS)}")


class Contender:
    """A model with its optimizer, and the inputs of a step."""

    def __init__(self, settings: Settings, name: str) -> None:
        import torch

        from tools.bench.published import PublishedForm
        from trainer.models.encoder import PatchEncoder
        from trainer.models.mae import DecoderOptions, MaskedAutoencoder
        from trainer.models.mask_utils import draw_mask, num_kept, num_predicted
        from trainer.models.pixel_statistics import statistics_on

        torch.manual_seed(0)
        variant, device = VARIANTS.get(name, Variant()), settings.device
        dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
        encoder = PatchEncoder(
            settings.model, image_size=settings.image_size, patch_size=settings.patch_size,
            depth=settings.encoder_depth, fixed_positions=True, grad_checkpointing=variant.grad_checkpointing,
        )  # fmt: skip
        decoder = DecoderOptions(decoder_depth=variant.depth, decoder_type=variant.decoder_type)
        mae = MaskedAutoencoder(encoder, decoder)
        keep = num_kept(encoder.num_patches, variant.mask_ratio)
        self.width, self._embeds = encoder.width, variant.embeds
        self.flops = mae.flops_per_image(keep, num_predicted(encoder.num_patches - keep, variant.predict_share))
        if variant.embeds:
            self.flops = encoder.flops(encoder.num_patches)
        model: nn.Module = mae
        if name == PEER:
            model = like(mae, settings.model)
        elif name == PUBLISHED:
            model = PublishedForm(mae, keep)
        self._model = model.to(device, dtype).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        size = (settings.micro_batch, 3, settings.image_size, settings.image_size)
        self._images = images = torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=_seeded(device))
        forward: Callable[..., Any] = torch.compile(self._model) if variant.compiled else self._model
        self._noise_shape, self._device = (settings.micro_batch, encoder.num_patches), device
        how: dict[str, Any] = {"mask_ratio": variant.mask_ratio, "predict_share": variant.predict_share}
        mean_C11, std_C11 = statistics_on(images.device, "imagenet")
        pixels = (images.float() / 255 - mean_C11) / std_C11
        if name == PEER:
            self._loss: Callable[[Tensor], Tensor] = lambda noise: forward(pixels.to(dtype), noise=noise).loss
        elif name == PUBLISHED:
            self._loss = lambda noise: forward(pixels, noise)
        else:
            self._loss = lambda noise: forward(images, *draw_mask(noise, grid=encoder.grid, **how))

    def first_loss(self) -> float:
        """Return the loss of fixed images and masks."""
        import torch

        noise = torch.rand(self._noise_shape, device=self._device, generator=_seeded(self._device))
        with torch.no_grad():
            return float(self._loss(noise))

    def step(self) -> None:
        """Take one step."""
        import torch

        if self._embeds:
            with torch.no_grad():
                self._model(self._images, None, None, want="features")
            return
        loss = self._loss(torch.rand(self._noise_shape, device=self._device))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()


def _seeded(device: str) -> "Generator":
    import torch

    return torch.Generator(device).manual_seed(0)


def like(mae: "MaskedAutoencoder", name: str) -> "nn.Module":
    """Return transformers' model with the same weights; its predictions and its loss were compared with mae's."""
    import torch
    from transformers import ViTMAEForPreTraining

    from trainer.models.pixel_statistics import STATISTICS
    from trainer.weights.export import write_vitmae
    from trainer.weights.subject import Subject

    mean, std = STATISTICS["imagenet"]
    subject = Subject(name=name, encoder=mae.encoder, mean=mean, std=std, mae=mae.eval())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_vitmae(subject, Path(folder))
        model: nn.Module = ViTMAEForPreTraining.from_pretrained(folder)
    return model.train()


class Peak:
    """The machine's best matrix products in the shapes of the model: what a step could reach at most."""

    def __init__(self, settings: Settings, width: int) -> None:
        import torch

        self._device = settings.device
        dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
        rows = max(settings.micro_batch * 196, 1024)
        shapes = [(width, 3 * width), (width, 4 * width), (4 * width, width)]
        self._pairs = [
            tuple(torch.randn(*shape, device=self._device, dtype=dtype) for shape in ((rows, k), (k, n)))
            for k, n in shapes
        ]

    def flops(self) -> float:
        """Measure once; returns FLOP/s."""
        import torch

        rates = []
        for a, b in self._pairs:
            taken = seconds(partial(torch.mm, a, b), self._device)
            rates.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / taken)
        return max(rates)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a variant."""

    step_s: float
    """Median time of a step [s]."""
    flops: int
    """Of one image and step, as this project computes them; the peers are given those of the exact variant."""
    first_loss: float
    """Before any step, on the same images and masks."""
    memory_gib: float
    """Peak of weights, optimizer and activations on a GPU; NaN on a CPU, where --memory measures it [GiB]."""


def measure(settings: Settings) -> tuple[dict[str, Measured], float]:
    """Time the variants in turns; returns what was measured of each, and the best rate of matrix products [FLOP/s]."""
    built = {name: _built(settings, name) for name in (PEER, *settings.variants)}
    contenders = {name: contender for name, (contender, _) in built.items()}
    losses = {name: contender.first_loss() for name, contender in contenders.items()}
    peak = Peak(settings, contenders[PEER].width)
    measures = {name: partial(step_and_peak, contenders[name], peak, settings) for name in contenders}
    times = take_turns(measures, repeats=settings.repeats, warmup=2)
    best = statistics.median(flops for pairs in times.values() for _, flops in pairs)
    medians = {name: statistics.median(taken for taken, _ in pairs) for name, pairs in times.items()}
    return {
        name: Measured(medians[name], contender.flops, losses[name], built[name][1])
        for name, contender in contenders.items()
    }, best


def _built(settings: Settings, name: str) -> tuple[Contender, float]:
    """Build a variant and take a step; returns it with the memory that this has taken on a GPU [GiB]."""
    import torch

    if settings.device != "cuda":
        return Contender(settings, name), math.nan
    before = torch.cuda.memory_allocated()
    contender = Contender(settings, name)
    torch.cuda.reset_peak_memory_stats()  # the peer was converted from a model of the trainer
    contender.step()
    contender.step()  # the first one has made the optimizer's state
    return contender, (torch.cuda.max_memory_allocated() - before) / 2**30


def rows(settings: Settings) -> Iterator[str]:
    """Measure, and yield the lines of the table."""
    from trainer.training.throughput import peak_flops

    measured, best = measure(settings)
    sheet = peak_flops()
    limit = f", data sheet {sheet / 1e12:.0f} TFLOP/s" if sheet else ""
    yield f"medians of {settings.repeats}; GEMM peak {best / 1e9:,.1f} GFLOP/s in the same run{limit}"
    yield f"{'':22}{'ms':>9}{'images/s':>10}{'GFLOP/image':>13}{'GFLOP/s':>10}{'of peak':>9}{'x peer':>8}" + (
        f"{'MFU':>7}" if sheet else ""
    )
    for name, found in measured.items():
        rate = settings.micro_batch / found.step_s
        flops = found.flops * rate
        yield (
            f"{name:22}{1000 * found.step_s:9.1f}{rate:10.2f}{found.flops / 1e9:13.2f}{flops / 1e9:10.1f}"
            f"{flops / best:9.2f}{measured[PEER].step_s / found.step_s:8.2f}"
            + (f"{flops / sheet:7.3f}" if sheet else "")
        )


def step_and_peak(contender: Contender, peak: Peak, settings: Settings) -> tuple[float, float]:
    """Return the time of a step [s] and, right after it, the peak of the machine [FLOP/s]."""

    def steps() -> None:
        for _ in range(settings.steps_in_a_row):
            contender.step()

    return seconds(steps, settings.device) / settings.steps_in_a_row, peak.flops()


def peak_gib(settings: Settings, name: str) -> float:
    """Take two steps; returns the highest memory above that of an idle process [GiB]."""
    import torch

    from trainer.training.throughput import forget_peak, peak_resident_gib

    idle_gib = forget_peak()
    contender = Contender(settings, name)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    forget_peak()  # the peer was converted from a model of the trainer
    for _ in range(2):
        contender.step()
    return torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else peak_resident_gib() - idle_gib


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    with loading("" if settings.only else "torch and transformers"):
        import torch
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU: leave it out")
    torch.set_num_threads(settings.num_threads)
    if settings.only:
        print(peak_gib(settings, settings.only))
        return 0
    print(f"{machine(settings.device)}, {settings.num_threads} threads")
    print(f"{settings.model} at {settings.image_size} pixels, micro batch {settings.micro_batch}")
    if settings.memory:
        for name in (PEER, *settings.variants):
            print(f"{name:22}{float(run_alone(__file__, '--only', name)):9.2f} GiB", flush=True)
        return 0
    for row in rows(settings):
        print(row, flush=True)
    return 0


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
