"""Export weights to timm, transformers, peft and ONNX, each with a model card, and read each back before it counts.

An export is an atomic folder. It is written as a draft and loaded by the library that it is for. Its outputs on random
images are compared with those of the original model, and only then is the draft renamed. The code on the card, run
inside the folder, goes from a photograph to the same score as an evaluation. The card names no path of the machine that
wrote it.

Shapes: B images, C channels or classes, H, W image, N patches, T tokens, D width, P values of a patch.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.files import atomic_folder, describe_files, write_synced
from trainer.models.lora import base_state, merged_state, save_adapter
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import draw_mask, gather_tokens, num_kept
from trainer.weights.hf_vitmae import to_vitmae
from trainer.weights.model_card import (
    ONNX_SCORE_NOTE,
    SCORE_NOTE,
    TIMM_MODEL_CODE,
    call_arguments,
    code_from_pixels,
    code_to_decide,
    code_until_onnx,
    code_until_pixels,
    model_card,
    write_view,
)
from trainer.weights.onnx_file import MODEL, OnnxFile, as_metadata
from trainer.weights.onnx_graph import Graph, reference_view
from trainer.weights.subject import NUM_IMAGES, Loading, Subject

_WEIGHTS = "model.safetensors"
_TOLERANCE = 1e-4
"""Largest difference between two libraries, in units of the largest number compared; float32 gives 1e-6 to 1e-5."""
_MIN_SCALE = 0.1
"""Smallest unit of that comparison: small outputs are sums of larger numbers, and carry their rounding errors."""
_MAX_ONNX_FILE_BYTES = 1_900_000_000
"""protobuf ends at 2 GiB; larger weights go into a separate file."""
_MAX_AXIS = 2**31 - 1
"""torch 2.6 cannot trace an axis without a largest length: it wrote a graph for the traced shape alone."""


Writer = Callable[[Subject, Path], Loading]
"""Writes an export into a folder and reads it back.

Raises `ConfigError` if the format cannot express the model, `CheckpointError` if the other library computes something
else.
"""


def export(subject: Subject, card: Mapping[str, Any], *, to: str, output: Path, licence: str) -> None:
    """Write an export, atomically.

    Args:
        subject: the model.
        card: title -> section of the model card: text, or values that become JSON.
        to: one of `FORMATS`.
        output: must not exist yet.
        licence: of the weights, for the card.

    Raises:
        ConfigError: the output exists, or the format cannot express the model.
        CheckpointError: the other library computes something else, or the storage fails.
    """
    write, packages = FORMATS[to]
    with _atomic_output(output) as draft, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        try:
            loading = write(subject, draft)
        except (TrainerError, OSError):
            raise
        except Exception as error:
            raise CheckpointError(f"{packages[0]} cannot load the export ({error!r}): {_REMEDY}") from error
        write_view(subject, draft)
        files = {name: entry["sha256"] for name, entry in describe_files(draft).items()}
        sections = dict(card) | {"sha256 of the files": files}
        write_synced(draft / "README.md", model_card(loading, subject.colours, sections, packages, licence))


def refuse_early(to: str, output: Path) -> None:
    """Refuse before any work.

    Raises:
        ConfigError: a library that the format needs is missing, or the output exists.
    """
    for package in FORMATS[to][1]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"format is {to}, which needs {package}: pip install 'face-mae-trainer[export]'")
    _refuse_existing(output)


# ---------------------------------------------------------------------------------------------- formats


def write_timm(subject: Subject, draft: Path) -> Loading:
    """Write the encoder, adapters merged in, as timm's own state dict."""
    model = _write_for_timm(subject, merged_state(subject.encoder.vit), subject.timm_options(), draft)
    _compare("timm", model.forward_features(subject.pixels), subject.tokens)
    code = f"{code_until_pixels(subject, 'timm')}\n{TIMM_MODEL_CODE}"
    code += (
        "\ntokens = model.forward_features(pixels)  # class token (and registers), then patches\nprint(tokens.shape)"
    )
    notes = "Without a head. "
    if subject.encoder.has_fc_norm:
        notes += "The last norm comes after the pooling (fc_norm): `model(pixels)` gives the norm of the mean. "
    return Loading("Encoder for timm", notes, code)


def write_merged(subject: Subject, draft: Path) -> Loading:
    """Write the detector, adapters merged in, as a timm model with two classes."""
    options, state = _timm_detector(subject, "merged")
    model = _write_for_timm(subject, state, options, draft)
    _compare("timm", model(subject.pixels), subject.logits)
    code = f"{code_until_pixels(subject, 'timm')}\n{TIMM_MODEL_CODE}\n{code_from_pixels(subject)}"
    return Loading("Morph detector for timm", SCORE_NOTE, code)


