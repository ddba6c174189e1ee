"""What a user may set: `Recipe` changes the numbers a run produces, `Runtime` does not.

Both are flat, frozen and disjoint, so every field is a flag of its own. Text from the command line becomes typed
values here, and every value is checked before any work. The docstring under a field is its help text; its unit stands
in brackets at the end.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from trainer.errors import ConfigError

C = TypeVar("C", bound=Any)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that changes the numbers. Two runs with equal recipes and data compute the same thing."""

    seed: int = 0
    """Root of all randomness: order, crops, masks, initial weights."""

    # The masked autoencoder
    model: str = "vit_base_patch16_224"
    """Encoder: the name of any timm VisionTransformer with absolute positions."""
    image_size: int = 224
    """Side of the square crop that the model sees [pixels]."""
    patch_size: int | None = None
    """Side of a patch; none keeps the model's own [pixels]."""
    encoder_depth: int | None = None
    """Transformer blocks in the encoder; none keeps the model's own."""
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
    decoder_width: int = 512
    """Width of the decoder's tokens."""
    decoder_depth: int = 4
    """Transformer blocks in the decoder (8 in the published MAE)."""
    decoder_heads: int = 16
    """Attention heads in the decoder."""
    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and variance."""

    # Optimisation
    global_batch: int = 4096
    """Samples in one optimizer step, over all ranks and accumulation steps [images]."""
    epochs: float = 800.0
    """Length of the schedule, in passes over the training set [epochs]."""
    warmup_epochs: float = 40.0
    """Linear warm-up from zero [epochs]."""
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

    # Data
    crop_scale_min: float = 0.2
    """Smallest share of the image that a random crop keeps."""
    crop_scale_max: float = 1.0
    """Largest share of the image that a random crop keeps."""
    flip_probability: float = 0.5
    """Chance of mirroring a training image left to right."""
    decode_quality: Literal["fast", "full"] = "fast"
    """fast: JPEGs through faster transforms, reduced where the crop allows; full: every pixel exact, for detection."""
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
        for name in ("mask_ratio",):
            _require(self, name, 0 < getattr(self, name) < 1, "must lie strictly between 0 and 1 (try 0.75)")
        for name in _AT_LEAST_ONE & _names(Recipe):
            _require(self, name, (value := getattr(self, name)) is None or value >= 1, "must be at least 1")
        _require(self, "seed", 0 <= self.seed < 2**63, "must be an integer from 0 to 2**63 - 1")
        _require(self, "epochs", self.epochs > 0, "must be above 0")
        _require(self, "warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"must be from 0 to {self.epochs=}")
        for name in ("base_learning_rate", "learning_rate"):
            _require(self, name, (value := getattr(self, name)) is None or value > 0, "must be above 0 (try 1.5e-4)")
        for name in ("min_learning_rate", "weight_decay", "clip_grad_norm"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        _require(self, "flip_probability", 0 <= self.flip_probability <= 1, "must be from 0 to 1")
        ordered = 0 < self.crop_scale_min <= self.crop_scale_max <= 1
        _require(self, "crop_scale_min", ordered, f"must be above 0 and at most {self.crop_scale_max=} <= 1")
        divides = self.decoder_width % self.decoder_heads == 0 and self.decoder_width % 4 == 0
        _require(self, "decoder_width", divides, f"must be divisible by {self.decoder_heads=} and by 4")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up (linear scaling rule: Goyal et al. 2017, arXiv 1706.02677)."""
        return self.learning_rate or self.base_learning_rate * self.global_batch / 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Everything that does not change the numbers: where things are, how fast, how often we look."""

    data: str = ""
    """Training shards: paths, globs, URLs or {000..099} ranges, separated by commas; a share of every batch may
    follow each, as in a/*.tar@0.7,b/*.tar@0.3, or a YAML file lists {shards, share}."""
    heldout_data: str = ""
    """Held-out shards for the held-out loss and the pictures; empty for none."""
    output_dir: str = "runs/pretrain"
    """Where checkpoints, logs and pictures go."""
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
    ds_config: str | None = None
    """DeepSpeed JSON file (also --deepspeed_config); none picks cpu_fp32 or zero1_bf16 by the device."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on where output_dir stands; must: fail if it is empty; never: fail if it is not."""
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
    log_every: int = 20
    """Interval of metrics [steps]."""
    save_every: int = 500
    """Interval of checkpoints [steps]."""
    heldout_every: int = 500
    """Interval of the held-out loss [steps]."""
    picture_every: int = 500
    """Interval of reconstruction pictures [steps]."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""
    heldout_samples: int = 1024
    """How many held-out images are measured; 0 for all [images]."""
    stop_at_step: int | None = None
    """Save and leave after this step without shortening the schedule [steps]."""
    max_bad_sample_share: float = 0.001
    """Stop when more than this share of the samples read was undecodable and had to be substituted."""
    timeout_s: int = 1800
    """How long a collective may wait for a missing rank [seconds]."""
    oversubscribe: bool = False
    """Allow more CPU ranks than cores."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in _AT_LEAST_ONE & _names(Runtime):
            _require(self, name, (value := getattr(self, name)) is None or value >= 1, "must be at least 1")
        for name in ("num_workers", "heldout_samples"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        _require(self, "max_bad_sample_share", 0 <= self.max_bad_sample_share < 1, "must be in [0, 1) (try 0.001)")
        _require(self, "output_dir", bool(self.output_dir), "must name a folder")


_AT_LEAST_ONE = {
    *("image_size", "patch_size", "encoder_depth", "mask_block", "decoder_width", "decoder_depth", "decoder_heads"),
    *("global_batch", "num_lanes", "block_samples", "window_blocks"),
    *(
        "cache_bytes",
        "micro_batch",
        "prefetch",
        "num_threads",
        "log_every",
        "save_every",
        "heldout_every",
        "picture_every",
    ),
    *("keep_checkpoints", "stop_at_step", "timeout_s"),
}


def resolve(recipe: Recipe, runtime: Runtime, flags: Mapping[str, str]) -> tuple[Recipe, Runtime]:
    """Apply flags, given as text, to the two configurations.

    Raises:
        ConfigError: a name is unknown (the nearest valid ones are listed), or a value has the wrong type or range.
    """
    refuse_unknown(flags, _names(Recipe) | _names(Runtime))
    return with_flags(recipe, flags), with_flags(runtime, flags)


def refuse_unknown(flags: Mapping[str, str], known: Collection[str]) -> None:
    """Raise `ConfigError` with the nearest valid names if a flag is unknown."""
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join('--' + n for n in near)}?" if near else "--help lists all settings"
            raise ConfigError(f"unknown setting --{name}: {hint}")


def with_flags(config: C, flags: Mapping[str, str]) -> C:
    """Return the frozen dataclass with those of the flags that are its own, parsed by their types.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    hints = typing.get_type_hints(type(config))
    mine = {name: _parse(name, text, hints[name]) for name, text in flags.items() if name in hints}
    return dataclasses.replace(config, **mine)


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two recorded recipes differ, each with both values."""
    missing = object()
    names = sorted(ours.keys() | theirs.keys())
    return [
        f"{name} (here {ours.get(name, 'absent')!r}, there {theirs.get(name, 'absent')!r})"
        for name in names
        if ours.get(name, missing) != theirs.get(name, missing)
    ]


def help_text(config: type, title: str) -> str:
    """Describe every setting of a configuration with its meaning, default and unit."""
    lines, docs = [f"\n{title}:"], _field_docs(config)
    for entry in dataclasses.fields(config):
        default = "none" if entry.default is None else entry.default
        lines.append(f"  --{entry.name} {_type_name(entry)}\n        {docs[entry.name]} Default: {default}")
    return "\n".join(lines)


def _names(config: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(config)}


def _require(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {getattr(config, name)!r}, but {rule}")


def _options(hint: Any) -> tuple[Any, ...]:
    """Split ``X | None`` into its types."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _parse(name: str, text: str, hint: Any) -> Any:
    """Read one value from text; numbers and booleans as Python and YAML people write them."""
    options = _options(hint)
    lowered = text.strip().lower()
    if type(None) in options and lowered in ("none", "null"):
        return None
    if bool in options:
        if lowered in ("true", "1", "yes", "on"):
            return True
        if lowered in ("false", "0", "no", "off"):
            return False
        raise ConfigError(f"{name} is {text!r}, but must be true or false")
    for number, noun in ((int, "an integer"), (float, "a number")):
        if number in options:
            try:
                return number(text)
            except ValueError:
                raise ConfigError(f"{name} is {text!r}, but must be {noun}") from None
    return text


def check_types(config: Any) -> None:
    """Raise `ConfigError` for the first field whose value is not of its declared type; called by ``__post_init__``."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, options = getattr(config, name), _options(hint)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            _require(config, name, value in choices, f"must be one of {', '.join(choices)}")
            continue
        if float in options and type(value) is int:
            object.__setattr__(config, name, value := float(value))
        _require(config, name, type(value) in options, f"must be of type {_type_text(hint)}")
        _require(config, name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    return "|".join("none" if option is type(None) else option.__name__ for option in _options(hint))


def _type_name(entry: "dataclasses.Field[Any]") -> str:
    return _type_text(entry.type)


def _field_docs(config: type) -> dict[str, str]:
    """Read the docstring that stands under each field, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs
