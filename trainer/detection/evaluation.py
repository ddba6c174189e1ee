"""Evaluation of detectors on test sets: scores, error rates, report."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config.provenance import versions
from trainer.config.scoring_settings import EvaluationSettings
from trainer.data.labels import CLASSES
from trainer.data.loader import Loader
from trainer.data.shards.index import ShardIndex, describe_index, list_shards, open_index
from trainer.data.stream import fixed_stream
from trainer.data.transforms.views import CenterView
from trainer.detection.detector import Detector, TrainedDetector
from trainer.detection.error_rates import FEW_IDENTITIES, json_threshold, summarise
from trainer.detection.figures import ScoredSet
from trainer.detection.leakage import fingerprints_of
from trainer.detection.report import HardSample, report_html
from trainer.detection.results import Results, markdown_table, terminal_table
from trainer.detection.scoring import (
    SUCCESS,
    Scores,
    Truth,
    check_labels,
    over_ranks,
    score,
    share_of,
    truth_of,
)
from trainer.distributed.devices import default_device, refuse_unusable_gpus
from trainer.distributed.ranks import join_ranks, leave_ranks
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError, without_secrets
from trainer.files import readable
from trainer.progress import Progress, is_main


@dataclass(frozen=True, slots=True)
class TestSet:
    """A named set of labelled shards."""

    name: str
    index: ShardIndex
    truth: Truth


@dataclass(slots=True)
class Measured:
    """What the main rank collects, pair by pair of model and test set."""

    scored: list[ScoredSet] = field(default_factory=list)
    hardest: list[HardSample] = field(default_factory=list)
    codes: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(model, test set) -> the return code of each image."""

    def add(
        self,
        detector: TrainedDetector,
        test_set: TestSet,
        scores: Scores,
        results: Results,
        settings: EvaluationSettings,
    ) -> None:
        """Write the scores of a pair and compute its figures."""
        self.codes[detector.name, test_set.name] = scores.code_N
        found = scored_set(detector, test_set, scores, settings)
        results.add(found, scores.code_N)
        found = dataclasses.replace(found, summary=summary_of(found, test_set, settings))
        self.scored.append(found)
        self.hardest += hardest_of(detector, test_set, found, settings)


def evaluate(settings: EvaluationSettings) -> Path:
    """Measure every model on every test set; returns the path of the report. All ranks call.

    Under a launcher the ranks share the forward passes, and rank 0 computes the figures from the gathered scores.

    Raises:
        ConfigError: before any work, about settings; DataError: about test sets. What was scored before stays on disk.
    """
    refuse_unusable_gpus()
    world = join_ranks(settings.num_threads)
    named = named_values(settings.models, "models")
    detectors = [world.together(functools.partial(open_detector, name, path, settings)) for name, path in named]
    named = named_values(settings.test_sets, "test_sets")
    sets = [open_on_ranks(name, shards, settings, world) for name, shards in named]
    world.together(lambda: [view_of(*pair) for pair in itertools.product(detectors, sets)])  # refuses other crops
    baselines = world.on_main(lambda: read_baselines(Path(settings.baselines), sets) if settings.baselines else [])
    warnings = world.on_main(lambda: [w for d in detectors for s in sets for w in overlaps(d, s, settings)])
    measured = Measured()
    with contextlib.ExitStack() as stack:
        opened: list[Results] = []
        world.on_main(lambda: opened.append(stack.enter_context(Results(Path(settings.output_dir)))))
        for detector, test_set in itertools.product(detectors, sets):
            scores = score_set(detector, test_set, settings, world)
            add = functools.partial(measured.add, detector, test_set, scores)
            world.on_main(lambda add=add: add(opened[0], settings))  # type: ignore[misc]

        def finish() -> str:
            evaluation = describe(detectors, sets, measured.scored, measured.codes, warnings, baselines, settings)
            return str(commit(evaluation, opened[0], measured, settings))

        report = Path(world.on_main(finish))
    leave_ranks(world)
    return report


def commit(evaluation: dict[str, Any], results: Results, measured: Measured, settings: EvaluationSettings) -> Path:
    """Write the files of an evaluation together, and print its table; returns the path of the report."""
    others = {Path(settings.markdown): markdown_table(evaluation)} if settings.markdown else {}
    evaluation = json.loads(without_secrets(json.dumps(evaluation)))  # it quotes commands and addresses
    text = json.dumps(evaluation, indent=1, allow_nan=False) + "\n"
    results.commit(text, report_html(evaluation, measured.scored, measured.hardest), others)
    print(terminal_table(evaluation) + "\n")
    for warning in evaluation["warnings"]:
        print(f"  note: {warning}")
    for what, name in (("figures", "eval.json"), ("scores", "scores.csv"), ("report", "report.html")):
        print(f"  {what:8} {results.path(name)}")
    return results.path("report.html")


