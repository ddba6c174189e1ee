"""Pre-training of a masked autoencoder, from settings to the last checkpoint."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from trainer.config.settings import PretrainRecipe, PretrainRuntime
from trainer.data.loader import Loader
from trainer.data.order.mixture import Source
from trainer.data.order.plan import Order, Repeated, evenly_spaced
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import byte_range_reader, find_sources, order_of, pixels_of
from trainer.data.stream import Batch, fixed_stream
from trainer.data.transforms.views import CenterView, PretrainView
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.fault_tolerance.resume import recording_refusals
from trainer.fault_tolerance.watchdog import set_phase
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.log import print_and_log
from trainer.models.encoder import PatchEncoder
from trainer.models.lora import backbone_sha256
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask, num_kept
from trainer.progress import announce
from trainer.training import reconstruction
from trainer.training.model_cost import flops_of
from trainer.training.monitor import Monitor
from trainer.training.probing import GROUP, Probe
from trainer.training.run import DataSets, Ending, Training, TrainingData, begin, join, leave, prepare, show
from trainer.weights.load import check_heads, check_init, read_init

_MEAN_FACE_IMAGES = 2048
_PICTURES = 8


def pretrain(recipe: PretrainRecipe, runtime: PretrainRuntime, *, dry_run: bool = False) -> Ending:
    """Train to the end of the schedule, or until a signal asks to stop."""
    world, ds_config = prepare(recipe, runtime)
    check_repeats(recipe, runtime.micro_batch)
    announce(f"building {recipe.model}")
    build = functools.partial(build_model, recipe)
    model = build(grad_checkpointing=runtime.grad_checkpointing)
    num_kept(model.encoder.num_patches, val_mask_ratio(recipe, runtime))  # refuses one that leaves no patch
    init_sha256 = load_init_weights(model, recipe, runtime)
    others = {"val_data": runtime.val_data, "probe_data": runtime.probe_data}
    found = find_sources(recipe, runtime, others=others) if world.is_main else None
    if dry_run:
        return show(recipe, runtime, ds_config, found, world, build)

    world, sets = join(world, recipe, runtime, found)
    data = training_data(model, sets, recipe)
    validation = Validation(model, recipe, runtime, sets.index, world) if "val_data" in sets.index else None
    probe = Probe(recipe, runtime, sets.index["probe_data"], world) if "probe_data" in sets.index else None
    announce("starting DeepSpeed")
    set_phase(Phase.CONNECTING)
    engine = Engine(model, ds_config=ds_config, weight_decay=recipe.weight_decay, world=world)
    if runtime.compile_mode != "off":
        engine.compile(runtime.compile_mode)
    run = begin(engine, sets, recipe, runtime, init_sha256=init_sha256)
    with recording_refusals(run):
        ending = Training(run, PretrainingTask(engine, recipe, runtime, validation, probe), data).train()
        if validation and math.isnan(validation.last_loss):  # no step was left, or a stop came before the first
            validation.loss(engine)
    return leave(run, ending, lambda: print_summary(run.output, ending, validation, probe))


def check_repeats(recipe: PretrainRecipe, micro_batch: int) -> None:
    """Refuse micro batches that would separate the views of one sample.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    if micro_batch % recipe.aug_repeats:
        raise ConfigError(f"micro_batch is {micro_batch}, but must be divisible by aug_repeats ({recipe.aug_repeats})")


