"""Time the loader against what users would pick instead, on one core, interleaved; prints medians and ratios.

Each candidate reads the same JPEGs of 256 and of 512 pixels and makes random 224 pixel crops, 64 a batch:

    trainer    tar shards, plan, crc check, decode by the crop, uint8 batch (decode_quality fast)
    repeats4   the same with four crops of each decoding (aug_repeats 4)
    full       trainer with decode_quality full, as detection uses it
    webdataset shards, PIL, torchvision RandomResizedCrop and flip, float tensors, batched (the usual pipeline)
    folder     torchvision ImageFolder and DataLoader, same transforms
    decode     simplejpeg alone, fast transforms, nothing else: the ceiling

With ``--train`` also the throughput of training steps fed by two loader workers, beside the same steps on one batch
that stays in memory.

Usage: python tools/bench/loader.py [--repeats 5] [--train true]

Examples:
    python tools/bench/loader.py --repeats 3 --train false
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tools.bench.common import Training, machine, medians, take_turns
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.shards.index import ShardIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    repeats: int = 5
    """How often each is measured; the median counts."""
    train: bool = True
    """Compare training steps that the loader feeds with steps on a batch in memory as well."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)


CLI = CommandLine(Settings, __doc__)
BATCH, SIZE, IMAGES, BATCHES = 64, 224, 512, 8
TRAIN_BATCH, TRAIN_STEPS = 32, 4


def picture(rng: np.random.Generator, side: int) -> bytes:
    """Encode a portrait-like picture: large shapes under fine texture, about 0.4 bytes a pixel as face sets have."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.integers(64, 192, (side // 2, side // 2, 3), dtype=np.uint8))
    grain = np.asarray(fine.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16) - 128
    file = io.BytesIO()
    mixed = (np.asarray(coarse).astype(np.int16) + grain // 3).clip(0, 255).astype(np.uint8)
    Image.fromarray(mixed).save(file, "JPEG", quality=92)
    return file.getvalue()


def prepare(folder: Path, side: int) -> tuple[list[bytes], Path]:
    """Write the pictures as one shard and as a folder tree; returns them and the shard."""
    rng = np.random.default_rng(side)
    pictures = [picture(rng, side) for _ in range(IMAGES)]
    tree = folder / "tree" / "0"
    tree.mkdir(parents=True)
    shard = folder / "s-000.tar"
    with tarfile.open(shard, "w") as tar:
        for number, payload in enumerate(pictures):
            (tree / f"{number:05d}.jpg").write_bytes(payload)
            info = tarfile.TarInfo(f"{number:05d}.jpg")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return pictures, shard


def trainer_batches(index: "ShardIndex", *, fast: bool, repeats: int = 1) -> Iterator[object]:
    """Stream batches as a training rank does."""
    from trainer.data.order.plan import Plan, Repeated
    from trainer.data.stream import Slice, train_stream
    from trainer.data.transforms.views import PretrainView

    view = PretrainView(size=SIZE, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=0, fast=fast)
    order, share = Repeated(Plan(len(index), 0), repeats, BATCH), Slice(BATCH, BATCH, repeats=repeats)
    return iter(train_stream(index, order, share, view, first_step=0, noise_per_sample=196))


def usual_transforms() -> "Callable[[Image.Image], Tensor]":
    """Return what public MAE code does to an image."""
    from torchvision import transforms

    from trainer.models.pixel_statistics import STATISTICS

    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*STATISTICS["imagenet"]),
        ]
    )
    return composed


def usual_webdataset(shard: Path) -> Iterator[object]:
    """Stream with webdataset's own reader, decoder, shuffle buffer and batching."""
    import webdataset as wds

    apply = usual_transforms()
    return iter(
        wds.WebDataset([str(shard)], shardshuffle=False, empty_check=False)
        .repeat()
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(lambda image: apply(image.convert("RGB")))
        .batched(BATCH)
    )