def write_adapter(subject: Subject, draft: Path) -> Loading:
    """Write the adapters and the head for plain peft, and the weights of the plain timm model that they adapt."""
    options, state = _timm_detector(subject, "adapter")
    vit = subject.encoder.vit
    if not hasattr(vit, "peft_config"):
        raise ConfigError("format is adapter, but the source was trained without LoRA: export it as merged")
    if any(p.requires_grad for name, p in vit.named_parameters() if ".lora_" not in name):
        raise ConfigError(
            "format is adapter, but the encoder's own weights were trained together with the adapters "
            "(freeze_backbone false), so the adapters alone are useless: export it as merged"
        )
    head = {name: state[f"head.{name}"] for name in ("weight", "bias")}
    save_adapter(draft, vit, head, base_model=subject.name)
    _save(base_state(vit), draft / _BASE, subject.encoder.grid)
    plain = timm.create_model(subject.name, **options)
    plain.load_state_dict(load_file(draft / _BASE), strict=False)  # the head is the adapter's
    model = PeftModel.from_pretrained(plain, str(draft)).eval()
    _compare("peft", model(subject.pixels), subject.logits)
    code = f"""{code_until_pixels(subject, "timm")}
from peft import PeftModel
from safetensors.torch import load_file
base = timm.create_model({call_arguments(subject.name, options)})
base.load_state_dict(load_file("{_BASE}"), strict=False)  # the head comes with the adapter
model = PeftModel.from_pretrained(base, ".").eval()
{code_from_pixels(subject)}"""
    notes = (
        f"Adapters and head, and in {_BASE} the encoder that they were trained on, which adapters of the same init may "
        "share. "
    )
    return Loading("LoRA morph detector for peft", notes + SCORE_NOTE, code)


