"""What tools/export.py writes: a detector or weights, opened, and what its model card says."""

import hashlib
import json
from pathlib import Path
from typing import Any

from trainer.config.record import from_dict
from trainer.config.settings import PretrainRecipe
from trainer.data.shards.members import FACE_CROP
from trainer.detection.build import preprocessing, rebuild, recipe_of
from trainer.detection.saved_detector import RECORDED, load_detector
from trainer.errors import ConfigError
from trainer.fault_tolerance.ledger import read_metrics
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import MaskedAutoencoder
from trainer.models.pixel_statistics import STATISTICS
from trainer.training.pretraining import build_model
from trainer.weights.load import Init, check_heads, num_blocks, read_init
from trainer.weights.subject import Subject

_OF_PRETRAINING = ("decoder_heads", "mask_ratio", "norm_pix_loss")
"""What no shape tells; the published values where a file is silent."""
_UNKNOWN = "Not known."


def open_detector(source: str, init: str | None) -> tuple[Subject, dict[str, Any]]:
    """Rebuild a detector; returns it and what its card says."""
    saved = load_detector(Path(source))
    recipe, description = recipe_of(saved), saved.description
    detector = rebuild(saved, recipe, name=source, init=init)
    mean, std = STATISTICS[recipe.normalisation]
    prints = {f"prints_of_{name}": description["files"][f"{name}.npz"]["sha256"] for name in saved.seen}
    card = {
        "Source": {"detector": str(saved.path), "step": description.get("step"), "init": description["init"]},
        "Thresholds": _thresholds(saved.decision.thresholds),
        "Recipe": description["recipe"],
        "Preprocessing": _with_fingerprint(description["preprocessing"]),
        "Data": {"train": description.get("data"), "overlap": description.get("overlap", "")} | prints,
        "Metrics": {name: description[name] for name in ("selection", "calibration")},
    }
    calibration, thresholds = saved.decision.calibration, saved.decision.thresholds
    subject = Subject(
        name=recipe.model,
        encoder=detector.encoder,
        mean=mean,
        std=std,
        view=_view_of(description["preprocessing"]),
        colours=description["preprocessing"].get("colours", ""),
        detector=detector,
        calibration=(calibration.slope, calibration.offset),
        threshold=thresholds.get("d_eer", 0.5),
        face_crop=description["preprocessing"].get(FACE_CROP, ""),
        record={name: description[name] for name in RECORDED if name in description},
    )
    return subject, card


def open_weights(
    source: str, *, model: str, pretrained: bool, normalisation: str, with_decoder: bool
) -> tuple[Subject, dict[str, Any]]:
    """Build an encoder, for transformers with its decoder; returns it and what its card says.

    Raises:
        ConfigError: there are no such weights, or they are of another model than said.
    """
    init = read_init(source, pretrained=pretrained, setting="source")
    assert init is not None
    recipe = recipe_of_weights(init, source, model)
    mae = None
    if with_decoder and "decoder_pred.weight" in init.decoder:
        mae = build_mae(init, recipe)
        encoder = mae.encoder
    else:
        encoder = build_encoder(init, recipe)
    encoder.eval()
    check_heads(init, encoder)
    mean, std = statistics_of(init, normalisation)
    view = preprocessing(recipe.image_size, mean, std)
    subject = Subject(
        name=recipe.model,
        encoder=encoder,
        mean=mean,
        std=std,
        view=view["view"],
        mae=mae and mae.eval(),
        mask_ratio=recipe.mask_ratio,
    )
    card = _facts(init) | {"Preprocessing": _with_fingerprint(view)}
    if mae and not init.manifest:
        assumed = {name: getattr(recipe, name) for name in _OF_PRETRAINING if name not in init.recipe}
        card["Recipe"] = {"told_by_the_file": init.recipe, "assumed_as_published": assumed}
    return subject, card


def build_encoder(init: Init, recipe: PretrainRecipe) -> PatchEncoder:
    """Build an encoder with these weights.

    Raises:
        ConfigError: they are of another model.
    """
    encoder = PatchEncoder(
        recipe.model,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        depth=recipe.encoder_depth,
        fc_norm=True if init.settings.get("pooling") == "avg_fc_norm" else None,
    )
    encoder.load_weights(init.weights)
    return encoder


