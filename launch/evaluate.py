"""Judge morph detectors on test sets: MACER, BSCER, D-EER with intervals, scores, and a report.

Models are runs of launch/finetune.py, test sets are labelled shards; each gets a name. Thresholds and calibration are
those that were fitted on a detector's validation data; nothing is fitted on test data. Writes into OUTPUT:

    [timestamp]_eval.json     every figure
    [timestamp]_scores.csv    a row for each model and image: key, label, score = P(morph), isMorph, return code
    [timestamp]_report.html   one self-contained page: DET curves, tables, histograms, hardest images

Usage: python launch/evaluate.py --models 'lora=runs/lora;full=runs/full' --test_sets 'frll=frll/*.tar;mad=mad/*.tar'

Examples:
    python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar'
"""

from launch.early import read_early

if __name__ == "__main__":
    read_early(__file__, loads="torch and the model library")

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from launch.command_line import configure_tool, run
from launch.data import pixels_of, span_reader
from launch.detectors import preprocessing_of, rebuild, recipe_of
from launch.run_setup import versions
from trainer.config import DetectorRecipe, DetectorRuntime, check_types
from trainer.data.augment import CenterView
from trainer.data.loader import Loader
from trainer.data.overlap import prints_of
from trainer.data.shards import ShardIndex, describe_index, list_shards, open_index
from trainer.data.stream import fixed_stream
from trainer.engine import default_device
from trainer.errors import ConfigError, DataError, without_secrets
from trainer.evaluate import SUCCESS, Truth, check_labels, score, truth_of
from trainer.files import write_atomically
from trainer.metrics import summarise
from trainer.models.detector import MorphDetector
from trainer.report import HardSample, ScoredSet, write_report
from trainer.saved_detector import SavedDetector, load_detector


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    models: str = ""
    """Detectors, as NAME=RUN;NAME=RUN, where RUN is an output_dir of launch/finetune.py or its detector folder."""
    test_sets: str = ""
    """Labelled shards, as NAME=SHARDS;NAME=SHARDS, where SHARDS is what --data takes."""
    output_dir: str = "results"
    """Where the three files go."""
    threshold: str = "d_eer"
    """Which of a detector's thresholds decides isMorph: d_eer, macer_0.01 ... 0.20, bscer_0.01, bscer_0.10."""
    init: str | None = None
    """Where the frozen encoder's weights are now, if not where training found them; they are checked."""
    image_size: int | None = None
    """Refuse detectors of another image size; none takes each at its own [pixels]."""
    allow_overlap: bool = False
    """Measure although people or images of a test set were trained on or chose the model; the report says so."""
    num_replicates: int = 1000
    """Replicates of the bootstrap over people, for the intervals; 0 for none."""
    seed: int = 0
    """Of the bootstrap."""
    num_hardest: int = 12
    """Hardest images of each model and test set in the report [images]."""
    baselines: str | None = None
    """JSON of tools/shortcut_baselines.py, to stand beside the models."""
    micro_batch: int = 64
    """Images in one forward pass [images]."""
    num_workers: int = 2
    """Loader processes; 0 loads in this one."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg; none: the only one, or the plain one."""
    num_threads: int | None = None
    """CPU threads; none leaves torch's choice."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("micro_batch", "num_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        for name in ("num_workers", "num_replicates", "num_hardest"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must not be negative")


@dataclass(frozen=True, slots=True)
class TestSet:
    """A named set of labelled shards."""

    name: str
    index: ShardIndex
    truth: Truth


@dataclass(frozen=True, slots=True)
class Detector:
    """A named detector, ready to score."""

    name: str
    saved: SavedDetector
    recipe: DetectorRecipe
    model: MorphDetector


def read(argv: list[str]) -> Settings | None:
    """Read the command line; None where it asked for help."""
    return configure_tool(argv, Settings(), __doc__, required=("models", "test_sets"))


def main(words: list[str]) -> int:
    """Return the exit code."""
    settings = read(words)
    if settings is None:
        return 0
    evaluate(settings)
    return 0


def evaluate(settings: Settings) -> Path:
    """Measure every model on every test set; returns the path of the report."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    detectors = [open_detector(name, Path(path), settings) for name, path in named_values(settings.models, "models")]
    sets = [open_test_set(name, shards, settings) for name, shards in named_values(settings.test_sets, "test_sets")]
    warnings = [warning for d in detectors for s in sets for warning in overlaps(d, s, settings)]
    scored, hardest = [], []
    codes: dict[tuple[str, str], list[str]] = {}
    for detector in detectors:
        for test_set in sets:
            found, codes[detector.name, test_set.name] = measure(detector, test_set, settings)
            scored.append(found)
            hardest += hardest_of(detector, test_set, found, settings)
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    evaluation = describe(detectors, sets, scored, codes, warnings, settings)
    evaluation = json.loads(without_secrets(json.dumps(evaluation)))  # it quotes commands and addresses
    write_atomically(output / f"{stamp}_eval.json", json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
    write_atomically(output / f"{stamp}_scores.csv", scores_csv(scored, codes))
    report = output / f"{stamp}_report.html"
    write_report(report, evaluation, scored, hardest)
    print(table(evaluation) + "\n")
    for what, name in (("figures", "eval.json"), ("scores", "scores.csv"), ("report", "report.html")):
        print(f"  {what:8} {output / f'{stamp}_{name}'}")
    return report


def open_detector(name: str, path: Path, settings: Settings) -> Detector:
    """Load a detector and the encoder that it stands on.

    Raises:
        CheckpointError: it is damaged, or its encoder's weights are gone or other ones.
        ConfigError: its preprocessing or its thresholds are not those asked for.
    """
    saved = load_detector(path)
    recipe = recipe_of(saved)
    ours, theirs = preprocessing_of(recipe), saved.description["preprocessing"]
    wanted = settings.image_size
    for field_name, value in (ours | ({"image_size": wanted} if wanted else {})).items():
        if theirs.get(field_name) != value:
            raise ConfigError(
                f"{name} was trained with {field_name} {theirs.get(field_name)!r}, but would be tested with {value!r}: "
                "scores would mean nothing; test as it was trained, or train again"
            )
    if settings.threshold not in saved.decision.thresholds:
        raise ConfigError(
            f"threshold is {settings.threshold!r}, but {name} has {', '.join(saved.decision.thresholds)}"
            + ("" if "val.npz" in saved.description["files"] else " (it was trained without --val_data)")
        )
    model = rebuild(saved, recipe, name=name, init=settings.init)
    return Detector(name, saved, recipe, model.eval().to(default_device()))


def open_test_set(name: str, shards: str, settings: Settings) -> TestSet:
    """Open the shards of a test set.

    Raises:
        DataError: labels are wrong, or a class is missing.
    """
    setting = f"--test_sets {name}"
    index_dir = Path(settings.index_dir) if settings.index_dir else None
    index = open_index(list_shards(shards, setting=setting), index_dir=index_dir, image_member=settings.image_member)
    print(f"test set {name}: {describe_index(index)}")
    check_labels(index, setting=setting)
    return TestSet(name, index, truth_of(index, np.arange(len(index))))


def overlaps(detector: Detector, test_set: TestSet, settings: Settings) -> list[str]:
    """Name what a test set shares with the data that made or chose a detector.

    Raises:
        ConfigError: it does, and the user has not allowed it.
    """
    prints, found = prints_of(test_set.index), []
    for role, verb in (("train", "was trained on"), ("val", "was chosen and calibrated by")):
        shared = detector.saved.seen[role].shared_with(prints) if role in detector.saved.seen else ""
        if shared:
            found.append(f"{detector.name} {verb} {shared} of test set {test_set.name}")
    if detector.saved.description.get("overlap"):
        found.append(f"{detector.name}: training and validation shared {detector.saved.description['overlap']}")
    if found and not settings.allow_overlap:
        raise ConfigError(f"{found[0]}: take other test data, or pass --allow_overlap true, which the report will say")
    return found


def measure(detector: Detector, test_set: TestSet, settings: Settings) -> tuple[ScoredSet, list[str]]:
    """Score a test set and compute every figure; images that cannot be read count as failures and not as scores.

    Returns:
        scored: scores and figures.
        codes: a return code for each image.
    """
    index, truth, decision = test_set.index, test_set.truth, detector.saved.decision
    batches = Loader(
        fixed_stream(
            index,
            list(range(len(index))),
            CenterView(size=detector.recipe.image_size, pixels=pixels_of(detector.recipe)),
            batch=min(settings.micro_batch, len(index)),
            noise_per_sample=1,
            spans=span_reader(DetectorRuntime()),
            substitute=False,
        ),
        num_workers=settings.num_workers,
    )
    device = default_device()
    with (
        tqdm(
            total=len(index),
            desc=f"{detector.name} on {test_set.name}",
            unit="image",
            disable=not settings.progress_bar,
        ) as bar,
        torch.inference_mode(),
    ):

        def forward(images_BCHW: torch.Tensor) -> torch.Tensor:
            bar.update(len(images_BCHW))
            logits_BC: torch.Tensor = detector.model(images_BCHW, want="logits")
            return logits_BC

        scores = score(forward, batches, device)
    probability_N = decision.probability(scores.logit_N)
    read_N = ~np.isnan(probability_N)
    if not read_N.any():
        raise DataError(f"test set {test_set.name}: none of {len(index)} images can be read ({scores.code_N[0]})")
    threshold = decision.thresholds[settings.threshold]
    chosen = np.flatnonzero(read_N).tolist()
    summary = summarise(
        probability_N[read_N],
        truth.label_N[read_N],
        [truth.tool_N[i] for i in chosen],
        [truth.people_N[i] for i in chosen],
        threshold=threshold,
        num_replicates=settings.num_replicates,
        seed=settings.seed,
    )
    scored = ScoredSet(
        model=detector.name,
        test_set=test_set.name,
        key_N=[ref.key for ref in index.samples(np.arange(len(index)))],
        label_N=truth.label_N,
        tool_N=truth.tool_N,
        score_N=probability_N,
        threshold=threshold,
        threshold_name=settings.threshold,
        summary=summary,
    )
    return scored, scores.code_N


def hardest_of(detector: Detector, test_set: TestSet, found: ScoredSet, settings: Settings) -> list[HardSample]:
    """Draw the images on which a detector is most wrong, with the flow of its attention."""
    wrongness_N = np.where(found.label_N == 1, 1 - found.score_N, found.score_N)
    wrongness_N = np.where(np.isnan(wrongness_N), -1, wrongness_N)
    chosen = np.argsort(-wrongness_N, kind="stable")[: settings.num_hardest].tolist()
    view = CenterView(size=detector.recipe.image_size, pixels=pixels_of(detector.recipe))
    if not chosen:
        return []
    stream = fixed_stream(test_set.index, chosen, view, batch=len(chosen), noise_per_sample=1, substitute=False)
    images_BCHW = next(iter(Loader(stream))).images_BCHW
    with torch.inference_mode():
        maps_BRC = detector.model(images_BCHW.to(default_device()), want="attention").cpu().numpy()
    pictures: NDArray[np.uint8] = images_BCHW.permute(0, 2, 3, 1).numpy()
    return [
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
        for place, i in enumerate(chosen)
        if not np.isnan(found.score_N[i])
    ]


def describe(
    detectors: Sequence[Detector],
    sets: Sequence[TestSet],
    scored: Sequence[ScoredSet],
    codes: Mapping[tuple[str, str], list[str]],
    warnings: list[str],
    settings: Settings,
) -> dict[str, Any]:
    """Put everything into one JSON-able record."""
    models = []
    for detector in detectors:
        told, recipe = detector.saved.description, detector.recipe
        mode, figures = "full fine-tuning", told["selection"]["figures"]
        if recipe.use_lora:
            mode = f"LoRA r={recipe.lora_r} on {', '.join(recipe.lora_target_modules)}"
        elif recipe.backbone_is_frozen:
            mode = "frozen encoder, trained head"
        models.append(
            {
                "name": detector.name,
                "path": str(detector.saved.path),
                "mode": mode,
                "init": told["init"]["source"],
                "train_data": told["data"],
                "selection": {"data": told["selection"]["data"], "d_eer": figures["d_eer"]} if figures else None,
                "thresholds": {n: v if np.isfinite(v) else None for n, v in detector.saved.decision.thresholds.items()},
            }
            | {name: told[name] for name in ("step", "calibration", "preprocessing", "recipe")}
        )
    test_sets = []
    for test_set in sets:
        mine = next(found for (_, name), found in codes.items() if name == test_set.name)
        failed = np.array([code != SUCCESS for code in mine])
        label_N, tools = test_set.truth.label_N, test_set.truth.tool_N
        test_sets.append(
            {
                "name": test_set.name,
                "shards": test_set.index.shards,
                "fingerprint": test_set.index.fingerprint,
                "num_bona_fide": int((label_N == 0).sum()),
                "num_morphs": int((label_N == 1).sum()),
                "tools": {name: tools.count(name) for name in sorted(set(tools) - {""})},
                "num_failed_bona_fide": int((failed & (label_N == 0)).sum()),
                "num_failed_morphs": int((failed & (label_N == 1)).sum()),
                "num_failed": int(failed.sum()),
                "return_codes": sorted(set(mine)),
            }
        )
    baselines = json.loads(Path(settings.baselines).read_text()) if settings.baselines else []
    return {
        "version": 1,
        "created": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "versions": versions(),
        "command": " ".join(sys.argv),
        "threshold_name": settings.threshold,
        "warnings": warnings,
        "models": models,
        "test_sets": test_sets,
        "results": [
            {"model": s.model, "test_set": s.test_set, "threshold": s.threshold, "summary": s.summary} for s in scored
        ],
        "baselines": baselines,
    }


def scores_csv(scored: Sequence[ScoredSet], codes: Mapping[tuple[str, str], list[str]]) -> str:
    """Write a row for each model and image, in the terms of NIST's FATE MORPH (isMorph, score, return code)."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "test_set", "key", "label", "attack", "score", "isMorph", "returnCode"])
    for found in scored:
        threshold = np.inf if found.threshold is None else found.threshold
        rows = zip(
            found.key_N,
            found.label_N.tolist(),
            found.tool_N,
            found.score_N.tolist(),
            codes[found.model, found.test_set],
            strict=True,
        )
        for key, label, tool, value, code in rows:
            read = code == SUCCESS
            is_morph = str(bool(value >= threshold)).lower() if read else ""
            writer.writerow(
                [found.model, found.test_set, key, label, tool, f"{value:.6f}" if read else "", is_morph, code]
            )
    return file.getvalue()


def table(evaluation: dict[str, Any]) -> str:
    """Write the main figures for a terminal."""
    rows = [("model", "test set", "D-EER [95 % interval]", "BSCER@MACER=0.10", "AUC", "worst tool")]
    everything = evaluation["results"] + [dict(row, model=row["name"]) for row in evaluation["baselines"]]
    for result in everything:
        pooled, worst = result["summary"]["pooled"], result["summary"]["worst"]
        eer, interval = pooled["d_eer"], pooled["d_eer"]["ci"]
        within = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
        rows.append(
            (
                result["model"],
                result["test_set"],
                f"{100 * eer['value']:.1f} %{within}",
                f"{100 * pooled['bscer_at_macer']['0.10']['bscer']:.1f} %",
                f"{pooled['auc']['value']:.3f}",
                f"{worst['d_eer_tool']} {100 * worst['d_eer']:.1f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


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


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