def write_vitmae(subject: Subject, draft: Path) -> Loading:
    """Write the masked autoencoder as transformers' ViTMAEForPreTraining."""
    import transformers  # an optional dependency

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    mae, encoder = _published_mae(subject), subject.encoder
    weights = {name.removeprefix("encoder.vit."): value for name, value in mae.state_dict().items()}
    of_class_token = torch.zeros_like(weights["decoder_pos_embed"][:, :1])
    weights["decoder_pos_embed"] = torch.cat([of_class_token, weights["decoder_pos_embed"]], dim=1)
    _save(to_vitmae(weights), draft / _WEIGHTS, encoder.grid)
    block: Any = encoder.vit.blocks[0]
    last: Any = mae.decoder_blocks[-1]
    N = encoder.num_patches
    kept = num_kept(N, subject.mask_ratio)
    config = library.ViTMAEConfig(
        hidden_size=encoder.width,
        num_hidden_layers=len(encoder.vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=mae.decoder_norm.eps,
        image_size=subject.image_size[0],
        patch_size=encoder.patch,
        decoder_num_attention_heads=last.attn.num_heads,
        decoder_hidden_size=mae.decoder_norm.weight.numel(),
        decoder_num_hidden_layers=len(mae.decoder_blocks),
        decoder_intermediate_size=last.mlp.fc1.out_features,
        # Transformers truncates the number of visible patches, this trainer rounds it. With 49 patches and a ratio of
        # 0.75, 12.25 gives 12 in both. With 0.7, 14.7 gives 14 there and 15 here; 1 - 15.5 / 49 gives 15 there.
        mask_ratio=subject.mask_ratio if int(N * (1 - subject.mask_ratio)) == kept else 1 - (kept + 0.5) / N,
        norm_pix_loss=mae.norm_pix_loss,
    )
    config.architectures = ["ViTMAEForPreTraining"]
    config.save_pretrained(draft)
    model, info = library.ViTMAEForPreTraining.from_pretrained(draft, output_loading_info=True)
    if any(info.values()):
        raise CheckpointError(f"transformers does not find its weights in the export ({info}): {_REMEDY}")
    noise_BN = torch.rand(NUM_IMAGES, N, generator=torch.Generator().manual_seed(1))
    keep_BK, masked_BM = draw_mask(noise_BN, mask_ratio=subject.mask_ratio, grid=encoder.grid)
    found = model.eval()(subject.pixels, noise=noise_BN)
    predicted_BMP = mae(subject.images, keep_BK, masked_BM, want="prediction")
    _compare("transformers", gather_tokens(found.logits, masked_BM), predicted_BMP)
    _compare("transformers", found.loss, mae(subject.images, keep_BK, masked_BM))
    code = f"""{code_until_pixels(subject, "transformers")}
model = transformers.ViTMAEForPreTraining.from_pretrained(".").eval()
print(model(pixels).loss)  # of a random mask"""
    return Loading("Masked autoencoder for transformers", "Encoder and decoder.", code)


def write_onnx(subject: Subject, draft: Path) -> Loading:
    """Write a graph from uint8 RGB photographs to the calibrated P(morph) and logits, or to tokens.

    Scaling and cutting to the view, normalisation and calibration are inside the graph.
    """
    scales = subject.scales_exactly
    vit: Any = timm.create_model(subject.name, **subject.timm_options())
    vit.load_state_dict(merged_state(subject.encoder.vit))
    graph = Graph(subject, vit, scales=scales, native=subject.is_native).eval()
    num_bytes = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    names = ["p_morph", "logits"] if subject.detector else ["tokens"]
    height, width = subject.image_size
    traced_at = (height + 26, width + 7) if scales else (height, width)  # any numbers, but not equal to each other
    free = ("batch", "height", "width") if scales else ("batch",)
    program: Any = torch.onnx.export(
        graph,
        (torch.zeros(NUM_IMAGES, *traced_at, 3, dtype=torch.uint8),),
        input_names=["images"],
        output_names=names,
        # By place: torch 2.6 looks names up among input_names.
        dynamic_shapes=({axis: torch.export.Dim(name, max=_MAX_AXIS) for axis, name in enumerate(free)},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(as_metadata(subject.record, subject.image_size))
    program.save(draft / MODEL, external_data=num_bytes > _MAX_ONNX_FILE_BYTES)
    _compare_onnx(OnnxFile(draft), subject, names, scales=scales)
    code = f"""{code_until_onnx(subject)}
session = onnxruntime.InferenceSession("{MODEL}")
[{", ".join(names)}] = session.run({json.dumps(names)}, {{"images": image[None]}})"""
    code += f"\n{code_to_decide(subject, 'float(p_morph[0])')}" if subject.detector else "\nprint(tokens.shape)"
    shape = "any height, any width" if scales else f"{height}, {width}"
    notes = f"Input `images`: uint8 RGB, (any number, {shape}, 3), upright, of 8 bits without transparency. Inside the "
    notes += f"graph: {'scaling and cutting the centre, ' if scales else ''}mean and std"
    notes += f", and the calibration. {ONNX_SCORE_NOTE}" if subject.detector else ". Output `tokens`: class token (and "
    notes += "" if subject.detector else "registers), then patches."
    if subject.face_crop:
        notes += (
            f" Photographs must be cropped to the face ({subject.face_crop}), which the graph does not do: the code "
            "below expects an image that tools/make_shards.py --face_crop has written; launch/detect.py crops itself."
        )
    return Loading("ONNX graph", notes, code)


def _compare_onnx(file: OnnxFile, subject: Subject, names: list[str], *, scales: bool) -> None:
    """Compare the file's outputs for images of the model's size, and for photographs of other sizes."""
    expected = [subject.scores, subject.logits] if subject.detector else [subject.tokens]
    images_BHWC = subject.images.permute(0, 2, 3, 1).numpy()
    for num_images in (1, NUM_IMAGES):
        for value, output in zip(expected, file.run(names, images_BHWC[:num_images]), strict=True):
            _compare("onnxruntime", torch.from_numpy(output), value[:num_images])
    height, width = subject.image_size
    for rows, columns in ((3 * height + 5, 2 * width + 1), (height // 2 + 3, width)) if scales else ():
        image_HWC = np.resize(images_BHWC, (rows, columns, 3))
        seen_HWC = reference_view(image_HWC, height, width, native=subject.is_native)
        found, wanted = (file.run(names, one[None])[-1] for one in (image_HWC, np.ascontiguousarray(seen_HWC)))
        _compare("onnxruntime", torch.from_numpy(found), torch.from_numpy(wanted))


FORMATS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "timm": (write_timm, ("timm",)),
    "vitmae": (write_vitmae, ("transformers",)),
    "adapter": (write_adapter, ("peft", "timm")),
    "merged": (write_merged, ("timm",)),
    "onnx": (write_onnx, ("onnx", "onnxruntime", "onnxscript")),
}
"""Name -> its writer, and the packages that it needs."""

_TIMM_POOLING: dict[str, dict[str, Any]] = {
    "avg": {"global_pool": "avg", "fc_norm": False},
    "avg_fc_norm": {"global_pool": "avg", "fc_norm": True},
    "cls": {"global_pool": "token", "fc_norm": False},
}
_REMEDY = "nothing was written; install versions that constraints/ lists"
_BASE = "base.safetensors"


# ---------------------------------------------------------------------------------------------- what fits where


def _timm_detector(subject: Subject, to: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and the weights of a timm model with two classes that equals the detector.

    Raises:
        ConfigError: there is no such model.
    """
    if subject.detector is None:
        raise ConfigError(f"format is {to}, but the source is no detector: name a run of finetune.py, or choose timm")
    head, pooling = subject.detector.head, subject.detector.options.pooling
    if subject.detector.residual is not None:
        raise ConfigError(
            f"format is {to}, but the detector has a residual branch, which timm has not: export it as onnx"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"format is {to}, but the head is a {type(head).__name__}, and timm has one linear layer there: export the "
            "detector as onnx, or its encoder as timm"
        )
    options = subject.timm_options(num_classes=2, **_TIMM_POOLING[pooling])
    state = merged_state(subject.encoder.vit) | {f"head.{name}": value for name, value in head.state_dict().items()}
    try:
        with torch.device("meta"):
            names = timm.create_model(subject.name, **options).state_dict().keys()  # without unused poolings
    except AssertionError as error:  # there is no class token
        raise ConfigError(
            f"format is {to}, but timm does not have this pooling ({error}): export the detector as onnx"
        ) from error
    if names - state.keys():
        what = min(names - state.keys())
        raise ConfigError(f"format is {to}, but timm pools after {what}: export the detector as onnx")
    return options, {name: state[name] for name in names}


def _published_mae(subject: Subject) -> MaskedAutoencoder:
    """Return the autoencoder if transformers' ViTMAE can express it; `to_vitmae` refuses parameters that it lacks."""
    mae, (height, width) = subject.mae, subject.image_size
    if mae is None:
        raise ConfigError("format is vitmae, but the source has no decoder: name a run of pretrain.py, or choose timm")
    if mae.decoder_type != "self":
        raise ConfigError(
            f"format is vitmae, whose decoder has self-attention, but this one has decoder_type {mae.decoder_type}: "
            "export the encoder as timm"
        )
    if mae.decoder_pos_embed is None:
        raise ConfigError(
            "format is vitmae, whose decoder has its own position embedding, but this one uses the encoder's "
            "(use_separate_pos_embed false): export the encoder as timm"
        )
    if mae.decoder_pos_embed.shape[1] != subject.encoder.num_patches or height != width:
        raise ConfigError(
            f"image_size is {height}x{width}, but a decoder's position embedding is not resized: leave image_size out"
        )
    vit, num_prefix = subject.encoder.vit, subject.encoder.num_prefix
    if num_prefix != 1 or vit.cls_token is None or vit.no_embed_class:
        raise ConfigError(
            "format is vitmae, which has exactly one class token, with a position, before the patches, but this model "
            f"has {num_prefix} tokens there, {vit.num_reg_tokens} of them registers: export it as timm"
        )
    return mae


# ---------------------------------------------------------------------------------------------- compare and write


def _write_for_timm(subject: Subject, state: Mapping[str, Tensor], options: Mapping[str, Any], draft: Path) -> Any:
    """Write weights and timm's configuration; return the model that timm builds from the folder alone."""
    _save(state, draft / _WEIGHTS, subject.encoder.grid)
    height, width = subject.image_size
    view = {"mean": list(subject.mean), "std": list(subject.std), "interpolation": "bicubic", "crop_pct": 1.0}
    fixed = {"input_size": [3, height, width], "fixed_input_size": True, "crop_mode": "center", "classifier": "head"}
    config = {
        "architecture": subject.name.partition(".")[0],
        "num_classes": options["num_classes"],
        "num_features": subject.encoder.width,
        "model_args": dict(options),
        "pretrained_cfg": view | fixed | {"first_conv": "patch_embed.proj"},
    }
    write_synced(draft / "config.json", json.dumps(config, indent=1) + "\n")
    return timm.create_model(f"local-dir:{draft}", pretrained=True).eval()


def _compare(library: str, found: Tensor, expected: Tensor) -> None:
    """Raise `CheckpointError` if another library computes something else."""
    far = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if not far <= _TOLERANCE * max(float(expected.abs().max()), _MIN_SCALE):  # a NaN fails too
        raise CheckpointError(
            f"{library} computes something else from the export (difference {far:.2g} in numbers up to "
            f"{float(expected.abs().max()):.2g}): {_REMEDY}"
        )


def _save(weights: Mapping[str, Tensor], path: Path, grid: tuple[int, int]) -> None:
    tensors = {name: value.detach().float().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", "grid": "{}x{}".format(*grid)})


@contextlib.contextmanager
def _atomic_output(output: Path) -> Iterator[Path]:
    """Yield a draft folder that becomes ``output`` at the end; after an error nothing is left."""
    try:
        with atomic_folder(output) as draft:
            yield draft
            _refuse_existing(output)
    except OSError as error:
        raise CheckpointError(f"output {output} cannot be written ({error}): name another folder") from error


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"output {output} exists already: name a new folder, or remove that one")
