"""Features of shards, folders and lists: launch/embed.py.

Batches are fixed by the list of images: batch k holds images k * micro_batch to (k + 1) * micro_batch - 1. A part is a
fixed number of batches. Rank r of R computes every R-th part that is not done, so features depend neither on the number
of ranks nor on an interruption.

Shapes: B images of a batch, n of a part, D width.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.feature_settings import EmbeddingSettings
from trainer.config.provenance import versions
from trainer.data.images import Images, open_images
from trainer.data.loader import Loader, to_device
from trainer.data.stream import Batch
from trainer.detection.scoring import share_of
from trainer.distributed.devices import default_device, refuse_unusable_gpus
from trainer.distributed.ranks import join_ranks, leave_ranks
from trainer.distributed.world import World
from trainer.features.models import FeatureModel, open_model
from trainer.features.store import REASON, Array, FeatureStore
from trainer.progress import Progress


def embed(settings: EmbeddingSettings) -> Path:
    """Compute and write the features of every image; returns the folder. All ranks call.

    Raises:
        ConfigError: before any work, about settings; CheckpointError: about the model; DataError: the storage fails.
    """
    refuse_unusable_gpus()
    world = join_ranks(settings.num_threads)
    model = world.together(lambda: open_model(settings))
    images = open_images(settings.images, world, index_dir=settings.index_dir, image_member=settings.image_member)
    world.together(lambda: images.view(model))  # refuses images that were cropped otherwise
    if world.is_main:
        print(f"{model.about['origin']}: {', '.join(f'{name} ({width})' for name, width in model.widths.items())}")
        print(images.note)
    fingerprint = world.on_main(lambda: images.fingerprint)
    store = FeatureStore(Path(settings.output_dir), describe_job(model, fingerprint, len(images), settings))
    if world.on_main(store.is_finished):
        if world.is_main:
            print(f"{store.folder} holds these features already: nothing to do")
    else:
        with ExitStack() as stack:

            def begin() -> None:
                stack.enter_context(store.begin())

            world.on_main(begin)
            compute(model, images, store, settings, world)
            world.on_main(lambda: finish(model, store))
    leave_ranks(world)
    return store.folder


def describe_job(model: FeatureModel, fingerprint: str, num_images: int, settings: EmbeddingSettings) -> dict[str, Any]:
    """Return whatever the files depend on."""
    return {
        "model": {name: value for name, value in model.about.items() if name != "origin"},
        "features": model.widths,
        "images": fingerprint,
        "num_samples": num_images,
        "micro_batch": settings.micro_batch,
        "part_samples": settings.micro_batch * settings.part_batches,
        "dtype": settings.dtype,
        "format": settings.format,
    }


def compute(
    model: FeatureModel, images: Images, store: FeatureStore, settings: EmbeddingSettings, world: World
) -> None:
    """Compute this rank's parts of those that no earlier start has written; all ranks call."""
    done = world.on_main(store.done_parts)
    if world.is_main and done:
        print(f"going on: {len(done)} of {store.num_parts} files are written already")
    mine = share_of(len(images), store.job["part_samples"], world, done=done)
    stream = images.stream(mine, images.view(model), batch=settings.micro_batch)
    what = f"rank 0 of {world.size}" if world.size > 1 else ""
    shown = settings.progress_bar and world.is_main
    with Progress(len(mine), what=what, unit="image", shown=shown) as bar, torch.inference_mode():

        def work() -> None:
            pending: list[tuple[dict[str, Array], list[dict[str, Any]]]] = []
            for batch in Loader(stream, num_workers=settings.num_workers):
                pending.append((features_of(batch, model), rows_of(batch, images)))
                part, place = divmod(batch.positions[-1] + 1, store.job["part_samples"])
                if place == 0 or batch.positions[-1] + 1 == len(images):  # the last batch of its part
                    _write(store, part - (place == 0), pending)
                    pending = []
                bar.update(len(batch.positions))

        world.together(work)


def features_of(batch: Batch, model: FeatureModel) -> dict[str, Array]:
    """Compute the features (B, D), float32, of a batch; rows of images that could not be read are NaN."""
    found = model.compute(to_device(batch, default_device()).images_BCHW)
    arrays: dict[str, Array] = {name: value_BD.cpu().numpy() for name, value_BD in found.items()}
    failed = [i for i, failure in enumerate(batch.failures) if failure]
    for name in arrays if failed else ():
        arrays[name] = arrays[name].copy()
        arrays[name][failed] = np.nan
    return arrays


def rows_of(batch: Batch, images: Images) -> list[dict[str, Any]]:
    """Return what is known of each image of a batch, and why it could not be read."""
    facts = images.facts(batch.positions)
    return [fact | ({REASON: failure} if failure else {}) for fact, failure in zip(facts, batch.failures, strict=True)]


def _write(store: FeatureStore, part: int, batches: Sequence[tuple[dict[str, Array], list[dict[str, Any]]]]) -> None:
    arrays = {name: np.concatenate([found[name] for found, _ in batches]) for name in batches[0][0]}
    store.write_part(part, arrays, [row for _, rows in batches for row in rows])


def finish(model: FeatureModel, store: FeatureStore) -> None:
    """Write the index, and say what there is."""
    more = {
        "model": model.about,
        "created": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "command": " ".join(sys.argv),
        "versions": versions(),
    }
    about = store.finish(more)
    lost = "".join(f"; {count} without features: {reason}" for reason, count in about["unreadable"].items())
    print(f"features of {about['num_samples'] - about['num_unreadable']} of {about['num_samples']} images{lost}")
    print(f"  features {store.folder}")