def image_folder(tree: Path) -> Iterator[object]:
    """Stream with torchvision's ImageFolder."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    loader = DataLoader(datasets.ImageFolder(str(tree), transform=usual_transforms()), batch_size=BATCH, shuffle=True)
    while True:
        yield from loader


def bare_decode(pictures: list[bytes]) -> Iterator[object]:
    """Decode and forget."""
    import simplejpeg

    while True:
        for start in range(0, IMAGES, BATCH):
            for payload in pictures[start : start + BATCH]:
                simplejpeg.decode_jpeg(payload, fastdct=True, fastupsample=True)
            yield None


def images_per_cpu_second(batches: Iterator[object]) -> float:
    """Take batches; returns images per second of CPU time."""
    start = time.process_time()
    for _ in range(BATCHES):
        next(batches)
    return BATCHES * BATCH / (time.process_time() - start)


def compare(side: int, repeats: int) -> None:
    """Print one table."""
    from trainer.data.shards.index import open_index

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, shard = prepare(folder, side)
        index = open_index([shard])
        candidates = {
            "trainer": trainer_batches(index, fast=True),
            "repeats4": trainer_batches(index, fast=True, repeats=4),
            "full": trainer_batches(index, fast=False),
            "webdataset": usual_webdataset(shard),
            "folder": image_folder(folder / "tree"),
            "decode": bare_decode(pictures),
        }
        measures = {name: partial(images_per_cpu_second, batches) for name, batches in candidates.items()}
        rates = medians(take_turns(measures, repeats=repeats))
    size_kb = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"{side} px, {size_kb:.0f} kB a JPEG, images/s on one core (median of {repeats}):")
    for candidate, rate in rates.items():
        print(f"  {candidate:11s} {rate:7.0f}   trainer/{candidate} {rates['trainer'] / rate:5.2f}x")


def compare_training(shard: Path, repeats: int) -> None:
    """Print the throughput of steps fed by two workers, beside steps on a batch in memory."""
    import torch

    from trainer.config.settings import PretrainRecipe
    from trainer.data.loader import Loader
    from trainer.data.order.plan import Plan
    from trainer.data.shards.index import open_index
    from trainer.data.stream import Batch, Slice, train_stream
    from trainer.data.transforms.views import PretrainView

    recipe = PretrainRecipe(
        model="vit_tiny_patch16_224", image_size=SIZE, decoder_width=128, decoder_depth=2, decoder_heads=4
    )
    training = Training(recipe, micro_batch=TRAIN_BATCH)
    index = open_index([shard])
    view = PretrainView(size=SIZE, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=0, fast=True)
    share = Slice(TRAIN_BATCH, TRAIN_BATCH)
    stream = train_stream(index, Plan(len(index), 0), share, view, first_step=0, noise_per_sample=training.num_patches)
    batches: Iterator[Batch] = iter(Loader(stream, num_workers=2, prefetch=4))
    fixed = next(batches)

    def steps(draw: Callable[[], Batch]) -> tuple[float, float]:
        """Take some steps; returns images/s and the share of the time that the steps waited for data."""
        start, waited_s = time.perf_counter(), 0.0
        for _ in range(TRAIN_STEPS):
            asked = time.perf_counter()
            batch = draw()
            waited_s += time.perf_counter() - asked
            training.step([training.mask(batch.images_BCHW, batch.noise_BN)])
        taken_s = time.perf_counter() - start
        return TRAIN_STEPS * TRAIN_BATCH / taken_s, waited_s / taken_s

    kinds = {"loader": partial(steps, lambda: next(batches)), "memory": partial(steps, lambda: fixed)}
    measured = take_turns(kinds, repeats=repeats)
    loader, memory = (statistics.median(rate for rate, _ in measured[name]) for name in kinds)
    waited = statistics.mean(share for _, share in measured["loader"])
    print(f"training ViT-Ti on {torch.get_num_threads()} threads, 2 workers, wall clock (median of {repeats}):")
    print(f"  in memory {memory:6.1f} images/s, from the loader {loader:6.1f}: {loader / memory:.1%}")
    print(f"  data-wait share of the steps fed by the loader {waited:.2%}")


def main(settings: Settings) -> int:
    """Print the comparison."""
    with loading("torch and torchvision"):
        import torch
    print(f"{machine()}, one process")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side in (256, 512):
        compare(side, settings.repeats)
    torch.set_num_threads(threads)
    if settings.train:
        with tempfile.TemporaryDirectory() as name:
            _, shard = prepare(Path(name), 256)
            compare_training(shard, settings.repeats)
    return 0


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
