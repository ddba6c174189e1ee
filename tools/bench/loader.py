"""Time the loader against what users would pick instead, on one core, interleaved; prints medians and ratios.

Each candidate reads the same JPEGs of 256 and of 512 pixels and makes random 224 pixel crops, 64 a batch:

    ours       tar shards, plan, crc check, decode by the crop, uint8 batch (decode_quality fast)
    repeats4   the same with four crops of each decoding (aug_repeats 4)
    full       ours with decode_quality full, as detection uses it
    webdataset shards, PIL, torchvision RandomResizedCrop and flip, float tensors, batched (the usual pipeline)
    folder     torchvision ImageFolder and DataLoader, same transforms
    decode     simplejpeg alone, fast transforms, nothing else: the ceiling

With ``--train`` also the throughput of training steps fed by two loader workers, beside the same steps on one batch
that stays in memory.

Usage: python tools/bench/loader.py [--repeats 5] [--train true]
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import io
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from trainer.config.command_line import CommandLine
from trainer.config.settings import check_types
from trainer.data.loader import Loader
from trainer.data.order.plan import Plan, Repeated
from trainer.data.shards.index import ShardIndex, open_index
from trainer.data.stream import Batch, Slice, train_stream
from trainer.data.transforms.views import PretrainView
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask

BATCH, SIZE, IMAGES, BATCHES = 64, 224, 512, 8


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


def ours(index: ShardIndex, *, fast: bool, repeats: int = 1) -> Iterator[object]:
    """Stream batches as a training rank does."""
    view = PretrainView(size=SIZE, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=0, fast=fast)
    order, share = Repeated(Plan(len(index), 0), repeats, BATCH), Slice(BATCH, BATCH, repeats=repeats)
    return iter(train_stream(index, order, share, view, first_step=0, noise_per_sample=196))


def usual_transforms() -> Callable[[Image.Image], torch.Tensor]:
    """Return what public MAE code does to an image."""
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    composed: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, deviation),
        ]
    )
    return composed


def usual_webdataset(shard: Path) -> Iterator[object]:
    """Stream with webdataset's own reader, decoder, shuffle buffer and batching."""
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
    loader = DataLoader(datasets.ImageFolder(str(tree), transform=usual_transforms()), batch_size=BATCH, shuffle=True)
    while True:
        yield from loader


def bare_decode(pictures: list[bytes]) -> Iterator[object]:
    """Decode and forget."""
    while True:
        for start in range(0, IMAGES, BATCH):
            for payload in pictures[start : start + BATCH]:
                simplejpeg.decode_jpeg(payload, fastdct=True, fastupsample=True)
            yield None


def rates(candidates: dict[str, Iterator[object]], repeats: int) -> dict[str, float]:
    """Return images per second of CPU time, medians over interleaved repeats."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, batches in candidates.items():
            start = time.process_time()
            for _ in range(BATCHES):
                next(batches)
            if repeat:
                found[name].append(BATCHES * BATCH / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def compare(side: int, repeats: int) -> None:
    """Print one table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, shard = prepare(folder, side)
        index = open_index([shard])
        found = rates(
            {
                "ours": ours(index, fast=True),
                "repeats4": ours(index, fast=True, repeats=4),
                "full": ours(index, fast=False),
                "webdataset": usual_webdataset(shard),
                "folder": image_folder(folder / "tree"),
                "decode": bare_decode(pictures),
            },
            repeats,
        )
    size_kb = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"{side} px, {size_kb:.0f} kB a JPEG, images/s on one core (median of {repeats}):")
    for candidate, rate in found.items():
        print(f"  {candidate:11s} {rate:7.0f}   ours/{candidate} {found['ours'] / rate:5.2f}x")


def compare_training(index: ShardIndex, repeats: int) -> None:
    """Print the throughput of steps fed by two workers, beside steps on a batch in memory."""
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=SIZE, fixed_positions=True)
    model = MaskedAutoencoder(encoder, DecoderOptions(decoder_width=128, decoder_depth=2, decoder_heads=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    view = PretrainView(size=SIZE, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=0, fast=True)
    stream = train_stream(
        index, Plan(len(index), 0), Slice(32, 32), view, first_step=0, noise_per_sample=encoder.num_patches
    )
    batches = iter(Loader(stream, num_workers=2, prefetch=4))
    fixed: Batch = next(batches)
    waited_s = 0.0

    def step(batch: Batch) -> None:
        mask = draw_mask(batch.noise_BN, mask_ratio=0.75, grid=encoder.grid)
        model(batch.images_BCHW, *mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, list[float]] = {"loader": [], "memory": []}
    for repeat in range(repeats + 1):
        for name, times in found.items():
            start = time.perf_counter()
            for _ in range(4):
                asked = time.perf_counter()
                batch = next(batches) if name == "loader" else fixed
                waited_s += (time.perf_counter() - asked) * (repeat > 0)
                step(batch)
            if repeat:
                times.append(4 * 32 / (time.perf_counter() - start))
    loader, memory = statistics.median(found["loader"]), statistics.median(found["memory"])
    total_s = sum(4 * 32 / rate for rate in found["loader"])
    print(f"training ViT-Ti on {torch.get_num_threads()} threads, 2 workers, wall clock (median of {repeats}):")
    print(f"  in memory {memory:6.1f} images/s, from the loader {loader:6.1f}: {loader / memory:.1%}")
    print(f"  data-wait share of the steps fed by the loader {waited_s / total_s:.2%}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    repeats: int = 5
    """How often each is measured; the median counts."""
    train: bool = True
    """Compare training steps that the loader feeds with steps on a batch in memory as well."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.repeats < 1:
            raise ConfigError(f"repeats is {self.repeats}, but must be at least 1")


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Print the comparison."""
    cores = os.cpu_count()
    print(f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}, one process")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side in (256, 512):
        compare(side, settings.repeats)
    torch.set_num_threads(threads)
    if settings.train:
        with tempfile.TemporaryDirectory() as name:
            _, shard = prepare(Path(name), 256)
            compare_training(open_index([shard]), settings.repeats)
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