def build_model(recipe: PretrainRecipe, *, grad_checkpointing: bool = False) -> MaskedAutoencoder:
    """Build the model with weights drawn from the recipe's seed, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = PatchEncoder(
            recipe.model,
            image_size=recipe.image_size,
            patch_size=recipe.patch_size,
            depth=recipe.encoder_depth,
            fixed_positions=recipe.fixed_pos_embed,
            grad_checkpointing=grad_checkpointing,
        )
        num_kept(encoder.num_patches, recipe.mask_ratio)  # refuses one that leaves no patch
        decoder = DecoderOptions(**{name: getattr(recipe, name) for name in DecoderOptions.__slots__})
        return MaskedAutoencoder(encoder, decoder, norm_pix_loss=recipe.norm_pix_loss)


def load_init_weights(model: MaskedAutoencoder, recipe: PretrainRecipe, runtime: PretrainRuntime) -> str:
    """Load the weights of ``init``, if it is given; returns their sha256, or "" without.

    Raises:
        ConfigError: they belong to another model.
    """
    init = read_init(runtime.init, pretrained=False)
    if init is None:
        return ""
    prefix = f"init is {runtime.init!r}"
    if not runtime.init_encoder_only and "decoder_pred.weight" not in init.decoder:
        raise ConfigError(f"{prefix}, which has no decoder: add --init_encoder_only true")
    check_init(init, recipe, with_decoder=not runtime.init_encoder_only)
    check_heads(init, model.encoder)
    model.encoder.load_weights(init.weights)
    if not runtime.init_encoder_only:
        try:
            model.load_decoder(init.decoder)
        except ConfigError as error:
            raise ConfigError(
                f"{prefix}, but {error}: set the decoder's settings to its own, or add --init_encoder_only true"
            ) from error
    return backbone_sha256(model)


def mask_of(
    recipe: PretrainRecipe, encoder: PatchEncoder, *, mask_ratio: float, predict_share: float = 1.0
) -> reconstruction.DrawMask:
    """Bind the recipe's mask settings: noise -> indices. Of validation images every hidden patch is predicted."""
    return functools.partial(
        draw_mask,
        mask_ratio=mask_ratio,
        strategy=recipe.mask_strategy,
        grid=encoder.grid,
        mask_block=recipe.mask_block,
        predict_share=predict_share,
    )


def val_mask_ratio(recipe: PretrainRecipe, runtime: PretrainRuntime) -> float:
    """Return the share of patches that are hidden in validation images."""
    return runtime.val_mask_ratio or recipe.mask_ratio