def statistics_of(init: Init, normalisation: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of the pixels that weights expect; ``normalisation`` names those of a silent file."""
    known = init.recipe.get("normalisation", normalisation)
    mean, std = STATISTICS[known] if isinstance(known, str) else known
    return tuple(mean), tuple(std)


def recipe_of_weights(init: Init, source: str, model: str, *, setting: str = "model") -> PretrainRecipe:
    """Return a run's own recipe, or one that builds what a file holds.

    Args:
        init: the weights.
        source: where they are, for messages.
        model: timm's name, if the user gave it.
        setting: the flag that gives it, for messages.

    Raises:
        ConfigError: the file does not tell which model it is.
    """
    if init.manifest:
        return from_dict(PretrainRecipe, init.manifest["identity"]["recipe"])
    width, shown = len(init.weights["patch_embed.proj.weight"]), init.settings
    name = model or init.recipe.get("model") or shown.get("model")
    if name is None or "image_size" not in shown:
        raise ConfigError(f"{setting} is empty, and {source} (width {width}) does not tell it: pass --{setting} NAME")
    decoder: dict[str, Any] = {"use_separate_pos_embed": "position_embed.weight" not in init.decoder}
    if "decoder_pred.weight" in init.decoder:
        decoder["decoder_width"] = init.decoder["decoder_pred.weight"].shape[1]
        decoder["decoder_depth"] = num_blocks(init.decoder, "decoder_blocks.")
    known = {name: init.recipe[name] for name in _OF_PRETRAINING if name in init.recipe}
    return PretrainRecipe(
        model=name,
        image_size=shown["image_size"],
        patch_size=shown["patch_size"],
        encoder_depth=shown["encoder_depth"],
        **decoder,
        **known,
    )


def build_mae(init: Init, recipe: PretrainRecipe) -> MaskedAutoencoder:
    """Build a masked autoencoder with these weights.

    Raises:
        ConfigError: its decoder is another one.
    """
    mae = build_model(recipe)
    mae.encoder.load_weights(init.weights)
    try:
        mae.load_decoder(init.decoder)
    except ConfigError as error:
        raise ConfigError(f"source is {init.description!r}, but {error}: choose --format timm") from error
    return mae


def _facts(init: Init) -> dict[str, Any]:
    """Say of weights what is known: where they come from, how they were trained, on what, and how good they are."""
    source: dict[str, Any] = {"weights": init.description}
    if init.settings.get("pooling") == "avg_fc_norm":
        source["note"] = "the last norm stands behind the pooling (fc_norm), not in front of it"
    if not init.manifest:
        recipe = {"told_by_the_file": init.recipe} if init.recipe else _UNKNOWN
        return {"Source": source, "Recipe": recipe, "Data": _UNKNOWN, "Metrics": _UNKNOWN}
    identity, step = init.manifest["identity"], init.manifest["progress"]["step"]
    rows = read_metrics(Path(init.description).parent.parent / "metrics.jsonl")
    measured = [row for row in rows if "val_loss" in row and row["step"] <= step]
    return {
        "Source": source | {"step": step} | {name: identity[name] for name in ("num_ranks", "zero_stage", "precision")},
        "Recipe": identity["recipe"],
        "Data": {"fingerprint": identity["data_fingerprint"], "shares": identity["data_shares"]},
        "Metrics": measured[-1] if measured else _UNKNOWN,
    }


def _view_of(preprocessing: dict[str, Any]) -> str:
    crop = preprocessing.get(FACE_CROP, "")
    return (f"the square around the face ({crop}); " if crop else "") + str(preprocessing["view"])


def _thresholds(thresholds: dict[str, float]) -> str:
    """Write the thresholds as a table, and what each was fitted for."""
    rows = ["An image is a morph where its calibrated score is >= the threshold. The code above decides by d_eer.", ""]
    rows += ["| name | threshold | on the validation data |", "|---|---|---|"]
    for name, value in thresholds.items():
        kind, _, limit = name.partition("_")
        meaning = {
            "macer": f"fewest bona fides called morphs while MACER (morphs taken for bona fides) <= {limit}",
            "bscer": f"fewest morphs taken for bona fides while BSCER (bona fides called morphs) <= {limit}",
        }.get(kind, "both error rates are equal; 0.5 where there were no validation data")
        rows.append(f"| {name} | {value!r} | {meaning} |")
    return "\n".join(rows)


def _with_fingerprint(values: dict[str, Any]) -> dict[str, Any]:
    return {"fingerprint": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()} | values
