"""Scoring of photographs without labels: launch/detect.py.

Batches are fixed by the list of images: batch k holds images k * micro_batch to (k + 1) * micro_batch - 1. Rank r of R
computes every R-th batch that is not done, so a score depends neither on the number of ranks nor on an interruption.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from trainer.config.provenance import versions
from trainer.config.settings import DetectionSettings
from trainer.data.images import Images, open_images
from trainer.data.loader import Loader
from trainer.detection.detector import Detector
from trainer.detection.error_rates import json_threshold
from trainer.detection.score_file import Job, PartialFile, return_code, scores_of
from trainer.detection.scoring import Scores, joined, over_ranks, score, share_of
from trainer.distributed.devices import default_device, refuse_unusable_gpus
from trainer.distributed.ranks import join_ranks, leave_ranks
from trainer.distributed.world import World
from trainer.progress import Progress


def detect(settings: DetectionSettings) -> Path:
    """Score every image and write the file of scores; returns its path. All ranks call.

    Raises:
        ConfigError: before any work, about settings; CheckpointError: about the detector; DataError: the storage fails.
    """
    refuse_unusable_gpus()
    world = join_ranks(settings.num_threads)
    images = open_images(settings.images, world, index_dir=settings.index_dir, image_member=settings.image_member)
    if world.is_main:
        print(images.note)
    detector = world.together(lambda: Detector.load(settings.model, init=settings.init))
    world.together(lambda: detector.check_threshold(settings.threshold))
    world.together(lambda: images.view(detector))  # refuses images that were cropped otherwise
    fingerprint = world.on_main(lambda: images.fingerprint)
    job = Job(Path(settings.output), describe_job(detector, fingerprint, len(images), settings))
    if world.on_main(job.is_finished):
        world.on_main(job.remove_partials)
        if world.is_main:
            print(f"{job.output} holds these scores already: nothing to do")
    else:
        scores = score_images(detector, images, job, settings, world)
        world.on_main(lambda: finish(detector, images, job, scores, settings))
    leave_ranks(world)
    return job.output


def describe_job(detector: Detector, fingerprint: str, num_images: int, settings: DetectionSettings) -> dict[str, Any]:
    """Return whatever the scores depend on."""
    description = json.dumps(detector.saved.description, sort_keys=True)
    return {
        "detector": hashlib.sha256(description.encode()).hexdigest(),
        "images": fingerprint,
        "num_images": num_images,
        "threshold": settings.threshold,
        "imageLabel": settings.label,
        "micro_batch": settings.micro_batch,
        "format": Path(settings.output).suffix,
    }


def score_images(detector: Detector, images: Images, job: Job, settings: DetectionSettings, world: World) -> Scores:
    """Score the batches that an earlier start has not scored, and gather them over ranks; all ranks call."""
    batch, device = settings.micro_batch, default_device()
    with closing(world.together(lambda: PartialFile(job, world.rank))) as partial:
        done: dict[int, dict[str, Any]] = {}
        world.on_main(lambda: done.update(job.read_partials()))
        done_batches = world.on_main(lambda: sorted(done))
        partial.begin()
        if world.is_main and done_batches:
            print(f"going on: {sum(len(line['codes']) for line in done.values())} images are scored already")
        mine = share_of(len(images), batch, world, done=done_batches)
        parts = [scores_of(done, batch)]
        loader = Loader(images.stream(mine, images.view(detector), batch=batch), num_workers=settings.num_workers)
        what = f"rank 0 of {world.size}" if world.size > 1 else ""
        shown = settings.progress_bar and world.is_main
        with Progress(len(mine), what=what, unit="image", shown=shown) as bar, torch.inference_mode():

            def work() -> None:
                for loaded in loader:
                    parts.append(score(detector.logits, [loaded], device))
                    partial.add(loaded.positions[0] // batch, parts[-1])
                    bar.update(len(loaded.positions))

            world.together(work)
        return over_ranks(joined(parts), world)


def finish(detector: Detector, images: Images, job: Job, scores: Scores, settings: DetectionSettings) -> None:
    """Write the file of scores with its description, and print what was decided."""
    decision, threshold = detector.saved.decision, detector.thresholds[settings.threshold]
    score_N = decision.probability(scores.logit_N)
    more = {
        "created": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "command": " ".join(sys.argv),
        "versions": versions(),
        "model": str(detector.saved.path),
        "threshold": json_threshold(threshold),
        "preprocessing": detector.saved.description["preprocessing"],
    }
    render = {"score_N": score_N.tolist(), "threshold": threshold, "label": settings.label}
    job.commit(images.names(), scores, more, render)
    print(summary(scores.code_N, int((score_N >= threshold).sum()), settings.threshold, threshold))
    print(f"  scores   {job.output}")


def summary(codes: Sequence[str], num_morphs: int, name: str, threshold: float) -> str:
    """Say how many images are morphs at the threshold, and how many could not be scored."""
    failed = [return_code(code) for code in codes]
    counts = {code: failed.count(code) for code in dict.fromkeys(failed)}
    num_read = counts.pop("Success", 0)
    left = "".join(f"; {count} without a score: {code}" for code, count in counts.items())
    return f"{num_morphs} of {num_read} images are morphs at the threshold {name} ({threshold:.6g}){left}"