def order_with_repeats(recipe: PretrainRecipe, index: ShardIndex, sources: list[Source]) -> Order:
    """Choose what the run visits when, each sample ``aug_repeats`` times in its batch."""
    if recipe.aug_repeats == 1:
        return order_of(recipe, index, sources)
    once = dataclasses.replace(recipe, global_batch=recipe.global_batch // recipe.aug_repeats, aug_repeats=1)
    return Repeated(order_of(once, index, sources), recipe.aug_repeats, recipe.global_batch)


class Validation:
    """The fixed validation images: their loss, the mean-face baseline, and their pictures."""

    def __init__(
        self,
        model: MaskedAutoencoder,
        recipe: PretrainRecipe,
        runtime: PretrainRuntime,
        index: dict[str, ShardIndex],
        world: World,
    ) -> None:
        num_all = len(index["val_data"])
        self._chosen = evenly_spaced(runtime.val_samples or num_all, num_all)
        num_images = len(self._chosen)
        self._index, self._recipe, self._runtime = index, recipe, runtime
        self._num_patches = model.encoder.num_patches
        self.draw_mask = mask_of(recipe, model.encoder, mask_ratio=val_mask_ratio(recipe, runtime))
        mine = reconstruction.share_of(num_images, rank=world.rank, num_ranks=world.size)
        self._data = reconstruction.ValidationImages(
            lambda: self._read("val_data", [self._chosen[i] for i in mine]), num_images
        )
        self.mean_face = world.on_main(lambda: self._measure_mean_face(model))
        self.last_loss = float("nan")

    def loss(self, engine: Engine) -> dict[str, float]:
        """Measure; all ranks call."""
        self.last_loss = reconstruction.masked_error(engine, self._data, self.draw_mask)
        return {"loss": self.last_loss, "mean_face_loss": self.mean_face}

    def picture(self, engine: Engine) -> torch.Tensor:
        """Draw a few images from all over the set; all ranks call."""
        shown = [self._chosen[i] for i in evenly_spaced(_PICTURES, len(self._chosen))]
        return reconstruction.triplets(
            engine, next(iter(self._read("val_data", shown, batch=len(shown)))), self.draw_mask
        )

    def _measure_mean_face(self, model: MaskedAutoencoder) -> float:
        chosen = evenly_spaced(_MEAN_FACE_IMAGES, len(self._index["data"]))
        mean_patch = reconstruction.MeanPatch(model, self._read("data", chosen))
        return mean_patch.error(self._read("val_data", self._chosen), self.draw_mask)

    def _read(self, setting: str, samples: list[int], *, batch: int | None = None) -> Iterable[Batch]:
        view = CenterView(size=self._recipe.image_size, pixels=pixels_of(self._recipe))
        batch = batch or min(self._runtime.micro_batch, len(samples))
        return Loader(
            fixed_stream(
                self._index[setting],
                samples,
                view,
                batch=batch,
                noise_per_sample=self._num_patches,
                spans=byte_range_reader(self._runtime),
            )
        )


def training_data(model: MaskedAutoencoder, sets: DataSets, recipe: PretrainRecipe) -> TrainingData:
    """Choose which images the run visits when, and what it sees of each."""
    return TrainingData(
        index=sets.index["data"],
        order=order_with_repeats(recipe, sets.index["data"], sets.sources["data"]),
        view=PretrainView(
            size=recipe.image_size,
            crop_scale=(recipe.crop_scale_min, recipe.crop_scale_max),
            flip_probability=recipe.flip_probability,
            seed=recipe.seed,
            fast=recipe.decode_quality == "fast",
            pixels=pixels_of(recipe),
        ),
        noise_per_sample=model.encoder.num_patches,
        repeats=recipe.aug_repeats,
    )


class PretrainingTask:
    """What the loop does in a pre-training; see `trainer.training.loop.Task`."""

    def __init__(
        self,
        engine: Engine,
        recipe: PretrainRecipe,
        runtime: PretrainRuntime,
        validation: Validation | None,
        probe: Probe | None,
    ) -> None:
        self._engine, self._validation, self._probe = engine, validation, probe
        self._draw_mask = mask_of(
            recipe, engine.module.encoder, mask_ratio=recipe.mask_ratio, predict_share=recipe.predict_share
        )
        self.flops_per_image = flops_of(engine.module, recipe)
        self.val_every = runtime.val_every
        self.draw_every: int | None = runtime.picture_every
        self.probe_every: int | None = None
        if probe:
            encoder = engine.module.encoder
            self.probe_every = probe.interval(
                runtime.probe_every,
                forward_flops=encoder.flops(encoder.num_patches),
                step_flops=self.flops_per_image * recipe.global_batch,
            )
        validated = ("val/loss", "val/mean_face_loss") if validation else ()
        self.tags = frozenset(validated).union(probe.tags if probe else ())

    def loss_inputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return images, patches that the encoder sees, and patches to predict."""
        return (batch.images_BCHW, *self._draw_mask(batch.noise_BN))

    def validate(self, step: int, monitor: Monitor) -> None:
        """Measure the loss on the validation images."""
        if self._validation:
            monitor.scalars(step, self._validation.loss(self._engine), group="val")

    def draw(self, step: int, monitor: Monitor) -> None:
        """Draw reconstructions of validation images."""
        if self._validation:
            monitor.picture(step, "original_masked_reconstructed", self._validation.picture(self._engine))

    def probe(self, step: int, monitor: Monitor) -> None:
        """Measure the encoder's features of the labelled set."""
        if self._probe:
            monitor.scalars(step, self._probe.measure(self._engine, step), group=GROUP)

    def finish(self, step: int) -> None:
        """Nothing is left to do: the last step has validated, drawn and saved."""


def print_summary(output: Path, ending: Ending, validation: Validation | None, probe: Probe | None) -> None:
    """Print what a newcomer wants to know."""
    if validation:
        print_and_log(f"  pictures     {output / 'pictures'}  (rows: original, masked, reconstructed)")
    print_and_log(f"  TensorBoard  tensorboard --logdir {output / 'tensorboard'}")
    print_and_log(f"  numbers      {output / 'metrics.jsonl'}")
    if validation:
        mean_face = f"predicting the mean face gives {validation.mean_face:.4f}"
        print_and_log(f"  validation masked MSE {validation.last_loss:.4f}; {mean_face}")
    if probe:
        probe.print_table(output / "metrics.jsonl")
    if not ending.is_complete:
        return
    flags = f"--init {output} --data 'labelled/*.tar' --val_data 'val/*.tar'"
    print_and_log(f"Next: deepspeed launch/finetune.py --recipe lora {flags}   (a detector)")
    print_and_log(f"  or: python tools/export.py --source {output} --output {output}-timm   (the encoder for timm)")