def open_detector(name: str, path: str, settings: EvaluationSettings) -> TrainedDetector:
    """Load a detector; raises as `Detector.load` and `Detector.check_threshold`, and refuses an export.

    Raises:
        ConfigError: it is an export.
    """
    detector = Detector.load(path, init=settings.init, name=name, image_size=settings.image_size)
    if not isinstance(detector, TrainedDetector):
        raise ConfigError(
            f"models names {path!r}, an export, which does not hold the fingerprints of the people and images that it "
            "was trained on, so that a leak cannot be found: name its run of launch/finetune.py; launch/detect.py "
            "scores with exports"
        )
    detector.check_threshold(settings.threshold)
    return detector


def open_test_set(name: str, shards: str, settings: EvaluationSettings) -> TestSet:
    """Open the shards of a test set.

    Raises:
        DataError: labels are wrong, or a class is missing.
    """
    setting = f"--test_sets {name}"
    index_dir = Path(settings.index_dir) if settings.index_dir else None
    index = open_index(list_shards(shards, setting=setting), index_dir=index_dir, image_member=settings.image_member)
    if is_main():
        print(f"test set {name}: {describe_index(index)}")
    check_labels(index, setting=setting)
    return TestSet(name, index, truth_of(index, np.arange(len(index))))


def open_on_ranks(name: str, shards: str, settings: EvaluationSettings, world: World) -> TestSet:
    """Open a test set on rank 0, which writes the index, and then on the others; all ranks call."""
    found: list[TestSet] = []
    world.on_main(lambda: found.append(open_test_set(name, shards, settings)))
    return world.together(lambda: found[0] if found else open_test_set(name, shards, settings))


def overlaps(detector: Detector, test_set: TestSet, settings: EvaluationSettings) -> list[str]:
    """Name what a test set shares with the data that made or chose a detector.

    Raises:
        ConfigError: it does, and the user has not allowed it.
    """
    prints, found = fingerprints_of(test_set.index), []
    for role, verb in (("train", "was trained on"), ("val", "was chosen and calibrated by")):
        shared = detector.saved.seen[role].shared_with(prints) if role in detector.saved.seen else ""
        if shared:
            found.append(f"{detector.name} {verb} {shared} of test set {test_set.name}")
    if detector.saved.description.get("overlap"):
        found.append(f"{detector.name}: training and validation shared {detector.saved.description['overlap']}")
    if found and not settings.allow_overlap:
        raise ConfigError(
            f"{found[0]}: take other test data, or pass --allow_overlap true, which the report will record"
        )
    return found


