"""From labelled images to scores, calibration and thresholds.

The score of an image is P(morph), classes are [bonafide, morph] = [0, 1]. The decision of a detector, its calibration
and its thresholds, is fitted on validation data once and stored with it; test data are only measured.

Shapes: N samples, B of a batch.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.labels import CLASSES
from trainer.data.loader import to_device
from trainer.data.shards.index import NO_GROUP, ShardIndex, missing_labels
from trainer.data.shards.members import CLASS_FIELD, IDENTITY_FIELDS
from trainer.data.stream import Batch
from trainer.data.transforms.faces import Box
from trainer.detection.error_rates import (
    BSCER_LIMITS,
    MACER_LIMITS,
    Calibration,
    d_eer,
    error_curve,
    fit_platt,
    samples_needed,
    threshold_for_bscer,
    threshold_for_macer,
)
from trainer.distributed.world import World
from trainer.errors import DataError

SUCCESS = "Success"
RULE = "expected error on new images at most the limit, if they come from where the validation data came from"
"""The promise of the thresholds that `fit_decision` makes; recorded in every detector."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A detector's scores of the samples of a set, in ascending order of their numbers."""

    sample_N: NDArray[np.int64]
    logit_N: NDArray[np.float64]
    """log P(morph) - log P(bona fide) before calibration; NaN where the image could not be read."""
    code_N: list[str]
    """`SUCCESS`, or why the image could not be read."""
    face_boxes: dict[int, Box] = field(default_factory=dict)
    """Sample -> the face that its photograph was cropped to [pixels]; empty if photographs are seen whole."""
    reconstruction_errors: dict[int, float] = field(default_factory=dict)
    """Sample -> the error of the detector's pre-training on it, in units of val_loss, where it was computed."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The labels and names of the samples of a set."""

    label_N: NDArray[np.int64]
    tool_N: list[str]
    """Attack tool of each morph, "" for bona fides."""
    people_N: list[tuple[str, ...]]
    """The identities in each image, as far as its json names them."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How scores become probabilities and decisions; fitted on validation data."""

    calibration: Calibration
    thresholds: dict[str, float]
    """Name -> threshold on P(morph): ``d_eer``, ``macer_0.05`` (MACER on new images at most 5 %), ``bscer_0.01``."""
    rule: str = ""
    """Which images the limits hold for; "" in detectors of older versions means the validation images themselves."""
    notes: tuple[str, ...] = ()
    """The limits for which there were too few validation images."""

    def probability(self, logit_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the calibrated P(morph); NaN stays NaN."""
        return self.calibration.apply(logit_N)


UNCALIBRATED = Decision(Calibration(1.0, 0.0), {"d_eer": 0.5})
"""For a detector without validation data: the plain softmax, and a threshold of one half."""


def score(forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Scores:
    """Score this rank's batches of a stream that does not substitute unreadable images.

    Args:
        forward: uint8 images -> logits (B, 2).
        batches: of a stream whose positions are sample numbers.
        device: where ``forward`` computes.
    """
    samples, logits, codes = [], [], []
    boxes: dict[int, Box] = {}
    for batch in batches:
        logits_BC = forward(to_device(batch, device).images_BCHW).double().cpu()
        failed_B = torch.tensor([bool(failure) for failure in batch.failures])
        logits.append(torch.where(failed_B, torch.nan, logits_BC[:, 1] - logits_BC[:, 0]).numpy())
        samples += batch.positions
        codes += [failure or SUCCESS for failure in batch.failures]
        boxes |= {i: box for i, box in zip(batch.positions, batch.face_boxes, strict=False) if box}
    return Scores(np.array(samples, dtype=np.int64), np.concatenate(logits) if logits else np.empty(0), codes, boxes)


def joined(parts: Sequence[Scores]) -> Scores:
    """Join scores of different samples, in ascending order of the samples."""
    sample_N = np.concatenate([part.sample_N for part in parts])
    logit_N, codes = np.concatenate([part.logit_N for part in parts]), [c for part in parts for c in part.code_N]
    order_N = np.argsort(sample_N, kind="stable")
    boxes = {i: box for part in parts for i, box in part.face_boxes.items()}
    errors = {i: error for part in parts for i, error in part.reconstruction_errors.items()}
    return Scores(sample_N[order_N], logit_N[order_N], [codes[i] for i in order_N.tolist()], boxes, errors)


def share_of(num_samples: int, batch: int, world: World, *, done: Collection[int] = ()) -> list[int]:
    """Return the samples of this rank: whole batches in turn, so that they are those of a single process.

    The result of a matrix product can depend in its last bits on the number of rows, that is on the batch::

        8 samples in batches of 3 on two ranks    rank 0    0 1 2   6 7
                                                  rank 1    3 4 5

    Args:
        num_samples: of the whole set.
        batch: samples of a batch; the last one may have fewer.
        world: this rank among its ranks.
        done: numbers of batches that nobody needs to compute.
    """
    finished = set(done)
    left = [k for k in range(-(-num_samples // batch)) if k not in finished]
    mine = left[world.rank :: world.size]
    return [i for k in mine for i in range(k * batch, min((k + 1) * batch, num_samples))]


def over_ranks(local: Scores, world: World) -> Scores:
    """Gather the ranks' scores; a sample that several ranks measured counts once. All ranks call."""
    if world.size == 1:
        return local
    from trainer.detection.torch_metrics import GatheredScores  # imports torchmetrics, which takes seconds

    gathered = GatheredScores(process_group=world.decisions)
    gathered.update(torch.from_numpy(local.logit_N), torch.from_numpy(local.sample_N))
    sample_N, logit_N = gathered.compute()
    failed = [(i, code) for i, code in zip(local.sample_N.tolist(), local.code_N, strict=True) if code != SUCCESS]
    reasons = dict(pair for pairs in world.gather_over_ranks(failed) for pair in pairs)
    boxes = {i: tuple(box) for i, box in _gathered(local.face_boxes, world)}
    errors = dict(_gathered(local.reconstruction_errors, world))
    return Scores(sample_N, logit_N, [reasons.get(i, SUCCESS) for i in sample_N.tolist()], boxes, errors)


def _gathered(local: dict[int, Any], world: World) -> list[tuple[int, Any]]:
    """Give every rank what any rank knows of samples; JSON would turn their numbers into text as keys."""
    return [(i, value) for pairs in world.gather_over_ranks(list(local.items())) for i, value in pairs]


def truth_of(index: ShardIndex, sample_N: NDArray[np.int64]) -> Truth:
    """Look up label, attack tool and identities of some samples."""
    label_N = index.labels[sample_N].astype(np.int64)
    tools = _group(index, "attack", sample_N)
    people = [_group(index, name, sample_N) for name in IDENTITY_FIELDS]
    named = [tool or "unnamed" if label else "" for tool, label in zip(tools, label_N.tolist(), strict=True)]
    return Truth(label_N, named, [tuple(p for p in both if p) for both in zip(*people, strict=True)])


def check_labels(index: ShardIndex, *, setting: str, both: bool = True) -> None:
    """Refuse a set whose labels cannot train or test a detector.

    Args:
        index: of the set.
        setting: the flag that named it, for messages.
        both: both classes must occur.

    Raises:
        DataError: a label is missing, is not 0 or 1, or contradicts the name of its class; or a class is missing.
    """
    label_N = index.labels
    wrong = np.flatnonzero((label_N < 0) | (label_N > 1))
    if len(wrong):
        ref = index.sample(int(wrong[0]))
        what = "no label" if ref.label < 0 else f"label {ref.label}"
        missing = missing_labels(index)
        raise DataError(
            f"{setting}: {len(wrong)} of {len(index)} samples are neither 0 (bona fide) nor 1 (morph); {ref.key} "
            f"in {ref.shard} has {what}{f' ({missing})' if missing else ''}: write the shards from a manifest with a "
            "column label, or from a folder for each class with tools/make_shards.py --folder_labels true"
        )
    inverted = index.tally.unusable[CLASS_FIELD]
    if inverted:
        example = index.tally.examples[f"unusable {CLASS_FIELD}"]
        raise DataError(
            f"{setting}: {inverted} of {len(index)} samples have a label that contradicts the name of their class, "
            f"such as {example}: bonafide is 0 and morph is 1, so pack the images again with tools/make_shards.py"
        )
    if both:
        for label, name in enumerate(CLASSES):
            if not (label_N == label).any():
                raise DataError(f"{setting}: none of {len(index)} samples is a {name} (label {label}): add some")


def fit_decision(logit_N: NDArray[np.float64], label_N: NDArray[np.int64]) -> Decision:
    """Fit calibration and thresholds on validation data; unreadable images are left out.

    The thresholds of limits hold for new images: there the expected error is at most the limit.
    """
    read_N = ~np.isnan(logit_N)
    logit_N, label_N = logit_N[read_N], label_N[read_N]
    calibration = fit_platt(logit_N, label_N)
    score_N = calibration.apply(logit_N)
    morph_N, bona_fide_N = score_N[label_N == 1], score_N[label_N == 0]
    found, notes = {"d_eer": d_eer(error_curve(score_N, label_N)).threshold}, []
    for limit in MACER_LIMITS:
        found[name := f"macer_{limit:.2f}"] = threshold_for_macer(morph_N, limit)
        if len(morph_N) < samples_needed(limit):
            notes.append(_too_few(f"{name} is minus infinity: {len(morph_N)} attacks", limit))
    for limit in BSCER_LIMITS:
        found[name := f"bscer_{limit:.2f}"] = threshold_for_bscer(bona_fide_N, limit)
        if len(bona_fide_N) < samples_needed(limit):
            notes.append(_too_few(f"{name} is infinity: {len(bona_fide_N)} bona fides", limit))
    return Decision(calibration, {name: float(value) for name, value in found.items()}, RULE, tuple(notes))


def _too_few(what: str, limit: float) -> str:
    return f"{what} cannot guarantee {100 * limit:g} %: need at least {samples_needed(limit)}"


def validation_figures(scores: Scores, label_N: NDArray[np.int64]) -> dict[str, Any]:
    """Compute the figures of a validation: D-EER, cross-entropy, and the number of unreadable images."""
    read_N = ~np.isnan(scores.logit_N)
    logit_N, label_N = scores.logit_N[read_N], label_N[read_N]
    signed_N = np.where(label_N == 1, logit_N, -logit_N)
    return {
        "d_eer": float(d_eer(error_curve(logit_N, label_N)).value),
        "loss": float(np.logaddexp(0.0, -signed_N).mean()),
        "num_failed": int((~read_N).sum()),
    }


def _group(index: ShardIndex, name: str, sample_N: NDArray[np.int64]) -> list[str]:
    if name not in index.group_fields:
        return [""] * len(sample_N)
    values, codes_N = index.groups(name)
    return ["" if code == NO_GROUP else values[code] for code in codes_N[sample_N].tolist()]
