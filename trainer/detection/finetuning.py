"""Training of a morph detector, from settings to the detector that is kept."""

import functools
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config.provenance import versions
from trainer.config.record import to_dict
from trainer.config.settings import DetectorRecipe, DetectorRuntime
from trainer.data.loader import Loader, numbers_on
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import byte_range_reader, find_sources, order_of, pixels_of
from trainer.data.stream import Batch, fixed_stream
from trainer.data.transforms.views import CenterView
from trainer.detection.build import assemble_detector, build_detector, preprocessing_of, training_view
from trainer.detection.cropping import check_same_crop, described_crop
from trainer.detection.leakage import fingerprints_of
from trainer.detection.saved_detector import restore, save_detector
from trainer.detection.scoring import (
    UNCALIBRATED,
    Scores,
    check_labels,
    fit_decision,
    over_ranks,
    score,
    truth_of,
    validation_figures,
)
from trainer.detection.selection import FILE, RULE, Validated, judge, validated
from trainer.distributed.engine import Engine
from trainer.errors import ConfigError
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.resume import recording_refusals
from trainer.fault_tolerance.watchdog import set_phase
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.log import print_and_log
from trainer.models.detector import MorphDetector
from trainer.models.lora import save_adapter
from trainer.progress import announce
from trainer.training.monitor import Monitor
from trainer.training.reconstruction import share_of
from trainer.training.run import DataSets, Ending, Training, TrainingData, begin, join, leave, prepare, show
from trainer.weights.detector_folder import read_description
from trainer.weights.load import Init, describe, fitting_recipe, place_of, read_init

logger = logging.getLogger(__name__)
_POOLINGS = {
    "avg": "the mean of the normed tokens (the published MAE norms the mean: --pooling avg_fc_norm)",
    "avg_fc_norm": "the norm of the tokens' mean, as in the published MAE's fine-tuning",
    "cls": "the class token",
}


def finetune(
    recipe: DetectorRecipe, runtime: DetectorRuntime, given: Collection[str], *, dry_run: bool = False
) -> Ending:
    """Train to the end of the schedule, or until a signal asks to stop.

    Args:
        recipe: the numbers.
        runtime: all else.
        given: the settings that the user has named; the model's others are taken from ``init``.
        dry_run: show what would run, and leave.
    """
    world, ds_config = prepare(recipe, runtime)
    training_view(recipe)  # refuses wrong settings before any work
    check_groups(recipe, runtime.micro_batch)
    init = read_init(runtime.init, pretrained=runtime.pretrained)
    asked, recipe = recipe, fitting_recipe(init, recipe, given)
    announce(f"building {recipe.model}")
    model, init_sha256 = build_detector(recipe, init, grad_checkpointing=runtime.grad_checkpointing)
    found = find_sources(recipe, runtime, others={"val_data": runtime.val_data}) if world.is_main else None
    if dry_run:
        return show(recipe, runtime, ds_config, found, world, functools.partial(assemble_detector, recipe, init))

    world, sets = join(world, recipe, runtime, found)
    if changed := changed_fields(asked, recipe):
        logger.info("from --init, where the command line names nothing: %s", changed)
    overlap = world.on_main(lambda: check_sets(sets.index, recipe, runtime))
    data = training_data(model, sets, recipe)
    announce("starting DeepSpeed")
    set_phase(Phase.CONNECTING)
    engine = Engine(
        model,
        ds_config=ds_config,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        decay_embeddings=recipe.decay_embeddings,
        head_lr_scale=recipe.head_lr_scale,
        world=world,
        save_frozen=not recipe.backbone_is_frozen,
    )
    origin = origin_of(init, init_sha256, runtime) | {"overlap": overlap, "data": runtime.data}
    run = begin(engine, sets, recipe, runtime, init_sha256=init_sha256)
    with recording_refusals(run):
        best = BestDetector(engine, sets.index, recipe, runtime, origin, run.lease)
        log_what_trains(engine.module, recipe)
        ending = Training(run, DetectionTask(engine, runtime, best), data).train()
    return leave(run, ending, lambda: print_summary(run.output, ending, best))