def read_baselines(path: Path, sets: Sequence[TestSet]) -> list[dict[str, Any]]:
    """Read what tools/shortcut_baselines.py wrote.

    Raises:
        ConfigError: it is something else, or speaks of other test sets.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        found = {row["test_set"]: row.get("fingerprint") for row in rows if row["name"] and row["summary"]["pooled"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"baselines is {path}, which cannot be read ({error!r}): write it with tools/shortcut_baselines.py"
        ) from error
    for test_set in sets:
        if test_set.name not in found:
            raise ConfigError(
                f"baselines {path} measured {', '.join(found) or 'nothing'}, but not {test_set.name}: run "
                "tools/shortcut_baselines.py with the same --test_sets"
            )
        if found[test_set.name] not in (None, test_set.index.fingerprint):
            raise ConfigError(
                f"baselines {path} measured other images as {test_set.name}: run tools/shortcut_baselines.py again"
            )
    return rows


def view_of(detector: Detector, test_set: TestSet) -> CenterView:
    """Return how a detector sees the images of a test set; raises as `Detector.view_of`."""
    return detector.view_of(test_set.index, setting=f"--test_sets {test_set.name}")


def score_set(detector: Detector, test_set: TestSet, settings: EvaluationSettings, world: World) -> Scores:
    """Score every image of a test set; one that cannot be read has a reason instead. All ranks call.

    Raises:
        DataError: none can be read, or the storage failed.
    """
    index, batch = test_set.index, min(settings.micro_batch, len(test_set.index))
    mine = share_of(len(index), batch, world)
    stream = fixed_stream(index, mine, view_of(detector, test_set), batch=batch, noise_per_sample=1, substitute=False)
    what = f"{detector.name} on {test_set.name}" + (f", rank 0 of {world.size}" if world.size > 1 else "")
    shown = settings.progress_bar and world.is_main
    with Progress(len(mine), what=what, unit="image", shown=shown) as bar, torch.inference_mode():

        def forward(images_BCHW: torch.Tensor) -> torch.Tensor:
            bar.update(len(images_BCHW))
            return detector.logits(images_BCHW)

        batches = Loader(stream, num_workers=settings.num_workers)
        scores = over_ranks(world.together(lambda: score(forward, batches, default_device())), world)
    if np.isnan(scores.logit_N).all():
        raise DataError(f"test set {test_set.name}: none of {len(index)} images can be read ({scores.code_N[0]})")
    return scores


def scored_set(detector: Detector, test_set: TestSet, scores: Scores, settings: EvaluationSettings) -> ScoredSet:
    """Join scores with the labels and names of the images; `summary_of` adds the figures."""
    index, truth, decision = test_set.index, test_set.truth, detector.saved.decision
    return ScoredSet(
        model=detector.name,
        test_set=test_set.name,
        key_N=[readable(ref.key) for ref in index.samples(np.arange(len(index)))],
        label_N=truth.label_N,
        tool_N=truth.tool_N,
        score_N=decision.probability(scores.logit_N),
        threshold=decision.thresholds[settings.threshold],
        threshold_name=settings.threshold,
        summary={},
    )


def summary_of(found: ScoredSet, test_set: TestSet, settings: EvaluationSettings) -> dict[str, Any]:
    """Compute every figure; images that cannot be read count as failures and not as scores.

    Raises:
        DataError: no image of a class can be read.
    """
    read_N = ~np.isnan(found.score_N)
    chosen = np.flatnonzero(read_N).tolist()
    for label, name in enumerate(CLASSES):
        if not (found.label_N[read_N] == label).any():
            raise DataError(f"test set {test_set.name}: no {name} can be read, so nothing can be measured: repair it")
    return summarise(
        found.score_N[read_N],
        found.label_N[read_N],
        [found.tool_N[i] for i in chosen],
        [test_set.truth.people_N[i] for i in chosen],
        threshold=found.threshold,
        num_replicates=settings.num_replicates,
        seed=settings.seed,
    )


def hardest_of(
    detector: TrainedDetector, test_set: TestSet, found: ScoredSet, settings: EvaluationSettings
) -> list[HardSample]:
    """Draw the images of each class on which a detector is most wrong, with the flow of its attention."""
    worst = []
    for label in range(len(CLASSES)):
        mine_N = np.flatnonzero((found.label_N == label) & ~np.isnan(found.score_N))
        surest_N = np.argsort(found.score_N[mine_N] * (1 if label else -1), kind="stable")
        worst += mine_N[surest_N[: settings.num_hardest]].tolist()
    hardest = []
    stream = fixed_stream(
        test_set.index,
        worst,
        view_of(detector, test_set),
        batch=settings.micro_batch,
        noise_per_sample=1,
        substitute=False,
    )
    for batch in Loader(stream):
        with torch.inference_mode():
            maps_BRC = detector.model(batch.images_BCHW.to(default_device()), want="attention").cpu().numpy()
        pictures: NDArray[np.uint8] = batch.images_BCHW.permute(0, 2, 3, 1).numpy()
        hardest += [
            HardSample(
                model=found.model,
                test_set=found.test_set,
                key=found.key_N[i],
                label=int(found.label_N[i]),
                tool=found.tool_N[i],
                score=float(found.score_N[i]),
                image_HWC=pictures[place],
                attention_HW=maps_BRC[place],
            )
            for place, i in enumerate(batch.positions)
        ]
    return hardest


def cautions(detectors: Sequence[Detector], scored: Sequence[ScoredSet], settings: EvaluationSettings) -> list[str]:
    """Warn where intervals are too narrow, and of thresholds that call nothing, or everything, a morph."""
    found = []
    for detector in detectors:
        decision, name = detector.saved.decision, settings.threshold
        if not np.isfinite(decision.thresholds[name]):
            what = "nothing" if decision.thresholds[name] > 0 else "every image"
            why = [note for note in decision.notes if note.startswith(f"{name} ")]
            found.append(f"{detector.name} calls {what} a morph at its threshold {'; '.join(why) or name}")
    if not settings.num_replicates:
        return found
    for test_set, about in {s.test_set: s.summary["resampling"] for s in scored}.items():
        num_units = about["num_units"]
        if about["unit"] == "images":
            found.append(
                f"test set {test_set} names no identities: its intervals are from a bootstrap over images, too "
                "narrow if people appear more than once; pack it from a manifest with columns identity and identity_2"
            )
        elif about["num_unnamed"]:
            found.append(
                f"test set {test_set}: {about['num_unnamed']} images name no identity and count as a person each: "
                "intervals are too narrow if people appear more than once among them"
            )
        if num_units < FEW_IDENTITIES:
            found.append(
                f"test set {test_set} has {num_units} {'images' if about['unit'] == 'images' else 'identities'} in one "
                f"class: with fewer than {FEW_IDENTITIES}, 95 % intervals of the bootstrap cover less than that"
            )
    return found


def describe(
    detectors: Sequence[TrainedDetector],
    sets: Sequence[TestSet],
    scored: Sequence[ScoredSet],
    codes: Mapping[tuple[str, str], list[str]],
    warnings: list[str],
    baselines: list[dict[str, Any]],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Put everything into one JSON-able record.

    Args:
        detectors: that were tested.
        sets: on which they were.
        scored: the figures of each pair.
        codes: (detector, test set) -> the return code of each image.
        warnings: about overlaps.
        baselines: what tools/shortcut_baselines.py measured.
        settings: of the user.
    """
    first = detectors[0].name  # which images can be read does not depend on the detector
    return {
        "version": 1,
        "created": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "versions": versions(),
        "command": " ".join(sys.argv),
        "threshold_name": settings.threshold,
        "num_hardest": settings.num_hardest,
        "warnings": warnings + cautions(detectors, scored, settings),
        "models": [describe_detector(detector) for detector in detectors],
        "test_sets": [describe_test_set(test_set, codes[first, test_set.name]) for test_set in sets],
        "results": [
            {
                "model": s.model,
                "test_set": s.test_set,
                "threshold": None if s.threshold is None else json_threshold(s.threshold),
                "summary": s.summary,
            }
            for s in scored
        ],
        "baselines": baselines,
    }


