"""What a user may set: a `Recipe` changes the numbers a run produces, a `Runtime` does not.

Pre-training and detection share most of both and add their own. All are flat, frozen and disjoint, so every field is a
flag of its own. Text from the command line becomes typed values here, and every value is checked before any work. The
docstring under a field is its help text; its unit stands in brackets at the end. A comment above a field names the
section of --help to which it and the fields below it belong.
"""

import re
from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import check_counts, check_types, require

_MAX_PROFILED = 100
"""A step of ViT-B is some megabytes of a trace, and viewers fail at gigabytes."""
_MIN_COMPILE_S = 600
"""torch.compile of a large model takes minutes in its first step, when its cache is cold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What changes the numbers of any training. Two runs with equal recipes and data compute the same thing."""

    # Reproducibility
    seed: int = 0
    """Root of all randomness: order, crops, masks, initial weights."""

    # Model
    model: str = "vit_base_patch16_224"
    """Encoder: the name of any timm VisionTransformer with absolute positions."""
    image_size: int = 224
    """Side of the square crop that the model sees [pixels]."""
    patch_size: int | None = None
    """Side of a patch; none keeps the model's own [pixels]."""
    encoder_depth: int | None = None
    """Transformer blocks in the encoder; none keeps the model's own."""

    # Schedule
    global_batch: int = 4096
    """Samples in one optimizer step, over all ranks and accumulation steps [images]."""
    epochs: float = 800.0
    """Length of the schedule, in passes over the training set; where the batch does not divide it, a batch holds the
    end of one pass and the beginning of the next, and no sample is left out [epochs]."""
    max_steps: int | None = None
    """Length of the schedule instead of epochs; the warm-up keeps its share, warmup_epochs / epochs [steps]."""
    warmup_epochs: float = 40.0
    """Linear warm-up from zero [epochs]."""
    # Optimizer
    base_learning_rate: float = 1.5e-4
    """Peak learning rate for a global batch of 256; scaled linearly with global_batch."""
    learning_rate: float | None = None
    """Peak learning rate itself; replaces base_learning_rate when set."""
    min_learning_rate: float = 0.0
    """Where the cosine schedule ends."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay; biases and norms get none."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    clip_grad_norm: float = 0.0
    """Clip the global gradient norm to this; 0 leaves it alone."""
    # Loss spikes
    spike_threshold: float = 0.0
    """A loss so far above the median of the last 128 is a spike [median absolute deviations]; 0 looks for none."""
    spike_patience: int = 3
    """So many spikes in a row are an incident [steps]."""
    on_spike: Literal["log", "rollback"] = "log"
    """rollback: go back to the last checkpoint before the spike and leave out the data up to its end."""

    # Data
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg or left; none: the only one, or the plain
    one (jpg beside seg.png)."""
    # Augmentation
    crop_scale_min: float = 0.2
    """Smallest share of the image that a random crop keeps."""
    crop_scale_max: float = 1.0
    """Largest share of the image that a random crop keeps."""
    flip_probability: float = 0.5
    """Chance of mirroring a training image left to right."""
    view_resize: Literal["antialias", "former", "native"] = "antialias"
    """antialias: every view is scaled by antialiased cubic interpolation, as in the published MAE; former: as release
    0.1 did (training crops cubic without antialiasing, detectors' by area where they shrink, tests by area); native:
    crops of image_size at the image's own resolution, which keep the traces of blending (only an image that is smaller
    is enlarged; crop_scale_min and crop_scale_max say nothing); tests see the centre."""
    colours: Literal["stored", "srgb"] = "stored"
    """stored: numbers as they stand in the file; srgb: images with another colour profile (Display P3 of phones, Adobe
    RGB) are converted to sRGB, in tests as well."""
    # Order of the data
    balance_by: Literal["none", "label", "source", "attack"] = "none"
    """Give each class, or each value of that field of the samples' json, an equal part of every batch."""
    use_balanced_sampler: bool = False
    """Draw samples with replacement, weighted inversely to the size of their class."""
    num_lanes: int = 192
    """Interleaved reading lanes of an epoch; world sizes that divide it read sequentially."""
    block_samples: int = 128
    """Neighbouring samples that are read together [samples]."""
    window_blocks: int = 8
    """Blocks of a lane that are mixed with each other [blocks]."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        require(self, "seed", 0 <= self.seed < 2**63, "must be an integer from 0 to 2**63 - 1")
        require(self, "epochs", self.epochs > 0, "must be above 0")
        require(
            self,
            "warmup_epochs",
            0 <= self.warmup_epochs <= self.epochs,
            f"must be from 0 to epochs ({self.epochs:g}): set both",
        )
        for name in ("base_learning_rate", "learning_rate"):
            require(self, name, (value := getattr(self, name)) is None or value > 0, "must be above 0 (try 1.5e-4)")
        for name in ("min_learning_rate", "weight_decay", "clip_grad_norm"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        far = self.spike_threshold == 0 or self.spike_threshold >= 4
        require(self, "spike_threshold", far, "must be 0 (off) or at least 4: an even drift alone reaches 2 (try 20)")
        looks = self.spike_threshold > 0 or self.on_spike == "log"
        require(self, "on_spike", looks, "needs a spike_threshold above 0 (try 20)")
        require(self, "flip_probability", 0 <= self.flip_probability <= 1, "must be from 0 to 1")
        ordered = 0 < self.crop_scale_min <= self.crop_scale_max <= 1
        require(
            self,
            "crop_scale_min",
            ordered,
            f"must be above 0 and at most crop_scale_max ({self.crop_scale_max:g}), which must be at most 1",
        )

    def num_steps(self, num_samples: int) -> int:
        """Return the length of the schedule over so many training samples [steps]."""
        return self.max_steps or max(1, round(self.epochs * num_samples / self.global_batch))

    def num_epochs(self, num_samples: int) -> float:
        """Return the length of the schedule in passes over so many training samples [epochs]."""
        return self.epochs if self.max_steps is None else self.max_steps * self.global_batch / num_samples

    def num_warmup_steps(self, num_samples: int) -> int:
        """Return the part of the schedule in which the learning rate rises [steps]."""
        if self.max_steps is not None:
            return round(self.max_steps * self.warmup_epochs / self.epochs)
        return round(self.warmup_epochs * num_samples / self.global_batch)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up (linear scaling rule: Goyal et al. 2017, arXiv 1706.02677)."""
        return self.learning_rate or self.base_learning_rate * self.global_batch / 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRecipe(Recipe):
    """What changes the numbers of masked pre-training."""

    # Masking
    mask_ratio: float = 0.75
    """Share of patches hidden, strictly between 0 and 1."""
    mask_strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are hidden: scattered, one contiguous region, or cells of mask_block x mask_block."""
    mask_block: int = 2
    """Side of a cell of the grid strategy [patches]."""
    use_learned_mask_token: bool = True
    """Let the decoder learn the vector that stands for a hidden patch; otherwise it is zero."""
    use_separate_pos_embed: bool = True
    """Give the decoder its own positions; otherwise it sees the encoder's, projected."""
    fixed_pos_embed: bool = True
    """Use fixed sine-cosine positions as the published MAE does; otherwise they are learned."""
    # Decoder
    decoder_width: int = 512
    """Width of the decoder's tokens."""
    decoder_depth: int = 4
    """Transformer blocks in the decoder (8 in the published MAE)."""
    decoder_heads: int = 16
    """Attention heads in the decoder."""
    decoder_type: Literal["self", "cross"] = "self"
    """self: all tokens attend to each other, as published; cross: hidden patches attend to the seen ones only."""
    predict_share: float = 1.0
    """Share of the hidden patches that a training step predicts; below 1 needs decoder_type cross."""
    # Loss
    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and variance."""
    # Data
    aug_repeats: int = 1
    """Views of each image in a batch, of one decoding (repeated augmentation); an epoch counts views. For runs that
    wait for decoding or storage."""
    decode_quality: Literal["fast", "full"] = "fast"
    """fast: JPEGs through faster transforms, reduced where the crop allows; full: every pixel exact, as detection."""

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        scales = self.view_resize != "native"
        require(self, "view_resize", scales, "is for detectors: MAE crops parts of any size (try antialias)")
        require(self, "mask_ratio", 0 < self.mask_ratio < 1, "must lie strictly between 0 and 1 (try 0.75)")
        divides = self.decoder_width % self.decoder_heads == 0 and self.decoder_width % 4 == 0
        require(self, "decoder_width", divides, f"must be divisible by decoder_heads ({self.decoder_heads}) and by 4")
        require(self, "predict_share", 0 < self.predict_share <= 1, "must be above 0 and at most 1 (try 0.33)")
        apart = self.predict_share == 1 or self.decoder_type == "cross"
        require(self, "predict_share", apart, "needs decoder_type cross: elsewhere hidden patches see each other")
        require(
            self,
            "aug_repeats",
            self.global_batch % self.aug_repeats == 0,
            f"must divide global_batch ({self.global_batch})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorRecipe(Recipe):
    """What changes the numbers of a morph detector. Classes are [bonafide, morph] = [0, 1]."""

    # Model
    use_learned_mask_token: bool | None = None
    """Refuse an --init that was not pre-trained so (true or false); none takes either."""
    use_separate_pos_embed: bool | None = None
    """Refuse an --init that was not pre-trained so (true or false); none takes either."""
    normalisation: Literal["imagenet", "half"] = "imagenet"
    """Mean and deviation of pixels that the encoder expects: ImageNet's, as MAE, or 0.5 each, as many timm models."""

    use_residual_branch: bool = False
    """Add the features of a small transformer on the image's texture (local energies of high-pass residuals) to the
    pooled tokens; it always trains. Meant for view_resize native: scaling removes what it looks at."""

    # What is trained
    freeze_backbone: bool | None = None
    """Keep the encoder's own weights as they are; none: with LoRA yes, otherwise no. Alone: a linear probe."""
    # LoRA
    use_lora: bool = False
    """Train low-rank adapters inside the encoder."""
    lora_r: int = 4
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.1
    """Dropout before the adapters, in training."""
    lora_target_modules: tuple[str, ...] = ("query", "key", "value")
    """Where adapters go: any of query, key, value, proj, fc1, fc2."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353)."""
    # Optimizer
    layer_decay: float = 1.0
    """Each block's learning rate is this times that of the block above it; 1 for all alike (0.75 in the MAE paper)."""
    head_lr_scale: float = 1.0
    """The head's learning rate is so many times that of the encoder (10 in MADation: 1e-4 beside 1e-5)."""
    decay_embeddings: bool = False
    """Let weight_decay reach the encoder's positions, class and register tokens as well; in timm's and the published
    fine-tuning it does not."""
    # What is trained
    drop_path: float = 0.0
    """Chance of skipping a block in training, rising linearly with depth to this (0.1 in the MAE paper)."""

    # Head
    pooling: Literal["avg", "avg_fc_norm", "cls"] = "avg"
    """What the head sees. avg: the mean of the patch tokens behind the encoder's last norm; avg_fc_norm: the norm of
    their mean, as the published MAE fine-tunes (timm's fc_norm); cls: the class token."""
    use_projection_head: bool = False
    """Put a projection (linear, ReLU, linear; as SimCLR) between encoder and classifier."""
    proj_dim: int = 256
    """Width of the projection."""
    proj_hidden_dim: int | None = None
    """Hidden width of the projection; none: that of its input."""
    use_improved_classifier: bool = False
    """Classify with a small perceptron (MorphClassifier) instead of one linear layer."""
    cls_hidden_dim: int | None = None
    """Hidden width of that perceptron; none: that of its input."""
    # Loss
    use_margin_loss: bool = False
    """Additive cosine margin between the classes (CosFace) instead of plain cross-entropy."""
    margin: float = 0.3
    """That margin, in units of the cosine."""
    margin_scale: float = 30.0
    """Scale of the cosines before the softmax."""
    class_weights: tuple[float, ...] = (1.0, 1.0)
    """Weights of the loss of [bonafide, morph]."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over both classes; blurs thresholds, hence off."""
    # MixStyle and mixup
    mixup_alpha: float = 0.0
    """Blend training images and labels with Beta(alpha, alpha); 0 is off: blends of faces are the attack itself."""
    mix_group: int = 8
    """Where mixup or MixStyle is on, samples meet in groups of so many, spread over the global
    batch; every micro_batch holds whole groups, so that what a sample meets does not depend on it [images]."""

    use_mixstyle: bool = False
    """Mix the feature statistics of samples in early blocks, in training (Zhou et al. 2021, arXiv 2104.02008)."""
    mixstyle_p: float = 0.5
    """Chance that a sample is mixed."""
    mixstyle_alpha: float = 0.1
    """Mixing weights come from Beta(alpha, alpha)."""
    mixstyle_blocks: int = 2
    """MixStyle stands behind each of so many first blocks [blocks]."""
    mixstyle_same_label: bool = False
    """Mix only samples of one class, so that low-level traces of morphing stay with morphs."""

    # Augmentation
    use_basic_aug: bool = True
    """Brightness and contrast within 10 %, and JPEG of quality 60 to 100 for 3 of 10 training images. Off where tests
    are as untouched as the training images: JPEG weakens the same fine texture as blending does."""
    use_advanced_aug: bool = False
    """RandAugment on top of the basic augmentation."""
    advanced_aug_magnitude: int = 9
    """Strength of RandAugment, from 1 to 10, in proportion for every operation. 10 is the last of torchvision's 31
    steps, so 9 is its 27 and 3 is its default 9; timm's m9 is as strong, but its operations are others."""
    advanced_aug_num_ops: int = 2
    """Operations that RandAugment applies to an image."""
    passport_aug: tuple[str, ...] = ()
    """What images go through on their way into a passport: any of jpeg_budget, jpeg2000, resize, print_scan."""
    passport_p: float = 0.3
    """Chance of each of these."""
    self_morph_share: float = 0.0
    """Share of the bona fide training images that become attacks on the fly (blended with themselves)."""

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name in ("lora_dropout", "label_smoothing", "drop_path"):
            require(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        for name in ("mixstyle_p", "passport_p", "self_morph_share"):
            require(self, name, 0 <= getattr(self, name) <= 1, "must be from 0 to 1")
        for name in ("lora_alpha", "margin_scale", "mixstyle_alpha", "head_lr_scale"):
            require(self, name, getattr(self, name) > 0, "must be above 0")
        require(self, "layer_decay", 0 < self.layer_decay <= 1, "must be above 0 and at most 1 (try 0.75)")
        require(self, "margin", 0 <= self.margin < 2, "must be in [0, 2): cosines lie between -1 and 1 (try 0.3)")
        for name in ("mixup_alpha", "mix_group"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        right = len(self.class_weights) == 2 and min(self.class_weights) >= 0 and sum(self.class_weights) > 0
        require(self, "class_weights", right, "must be two numbers [bonafide, morph], none negative (try [1.0, 1.0])")
        require(self, "advanced_aug_magnitude", 1 <= self.advanced_aug_magnitude <= 10, "must be from 1 to 10")
        soft = self.mixup_alpha > 0 or self.label_smoothing > 0
        require(self, "use_margin_loss", not (self.use_margin_loss and soft), "takes no mixup_alpha, label_smoothing")
        adapts = self.use_lora or not (self.use_rslora or self.use_dora)
        require(self, "use_lora", adapts, "use_rslora and use_dora are kinds of LoRA: set use_lora true")

    @property
    def mixes_samples(self) -> bool:
        """Whether samples of a batch are mixed with each other."""
        return self.use_mixstyle or self.mixup_alpha > 0

    @property
    def num_mixed(self) -> int:
        """How many samples are mixed with each other."""
        return self.mix_group if self.mixes_samples else 1

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether the encoder's own weights stay as they are."""
        return self.use_lora if self.freeze_backbone is None else self.freeze_backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What does not change the numbers of any training: where things are, how fast, how often we look."""

    # Data
    data: str = ""
    """Training shards: paths, globs, URLs or {000..099} ranges, separated by commas; a share of every batch may
    follow each, as in a/*.tar@0.7,b/*.tar@0.3, or a YAML file lists {shards, share}."""
    # Run
    output_dir: str = "runs/pretrain"
    """Where checkpoints, logs and pictures go."""
    # Data
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    cache_dir: str | None = None
    """Folder on a fast local disk for blocks of remote shards, shared by the ranks of a host; none keeps nothing."""
    cache_bytes: int = 50_000_000_000
    """Upper bound of that folder [bytes]."""
    allow_data_change: bool = False
    """Go on although the shards or their shares are not those of the checkpoint; the change is recorded in it."""
    sample_ledger: str | None = None
    """Folder for JSON lines of every sample that the optimizer consumed; none writes nothing."""
    # Run
    ds_config: str | None = None
    """DeepSpeed JSON file (also --deepspeed_config); none picks cpu_fp32 or zero1_bf16 by the device."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on where output_dir stands; must: fail if it is empty; never: fail if it is not."""
    # Speed and memory
    micro_batch: int = 64
    """Samples a rank holds in one forward pass [images]."""
    num_workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""
    prefetch: int = 4
    """Micro batches that each worker prepares ahead [batches]."""
    grad_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time."""
    num_threads: int | None = None
    """CPU threads a rank computes with; none shares the cores among the ranks of the host."""
    deterministic: bool = False
    """Let a GPU use only kernels that add in the same order each time, so that a resumed run can be the whole one bit
    for bit, as on a CPU; slower, by how much was not measured."""
    # Logging and checkpoints
    log_every: int = 20
    """Interval of metrics [steps]."""
    save_every: int = 500
    """Interval of checkpoints [steps]."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""
    background_saves: bool = True
    """Write checkpoints while the training goes on; it waits for a copy of the state only. Needs host memory for it,
    on a GPU up to twice as much: torch rounds pinned memory up to powers of two, and keeps it for the next save."""
    # Run
    max_restarts: int = 10
    """Refuse to start after so many attempts died in a row without a newer checkpoint; 0 never refuses."""
    stop_at_step: int | None = None
    """Save and leave after this step without shortening the schedule [steps]."""
    # Limits
    max_bad_steps: int = 5
    """Stop when the loss or a gradient was not finite in so many steps in a row; each such step moves nothing."""
    max_bad_sample_share: float = 0.001
    """Stop when more than this share of the samples read was undecodable and had to be substituted."""
    start_timeout_s: int = 600
    """How long the ranks wait at the start for the last of them; the message names the missing ranks [seconds]."""
    timeout_s: int = 1800
    """A step and its collectives that take longer end the job, naming the rank that hangs; 0 for ever [seconds]."""
    data_timeout_s: int = 1200
    """Waiting longer for the batches of a step ends the job, likewise; 0 for ever [seconds]."""
    save_timeout_s: int = 7200
    """Saving, measuring, drawing or starting DeepSpeed longer ends the job, likewise; 0 for ever [seconds]."""
    # Speed and memory
    oversubscribe: bool = False
    """Allow more CPU ranks than cores."""
    # Logging and checkpoints
    profile_steps: str = ""
    """Steps that torch.profiler traces on rank 0, as 100:104 for the five steps 100 to 104; empty for none. The trace
    is in output_dir/profile, for Perfetto."""
    progress_bar: bool = True
    """Show on rank 0 how far the run is: a bar in a terminal, a line every half minute in a log."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        for name in ("max_restarts", "timeout_s", "data_timeout_s", "save_timeout_s"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        require(self, "max_bad_sample_share", 0 <= self.max_bad_sample_share < 1, "must be in [0, 1) (try 0.001)")
        require(self, "output_dir", bool(self.output_dir), "must name a folder")
        if self.profile_steps:
            form = f"must be FIRST:LAST, at least step 1 and at most {_MAX_PROFILED} steps, as 100:104"
            require(self, "profile_steps", bool(re.fullmatch(r"\d{1,12}:\d{1,12}", self.profile_steps)), form)
            first, last = self.profiled_steps or (0, 0)
            require(self, "profile_steps", 1 <= first <= last < first + _MAX_PROFILED, form)
            made = self.stop_at_step is None or first <= self.stop_at_step
            require(
                self, "profile_steps", made, f"begins behind stop_at_step ({self.stop_at_step}): choose earlier steps"
            )

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of `profile_steps`; None for none."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition(":")
        return int(first), int(last)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRuntime(Runtime):
    """What does not change the numbers of pre-training, but for `init`, whose weights are part of its identity."""

    # Initial weights
    init: str = ""
    """Weights to start from instead of random ones: a run of pretrain.py, an official MAE .pth file, a folder of
    transformers' ViTMAE, or encoders as finetune.py takes them. Positions of another image_size are interpolated."""
    init_encoder_only: bool = False
    """Leave the decoder of --init behind."""
    # Validation
    val_data: str = ""
    """Validation shards for the validation loss and the pictures; empty for none."""
    val_every: int = 500
    """Interval of the validation loss [steps]."""
    picture_every: int = 500
    """Interval of reconstruction pictures [steps]."""
    val_samples: int = 1024
    """How many validation images are measured; 0 for all [images]."""
    probe_data: str = ""
    """Labelled shards for probes: how well features of the encoder, frozen and without a mask, tell the classes of
    probe_field apart; empty for none."""
    probe_field: Literal["none", "label", "identity", "source", "attack"] = "none"
    """What the probes tell apart: the label, or a field of the samples' json. identity adds verification; for others,
    no person is on both sides, if the samples name people."""
    probe_every: int | None = None
    """Interval of the probes; they also run before the first step and after the last. None: 500, or as many steps as
    keep the probes' forward passes below 2 % of the training's FLOPs [steps]."""
    probe_samples: int = 2048
    """At most so many images are probed, evenly over the classes; they stay in host memory [images]."""
    # Speed and memory
    compile_mode: Literal["off", "default", "reduce-overhead"] = "off"
    """How torch.compile compiles the model, which takes minutes; reduce-overhead replays CUDA graphs."""
    # Validation
    val_mask_ratio: float | None = None
    """Share of patches hidden in validation images; none: mask_ratio. One value lets runs of several ratios compare."""

    def __post_init__(self) -> None:
        Runtime.__post_init__(self)
        require(self, "val_samples", self.val_samples >= 0, "must not be negative")
        require(self, "probe_samples", 21 <= self.probe_samples <= 16384, "must lie in [21, 16384] (try 2048)")
        named = bool(self.probe_data) == (self.probe_field != "none")
        rule = "must name what --probe_data is probed by: try identity, or label"
        require(
            self,
            "probe_field",
            named,
            "needs labelled shards: name --probe_data" if self.probe_field != "none" else rule,
        )
        has_one = bool(self.init) or not self.init_encoder_only
        require(self, "init_encoder_only", has_one, "says something of --init only: name one")
        inside = self.val_mask_ratio is None or 0 < self.val_mask_ratio < 1
        require(self, "val_mask_ratio", inside, "must lie strictly between 0 and 1 (try 0.75)")
        patient = self.compile_mode == "off" or not 0 < self.timeout_s < _MIN_COMPILE_S
        require(self, "timeout_s", patient, f"must be at least {_MIN_COMPILE_S}: compile_mode makes step 1 slow")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorRuntime(Runtime):
    """What does not change the numbers of a detector, but for `init`, whose bytes are part of the run's identity."""

    # Initial weights
    init: str = ""
    """Encoder weights: a run or checkpoint of pretrain.py, a detector that was trained in full, a .safetensors file or
    folder of timm's, tools/export.py's or transformers' ViTMAE, an official MAE .pth file; or a timm model's name with
    --pretrained true; empty starts from random weights."""
    pretrained: bool = False
    """Take --init as the name of a timm model, whose weights are downloaded."""
    # Validation
    val_data: str = ""
    """Validation shards, never a test set. They fit thresholds and calibration, and choose the step that is kept: the
    latest whose D-EER is at most one standard error, over people, above the lowest one before it."""
    val_every: int = 200
    """Interval of validation [steps]."""
    allow_overlap: bool = False
    """Go on although people or images of the training set are in the validation set; recorded in the detector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What the command of a training takes beside recipe and runtime."""

    recipe: str = ""
    """Name of the recipe to start from."""
    dry_run: bool = False
    """Show settings, steps, memory and cost, and leave."""

    def __post_init__(self) -> None:
        check_types(self)
