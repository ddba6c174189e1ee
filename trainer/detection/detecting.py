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
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.config.provenance import versions
from trainer.config.scoring_settings import DetectionSettings
from trainer.data.images import Images, open_images
from trainer.data.loader import Loader
from trainer.detection.detector import Detector
from trainer.detection.error_rates import json_threshold
from trainer.detection.occlusion import GRID
from trainer.detection.score_file import Job, PartialFile, return_code, scores_of
from trainer.detection.scoring import Scores, joined, over_ranks, score, share_of
from trainer.distributed.devices import default_device, refuse_unusable_gpus
from trainer.distributed.ranks import join_ranks, leave_ranks
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.progress import Progress

if TYPE_CHECKING:
    from trainer.detection.explaining import Explainer


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
        world.on_main(lambda: refuse_used_folder(settings, job))
        explainer = world.together(lambda: explainer_of(detector, settings, world))
        scores = score_images(detector, images, job, settings, world, explainer)
        world.on_main(lambda: finish(detector, images, job, scores, settings, explainer))
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
        "explain": settings.explain,
    }


def refuse_used_folder(settings: DetectionSettings, job: Job) -> None:
    """Refuse a folder for pictures that holds files, unless this job has begun it.

    Raises:
        ConfigError: as said, or it is no folder.
    """
    folder = Path(settings.explain or "")
    if settings.explain and folder.exists() and not (folder.is_dir() and (job.partials() or not any(folder.iterdir()))):
        what = "holds files of something else" if folder.is_dir() else "is a file"
        raise ConfigError(f"explain is {settings.explain!r}, but it {what}: name a new folder")


def explainer_of(detector: Detector, settings: DetectionSettings, world: World) -> "Explainer | None":
    """Prepare the pictures that --explain asks for."""
    if settings.explain is None:
        return None
    from trainer.detection.explaining import open_explainer  # imports DeepSpeed and matplotlib, which takes seconds

    explainer, note = open_explainer(detector, Path(settings.explain), init=settings.init, batch=settings.micro_batch)
    if world.is_main:
        print(f"explanations: {GRID * GRID + 1} forward passes of each image; {note}")
    return explainer


def score_images(
    detector: Detector,
    images: Images,
    job: Job,
    settings: DetectionSettings,
    world: World,
    explainer: "Explainer | None" = None,
) -> Scores:
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
        workers = settings.num_workers
        loader = Loader(images.stream(mine, images.view(detector), batch=batch), num_workers=workers)
        others = explainer.batches(images, mine, batch=batch, num_workers=workers) if explainer else repeat(None)
        what = f"rank 0 of {world.size}" if world.size > 1 else ""
        shown = settings.progress_bar and world.is_main
        with Progress(len(mine), what=what, unit="image", shown=shown) as bar, torch.inference_mode():

            def work() -> None:
                for loaded, other in zip(loader, others, strict=False):
                    parts.append(score(detector.logits, [loaded], device))
                    if explainer:
                        threshold = detector.thresholds[settings.threshold]
                        keys = keys_of(images, loaded.positions)
                        parts[-1] = explainer.explain(loaded, other, parts[-1], keys, threshold)
                    partial.add(loaded.positions[0] // batch, parts[-1])
                    bar.update(len(loaded.positions))

            world.together(work)
        return over_ranks(joined(parts), world)


def keys_of(images: Images, samples: list[int]) -> list[str]:
    """Return the path of each file, or the key of each sample, for the names of pictures."""
    return [fact["key"] for fact in images.facts(samples)]


def finish(
    detector: Detector,
    images: Images,
    job: Job,
    scores: Scores,
    settings: DetectionSettings,
    explainer: "Explainer | None" = None,
) -> None:
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
    others = {}
    if explainer:
        explainer.folder.mkdir(parents=True, exist_ok=True)
        keys = keys_of(images, scores.sample_N.tolist())
        others[explainer.table_path] = explainer.table(list(images.names()), keys, scores, render["score_N"])
    job.commit(images.names(), scores, more, render, others)
    print(summary(scores.code_N, int((score_N >= threshold).sum()), settings.threshold, threshold))
    print(f"  scores   {job.output}")
    if explainer:
        print(f"  pictures {explainer.folder}")


def summary(codes: Sequence[str], num_morphs: int, name: str, threshold: float) -> str:
    """Say how many images are morphs at the threshold, and how many could not be scored."""
    failed = [return_code(code) for code in codes]
    counts = {code: failed.count(code) for code in dict.fromkeys(failed)}
    num_read = counts.pop("Success", 0)
    left = "".join(f"; {count} without a score: {code}" for code, count in counts.items())
    return f"{num_morphs} of {num_read} images are morphs at the threshold {name} ({threshold:.6g}){left}"
