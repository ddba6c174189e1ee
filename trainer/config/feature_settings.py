"""Settings of launch/embed.py, for its command line and for `trainer.features`."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import check_counts, check_types
from trainer.errors import ConfigError

TOKENS = ("cls", "mean")
"""Features of an encoder: the class token, and the mean of the patch tokens."""
PIXELS = "pixels"
"""The value of `EmbeddingSettings.model` that takes the pixels themselves, and the name of these features."""
TIMM = "timm:"
"""How `EmbeddingSettings.model` begins where it names an architecture of timm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSettings:
    """What the computation of features may set."""

    # What is computed
    model: str = ""
    """What computes the features: a run or checkpoint of launch/pretrain.py, a detector (with its adapters), an export,
    another encoder that --init of finetune.py takes, timm:NAME, or pixels, the image itself, for comparison."""
    images: str = ""
    """A photograph, a folder of them, a CSV with a column path, or shards, as what --data takes."""
    output_dir: str = ""
    """Where the features go: a new folder, or that of the same command."""
    features: tuple[str, ...] = ("mean",)
    """mean: of the patch tokens; cls: the class token. Both after the model's last norm, as timm pools them."""
    blocks: tuple[int, ...] = ()
    """Also give each feature after these blocks, without a norm; counted from 0, as timm counts them."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Numbers of the files; they are computed in float32."""
    format: Literal["safetensors", "npy"] = "safetensors"
    """Files: safetensors holds all features of a part, npy has a file for each feature."""
    # The model
    weights: Literal["trained", "pretrained", "random"] = "trained"
    """trained: those that --model holds; pretrained: timm's own, which are downloaded; random: the same architecture
    with weights drawn from --seed, for comparison."""
    seed: int = 0
    """Of random weights."""
    image_size: int | None = None
    """Side of the view; none: the one that the model was trained at, and 32 for pixels. Positions of an encoder are
    interpolated [pixels]."""
    architecture: str = ""
    """timm's name of the encoder in a file that does not tell it."""
    normalisation: Literal["imagenet", "half"] = "imagenet"
    """Mean and deviation of pixels that the encoder in a file expects. Runs, detectors and timm's models know it."""
    init: str | None = None
    """Where a detector's frozen encoder is now, if not where training found it; it is checked."""
    # Speed and storage
    micro_batch: int = 64
    """Images in one forward pass [images]."""
    part_batches: int = 16
    """Batches in a file. A rank computes whole files, and a kill loses those that were not yet written."""
    num_workers: int = 2
    """Loader processes of each rank; 0 loads in this one."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples of shards hold several, as left.jpg; none: the only one."""
    num_threads: int | None = None
    """CPU threads of each rank; none leaves torch's choice, or divides the cores among ranks."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        unknown = [name for name in self.features if name not in TOKENS]
        if unknown or not self.features or len(set(self.features)) < len(self.features):
            raise ConfigError(
                f"features is {','.join(self.features)!r}, but must name mean, cls or both, once each: "
                "blocks are chosen by --blocks"
            )
        if len(set(self.blocks)) < len(self.blocks) or any(block < 0 for block in self.blocks):
            raise ConfigError(f"blocks is {','.join(map(str, self.blocks))!r}, but must name blocks once each, from 0")
        if self.model:
            self._check_weights()

    def _check_weights(self) -> None:
        is_timm = self.model.startswith(TIMM)
        if self.model == PIXELS and (self.weights != "trained" or self.blocks):
            raise ConfigError("model is pixels, which has neither weights nor blocks: leave --weights and --blocks out")
        if is_timm and self.weights == "trained":
            raise ConfigError(
                f"model is {self.model!r}, which names an architecture without weights: add --weights pretrained, "
                "which downloads timm's, or --weights random, which draws them from --seed"
            )
        if not is_timm and self.weights == "pretrained":
            raise ConfigError(
                f"weights is 'pretrained', but model is {self.model!r}: name an architecture as --model {TIMM}NAME, or "
                "leave --weights out"
            )