def check_groups(recipe: DetectorRecipe, micro_batch: int) -> None:
    """Refuse groups of mixed samples that would be no groups, or be cut.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    group, batch = recipe.mix_group, recipe.global_batch
    if not recipe.mixes_samples:
        return
    mixing = "mixup_alpha" if recipe.mixup_alpha > 0 else "use_mixstyle"
    if group < 2 or batch % group:
        fitting = next((size for size in (8, 6, 4, 10, 5, 3, 2) if batch % size == 0), batch)
        raise ConfigError(
            f"mix_group is {group}, but {mixing} needs at least 2 samples in a group, and whole groups in "
            f"global_batch={batch}: try --mix_group {fitting} (a run has 0 if it began before there were "
            "groups: go on with the version that began it, or name a new output_dir)"
        )
    if micro_batch % group:
        raise ConfigError(
            f"micro_batch is {micro_batch}, but with {mixing} samples meet in groups of mix_group={group}, which must "
            f"not be cut: try --micro_batch {max(1, micro_batch // group) * group}, or for a new run another mix_group"
        )


def changed_fields(before: DetectorRecipe, after: DetectorRecipe) -> str:
    """Name the settings in which two recipes differ, with the later values."""
    old, new = to_dict(before), to_dict(after)
    return ", ".join(f"{name} {value}" for name, value in new.items() if value != old[name])


def check_sets(index: dict[str, ShardIndex], recipe: DetectorRecipe, runtime: DetectorRuntime) -> str:
    """Refuse sets without both classes, and a validation set that shares people or images with training.

    Returns:
        overlap: what the sets share although the user allowed it; empty where nothing.

    Raises:
        DataError: labels are wrong or missing, or images are cropped to faces in different ways.
        ConfigError: the sets overlap.
    """
    check_labels(index["data"], setting="--data", both=recipe.self_morph_share == 0)
    described_crop(index["data"], setting="--data")  # refuses a mixture
    if "val_data" not in index:
        return ""
    check_labels(index["val_data"], setting="--val_data")
    check_same_crop(index["data"], index["val_data"])
    shared = fingerprints_of(index["data"]).shared_with(fingerprints_of(index["val_data"]))
    if shared and not runtime.allow_overlap:
        raise ConfigError(
            f"--data and --val_data share {shared}: a threshold fitted there would flatter; split by people "
            "(tools/splits.py), or pass --allow_overlap true, which the detector will record"
        )
    return shared


class BestDetector:
    """Validation, and the detector that it chose so far (`trainer.detection.selection`), in OUTPUT/detector."""

    def __init__(
        self,
        engine: Engine,
        index: dict[str, ShardIndex],
        recipe: DetectorRecipe,
        runtime: DetectorRuntime,
        origin: dict[str, Any],
        lease: Lease,
    ) -> None:
        self._lease = lease
        self._engine, self._index, self._recipe, self._runtime, self._origin = engine, index, recipe, runtime, origin
        self.folder = Path(runtime.output_dir) / "detector"
        self._best: Validated | None = None
        """What later steps are compared with; on rank 0."""
        self.last_scores = (np.empty(0, np.int64), np.empty(0))
        """Labels and logits of the last validation, of the images that could be read."""
        engine.world.on_main(self._read_best)

    def measure(self, step: int) -> dict[str, float] | None:
        """Validate, and keep the detector unless an earlier one was better; all ranks call. None without validation."""
        if "val_data" not in self._index:
            return None
        scores = over_ranks(self._score(), self._engine.world)
        label_N = self._index["val_data"].labels[scores.sample_N].astype(np.int64)
        read_N = ~np.isnan(scores.logit_N)
        self.last_scores = (label_N[read_N], scores.logit_N[read_N])
        figures = validation_figures(scores, label_N)
        if self._engine.world.on_main(lambda: self._judge(step, scores, label_N)):
            self._keep(step, figures, scores)
        return figures

    def keep_last(self, step: int) -> None:
        """Keep the detector as it is, where no validation data could choose one; all ranks call."""
        if "val_data" not in self._index:
            self._keep(step, None, None)

    def _judge(self, step: int, scores: Scores, label_N: NDArray[np.int64]) -> bool:
        people = truth_of(self._index["val_data"], scores.sample_N).people_N
        verdict = judge(validated(step, scores.logit_N, label_N), self._best, label_N, people)
        self._best = verdict.best
        if not verdict.keep:
            logger.info(
                "step %d is not kept: step %d is better by more than a standard error of %.2f points",
                *(step, verdict.best.step, 100 * verdict.standard_error),
            )
        return verdict.keep

    def _score(self) -> Scores:
        index, world = self._index["val_data"], self._engine.world
        mine = share_of(len(index), rank=world.rank, num_ranks=world.size)
        view = CenterView(size=self._recipe.image_size, pixels=pixels_of(self._recipe))
        batch = min(self._runtime.micro_batch, len(mine))
        spans = byte_range_reader(self._runtime)
        stream = fixed_stream(index, mine, view, batch=batch, noise_per_sample=1, spans=spans, substitute=False)
        forward = functools.partial(self._engine.evaluate, want="logits")
        return score(forward, Loader(stream), self._engine.device)

    def _keep(self, step: int, figures: dict[str, float] | None, scores: Scores | None) -> None:
        weights = self._engine.trainable_state()

        def write() -> None:
            decision, seen = UNCALIBRATED, {"train": fingerprints_of(self._index["data"])}
            if scores is not None:
                val = self._index["val_data"]
                decision = fit_decision(scores.logit_N, val.labels[scores.sample_N].astype(np.int64))
                seen["val"] = fingerprints_of(val)
            description = self._origin | {
                "step": step,
                "recipe": to_dict(self._recipe),
                "preprocessing": preprocessing_of(self._recipe) | described_crop(self._index["data"], setting="--data"),
                "selection": {"data": self._runtime.val_data, "figures": figures} | self._chosen_by(),
                "versions": versions(),
            }
            more = functools.partial(self._write_more, weights)
            save_detector(self.folder, description, weights, decision, seen, lease=self._lease, write_more=more)

        self._engine.world.on_main(write)

    def _chosen_by(self) -> dict[str, Any]:
        if self._best is None:
            return {}
        lowest = {"step": self._best.step, "d_eer": self._best.d_eer}
        return {"rule": RULE, "lowest": lowest, "fingerprint": self._index["val_data"].fingerprint}

    def _write_more(self, weights: dict[str, torch.Tensor], draft: Path) -> None:
        if self._best is not None:
            self._best.save(draft / FILE)
        # Plain peft and timm have no residual branch, so the adapter alone would give other scores.
        if self._recipe.use_lora and not self._recipe.use_residual_branch:
            self._write_adapter(weights, draft)

    def _write_adapter(self, weights: dict[str, torch.Tensor], draft: Path) -> None:
        prefix, model = "encoder.vit.", self._engine.module
        values = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        head = {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}
        save_adapter(draft / "adapter", model.encoder.vit, head, base_model=self._recipe.model, values=values)

    def _read_best(self) -> None:
        """Take up the choice where a killed run left it."""
        restore(self.folder, self._lease)
        if "val_data" not in self._index or not (self.folder / "detector.json").exists():
            return
        selection, path = read_description(self.folder)["selection"], self.folder / FILE
        if path.exists() and selection.get("fingerprint") == self._index["val_data"].fingerprint:
            self._best = Validated.load(path)
        else:
            logger.warning("%s was chosen by another version or other data: the next step replaces it", self.folder)


def origin_of(init: Init | None, init_sha256: str, runtime: DetectorRuntime) -> dict[str, Any]:
    """Describe the weights that training starts from, so that a detector without them can find them again."""
    place = place_of(runtime.init, Path(runtime.output_dir) / "detector")
    return {"init": {"source": describe(init), "pretrained": runtime.pretrained, "sha256": init_sha256} | place}


def training_data(model: MorphDetector, sets: DataSets, recipe: DetectorRecipe) -> TrainingData:
    """Choose which images the run visits when, and what it sees of each."""
    index = sets.index["data"]
    return TrainingData(
        index=index,
        order=order_of(recipe, index, sets.sources["data"], num_meeting=recipe.num_mixed),
        view=training_view(recipe),
        noise_per_sample=model.num_draws,
        group=recipe.num_mixed,
        show_labels=True,
    )


def log_what_trains(model: MorphDetector, recipe: DetectorRecipe) -> None:
    """Log how much of the model trains, and what its head sees."""
    trained, total = (
        sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if want(p))  # ZeRO-3 leaves p.numel() at 0
        for want in (lambda p: p.requires_grad, lambda _: True)
    )
    logger.info("%d of %d parameters train (%.3g %%)", trained, total, 100 * trained / total)
    logger.info("pooling %s: the head sees %s", recipe.pooling, _POOLINGS[recipe.pooling])


class DetectionTask:
    """What the loop does in the training of a detector; see `trainer.training.loop.Task`."""

    def __init__(self, engine: Engine, runtime: DetectorRuntime, best: BestDetector) -> None:
        self._best = best
        self.flops_per_image: int = engine.module.flops_per_image()
        self.val_every = runtime.val_every
        self.probe_every: int | None = None
        self.draw_every: int | None = None
        self.tags = frozenset(("val/loss", "val/d_eer") if runtime.val_data else ())

    def loss_inputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return images, classes, and the numbers that mixing and dropout draw from."""
        labels_B = numbers_on(batch.labels, batch.images_BCHW.device)
        return batch.images_BCHW, labels_B, batch.noise_BN

    def validate(self, step: int, monitor: Monitor) -> None:
        """Measure the error rates, and keep the detector if it is the best so far."""
        figures = self._best.measure(step)
        if figures is not None:
            monitor.scalars(step, figures, group="val")
            label_N, logit_N = self._best.last_scores
            monitor.precision_recall(step, "val/precision_recall", label_N, 1 / (1 + np.exp(-logit_N)))
            monitor.figure(step, "val/det", lambda: self._draw_det(step), file="det")

    def _draw_det(self, step: int) -> NDArray[np.uint8]:
        from trainer.detection.figures import det_picture  # imports matplotlib, which takes a second

        label_N, logit_N = self._best.last_scores
        return det_picture(f"Validation, step {step}", logit_N, label_N)

    def draw(self, step: int, monitor: Monitor) -> None:
        """Nothing is drawn."""

    def probe(self, step: int, monitor: Monitor) -> None:
        """A detector is validated instead."""

    def finish(self, step: int) -> None:
        """Keep the detector of the last step where no validation data chose one."""
        self._best.keep_last(step)


def print_summary(output: Path, ending: Ending, best: BestDetector) -> None:
    """Print what a newcomer wants to know."""
    if (best.folder / "detector.json").exists():
        print_and_log(f"  detector     {best.folder}")
        description = read_description(best.folder)
        if figures := description["selection"]["figures"]:
            print_and_log(f"  kept         step {description['step']}, validation D-EER {100 * figures['d_eer']:.2f} %")
            if (lowest := description["selection"].get("lowest")) and lowest["step"] != description["step"]:
                print_and_log(
                    f"               (lowest {100 * lowest['d_eer']:.2f} % at step {lowest['step']}, within its noise)"
                )
        for note in description.get("threshold_notes", ()):
            print_and_log(f"  note         {note}")
    print_and_log(f"  TensorBoard  tensorboard --logdir {output / 'tensorboard'}")
    print_and_log(f"  numbers      {output / 'metrics.jsonl'}")
    if not ending.is_complete:
        return
    flags = f"--models {output.name}={output} --test_sets 'NAME=test/*.tar'"
    print_and_log(f"Next: python launch/evaluate.py {flags}   (a test set of other people)")