def describe_detector(detector: TrainedDetector) -> dict[str, Any]:
    """Record what a detector is and how it decides."""
    description, decision, recipe = detector.saved.description, detector.saved.decision, detector.recipe
    mode, figures = "full fine-tuning", description["selection"]["figures"]
    if recipe.use_lora:
        mode = f"LoRA r={recipe.lora_r} on {', '.join(recipe.lora_target_modules)}"
    elif recipe.backbone_is_frozen:
        mode = "frozen encoder, trained head"
    return {
        "name": detector.name,
        "path": str(detector.saved.path),
        "mode": mode,
        "init": description["init"]["source"],
        "train_data": description["data"],
        "selection": {"data": description["selection"]["data"], "d_eer": figures["d_eer"]} if figures else None,
        "thresholds": {name: json_threshold(value) for name, value in decision.thresholds.items()},
        "threshold_rule": decision.rule,
        "threshold_notes": list(decision.notes),
    } | {name: description[name] for name in ("step", "calibration", "preprocessing", "recipe")}


def describe_test_set(test_set: TestSet, codes: Sequence[str]) -> dict[str, Any]:
    """Record what a test set holds, and how many of its images could not be scored.

    Args:
        test_set: in question.
        codes: the return code of each image.
    """
    failed = np.array([code != SUCCESS for code in codes])
    label_N, tools = test_set.truth.label_N, test_set.truth.tool_N
    return {
        "name": test_set.name,
        "shards": test_set.index.shards,
        "fingerprint": test_set.index.fingerprint,
        "num_bona_fide": int((label_N == 0).sum()),
        "num_morphs": int((label_N == 1).sum()),
        "tools": {name: tools.count(name) for name in sorted(set(tools) - {""})},
        "num_failed_bona_fide": int((failed & (label_N == 0)).sum()),
        "num_failed_morphs": int((failed & (label_N == 1)).sum()),
        "num_failed": int(failed.sum()),
        "return_codes": sorted(set(codes)),
    }


def named_values(text: str, setting: str) -> list[tuple[str, str]]:
    """Take NAME=VALUE;NAME=VALUE apart.

    Raises:
        ConfigError: a part has no name, or a name stands twice.
    """
    pairs = [part.strip().partition("=") for part in text.split(";") if part.strip()]
    for name, equals, value in pairs:
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(f"{setting} holds {name!r}, but must be NAME=VALUE;NAME=VALUE: give each a name")
    names = [name.strip() for name, _, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        raise ConfigError(
            f"{setting} names {twice[0]!r} twice: choose another name" if twice else f"{setting} is empty"
        )
    return [(name.strip(), value.strip()) for name, _, value in pairs]
