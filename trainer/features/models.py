"""What turns images into features: an encoder of any origin, or the pixels themselves.

An encoder's features are those of timm: ``mean`` and ``cls`` after the last norm, ``block_I_mean`` and ``block_I_cls``
after block I, counted from 0, without a norm. With ``fc_norm`` the last norm follows the mean, as in timm.

Shapes: B images, T tokens, D width, S image side [pixels].
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.feature_settings import PIXELS, TIMM, EmbeddingSettings
from trainer.config.settings import PretrainRecipe
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import pixels_of
from trainer.data.transforms.views import CenterView
from trainer.detection.build import preprocessing
from trainer.detection.detector import Detector, TrainedDetector
from trainer.detection.exporting import build_encoder, recipe_of_weights, statistics_of
from trainer.distributed.devices import default_device
from trainer.errors import ConfigError
from trainer.models.detector import pool
from trainer.models.encoder import PatchEncoder, natural_image_size
from trainer.models.lora import state_sha256
from trainer.models.mask_utils import patchify
from trainer.models.pixel_statistics import STATISTICS, constant
from trainer.training.pretraining import build_model
from trainer.weights.hub import is_hub_name
from trainer.weights.load import Init, check_heads, holds_detector, read_init

_PIXEL_SIDE = 32
_DETECTOR_SETTINGS = ("model", "image_size", "patch_size", "encoder_depth")


@dataclass(frozen=True, slots=True)
class FeatureModel:
    """A model that turns images into features."""

    compute: Callable[[Tensor], dict[str, Tensor]]
    """uint8 images (B, 3, S, S) on any device -> feature -> float32 (B, D)."""
    widths: dict[str, int]
    """Feature -> D."""
    about: dict[str, Any]
    """Whatever the features depend on beside the images; JSON-able."""
    own_view: CenterView
    detector: Detector | None = None

    @property
    def view(self) -> CenterView:
        """How it sees a whole photograph; a detector of cropped faces crops it; raises as `Detector.view`."""
        return self.own_view if self.detector is None else self.detector.view

    def view_of(self, index: ShardIndex, *, setting: str) -> CenterView:
        """Return how it sees the images of shards; raises as `Detector.view_of`."""
        return self.own_view if self.detector is None else self.detector.view_of(index, setting=setting)


class TokenFeatures(nn.Module):
    """An encoder, and which of its tokens are features."""

    def __init__(
        self,
        encoder: PatchEncoder,
        statistics: tuple[Sequence[float], Sequence[float]],
        *,
        features: Sequence[str],
        blocks: Sequence[int],
    ) -> None:
        """Choose the tokens.

        Args:
            encoder: in evaluation mode.
            statistics: mean and deviation of the pixels that it expects.
            features: any of "mean" and "cls".
            blocks: after which blocks, beside the last norm.

        Raises:
            ConfigError: the model has no class token, or no such block.
        """
        super().__init__()
        depth = len(encoder.vit.blocks)
        if "cls" in features and encoder.vit.cls_token is None:
            raise ConfigError("features names cls, but this model has no class token: set --features mean")
        if outside := [block for block in blocks if block >= depth]:
            raise ConfigError(f"blocks names {outside[0]}, but this model has blocks 0 to {depth - 1}")
        self.encoder, self._features, self._blocks = encoder, tuple(features), tuple(blocks)
        self._mean, self._std = (tuple(values) for values in statistics)

    @property
    def names(self) -> list[str]:
        """The names of the features."""
        return [*self._features, *(f"block_{block}_{name}" for block in self._blocks for name in self._features)]

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the features (B, D), float32, of uint8 images."""
        found: dict[str, Tensor] = {}

        def keep(block: int, tokens_BTD: Tensor) -> Tensor:
            if block in self._blocks:
                found.update({f"block_{block}_{name}": self._pooled(tokens_BTD, name) for name in self._features})
            return tokens_BTD

        mean_C11, std_C11 = (constant(v, images_BCHW.device)[:, None, None] for v in (self._mean, self._std))
        pixels_BCHW = (images_BCHW.float() / 255 - mean_C11) / std_C11
        tokens_BTD = self.encoder(patchify(pixels_BCHW, self.encoder.patch), after_block=keep)
        pooling = "avg_fc_norm" if self.encoder.has_fc_norm else "avg"
        found |= {
            name: pool(tokens_BTD, "cls" if name == "cls" else pooling, self.encoder.vit) for name in self._features
        }
        return {name: found[name].float() for name in self.names}

    def _pooled(self, tokens_BTD: Tensor, name: str) -> Tensor:
        return pool(tokens_BTD, "cls" if name == "cls" else "avg", self.encoder.vit)


def open_model(settings: EmbeddingSettings) -> FeatureModel:
    """Build the model that the settings name, on this process's device.

    Raises:
        ConfigError: there is no such model, or the settings do not fit it; CheckpointError: it is damaged.
    """
    if settings.model == PIXELS:
        return _pixel_model(settings.image_size or _PIXEL_SIDE)
    if not settings.model.startswith(TIMM) and holds_detector(Path(settings.model).expanduser()):
        return _detector_model(settings)
    recipe, encoder, statistics, origin = _encoder_of(settings)
    view = CenterView(size=recipe.image_size, pixels=pixels_of(recipe))
    seen = preprocessing(recipe.image_size, *statistics, pixels=pixels_of(recipe))
    return _token_model(settings, encoder, statistics, view, {"origin": origin, "preprocessing": seen})


def _encoder_of(
    settings: EmbeddingSettings,
) -> tuple[PretrainRecipe, PatchEncoder, tuple[Sequence[float], Sequence[float]], str]:
    """Return recipe, encoder, mean and deviation of its pixels, and where the weights are from."""
    name = settings.model.removeprefix(TIMM)
    if settings.model.startswith(TIMM) and settings.weights == "random":
        recipe = PretrainRecipe(model=name, image_size=settings.image_size or natural_image_size(name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            encoder = PatchEncoder(name, image_size=recipe.image_size)
        origin = f"random weights of timm {name}, seed {settings.seed}"
        return recipe, encoder, STATISTICS[settings.normalisation], origin
    if not settings.model.startswith(TIMM) and not Path(name).expanduser().exists() and not is_hub_name(name):
        raise ConfigError(
            f"model is {name!r}, but there is no such file or folder: name a run, a detector, an export, pixels, or an "
            f"architecture of timm as {TIMM}NAME"
        )
    init = read_init(name, pretrained=settings.weights == "pretrained", setting="model")
    assert init is not None
    recipe = _resized(recipe_of_weights(init, name, settings.architecture, setting="architecture"), settings)
    statistics = statistics_of(init, settings.normalisation)
    if settings.weights == "random":
        return recipe, _drawn(recipe, settings.seed), statistics, _drawn_like(init, settings.seed)
    encoder = build_encoder(init, recipe)
    check_heads(init, encoder)
    return recipe, encoder, statistics, init.description


def _resized(recipe: PretrainRecipe, settings: EmbeddingSettings) -> PretrainRecipe:
    return dataclasses.replace(recipe, image_size=settings.image_size) if settings.image_size else recipe


def _drawn(recipe: PretrainRecipe, seed: int) -> PatchEncoder:
    """Draw an encoder as a pre-training of this recipe begins."""
    return build_model(dataclasses.replace(recipe, seed=seed)).encoder


def _drawn_like(init: Init, seed: int) -> str:
    return f"random weights of the architecture of {init.description}, seed {seed}"


def _detector_model(settings: EmbeddingSettings) -> FeatureModel:
    """Take the encoder of a detector, with its adapters, and its view of images."""
    wanted = {"image_size": settings.image_size} if settings.image_size else {}
    path = Path(settings.model).expanduser()
    detector = TrainedDetector.open(path, settings.model, wanted, init=settings.init)
    encoder, origin = detector.model.encoder, str(detector.saved.path)
    if settings.weights == "random":
        known = {name: getattr(detector.recipe, name) for name in _DETECTOR_SETTINGS}
        encoder = _drawn(PretrainRecipe(**known), settings.seed)
        origin = f"random weights of the architecture of {origin}, seed {settings.seed}"
    statistics = STATISTICS[detector.recipe.normalisation]
    about = {"origin": origin, "preprocessing": detector.saved.description["preprocessing"]}
    view = CenterView(size=detector.recipe.image_size, pixels=pixels_of(detector.recipe))
    return dataclasses.replace(_token_model(settings, encoder, statistics, view, about), detector=detector)


def _token_model(
    settings: EmbeddingSettings,
    encoder: PatchEncoder,
    statistics: tuple[Sequence[float], Sequence[float]],
    view: CenterView,
    about: dict[str, Any],
) -> FeatureModel:
    model = TokenFeatures(encoder.eval(), statistics, features=settings.features, blocks=settings.blocks)
    weights = state_sha256(encoder.vit.state_dict())
    widths = dict.fromkeys(model.names, encoder.width)
    return FeatureModel(model.to(default_device()), widths, about | {"weights_sha256": weights}, view)


def _pixel_model(side: int) -> FeatureModel:
    """Take the pixels of the view, in [0, 1], row by row, as one vector."""
    view = CenterView(size=side)
    seen = preprocessing(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return FeatureModel(_pixels, {PIXELS: 3 * side**2}, {"origin": PIXELS, "preprocessing": seen}, view)


def _pixels(images_BCHW: Tensor) -> dict[str, Tensor]:
    return {PIXELS: images_BCHW.permute(0, 2, 3, 1).reshape(len(images_BCHW), -1).float() / 255}
