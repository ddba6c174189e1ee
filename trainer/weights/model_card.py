"""The model card of an export: what it is, and code that runs it."""

import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.files import write_synced
from trainer.weights.subject import Loading, Subject

_PLACE = re.compile(r"(?:(?<=[\s='\"])|file:/)/+(?:[^\s,;='\"/]+/)*([^\s,;='\"/]+)")
_ANSWER = "the score is the calibrated P(morph) of evaluation; the image is a morph where score >= threshold."
SCORE_NOTE = f"The code below prints score and decision: {_ANSWER} The network's own softmax is NOT calibrated."
ONNX_SCORE_NOTE = f"Output `p_morph`: {_ANSWER} `logits` are those of the network, before calibration."
TIMM_MODEL_CODE = 'model = timm.create_model("local-dir:.", pretrained=True).eval()'


def code_until_image(subject: Subject, library: str) -> str:
    """Write the code from a photograph to the uint8 ``image`` (1, 3, H, W), exactly as evaluation sees it."""
    height, width = subject.image_size
    size = f"round(side * {height} / min(rows, columns))"
    if height != width:
        size = f"round(side * max({height} / rows, {width} / columns))"
    if subject.is_native:
        size = f"round(side * max(1, {height} / rows, {width} / columns))"
    read = """photo = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")  # python score.py PHOTO
rows, columns = photo.height, photo.width"""
    cut = f"""top, left = (size[0] - {height}) // 2, (size[1] - {width}) // 2
image = image[:, :, top : top + {height}, left : left + {width}].contiguous()"""
    if subject.scales_exactly:
        return f"""import sys
import numpy as np, torch, {library}
from PIL import Image, ImageOps
{read}
size = [{size} for side in (rows, columns)]
image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
image = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
{cut}"""
    return f"""import sys
import cv2, numpy as np, torch, {library}
from PIL import Image, ImageOps
{read}
size = [{size} for side in (rows, columns)]
image = cv2.resize(np.array(photo), size[::-1], interpolation=cv2.INTER_AREA)
image = torch.from_numpy(image).permute(2, 0, 1)[None]
{cut}"""


def code_until_onnx(subject: Subject) -> str:
    """Write the code from a photograph to the uint8 ``image`` (H, W, 3) that the ONNX graph takes."""
    if not subject.scales_exactly:
        torch_code = code_until_image(subject, "onnxruntime")
        return f"{torch_code}\nimage = image[0].permute(1, 2, 0).numpy()"
    return """import sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

photo = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")  # python score.py PHOTO
image = np.array(photo)"""


def code_until_pixels(subject: Subject, library: str) -> str:
    """Write the code from a photograph to the normalised ``pixels`` that a timm model takes."""
    return f"""{code_until_image(subject, library)}
mean, std = torch.tensor([{list(subject.mean)}, {list(subject.std)}])[:, :, None, None]
pixels = (image.float() / 255 - mean) / std
torch.set_grad_enabled(False)"""


def code_from_pixels(subject: Subject) -> str:
    """Write the code from ``pixels`` to the calibrated score and the decision."""
    slope, offset = subject.calibration
    return f"""logits = model(pixels)[0].double()  # [bonafide, morph]
{code_to_decide(subject, f"float(torch.sigmoid({slope!r} * (logits[1] - logits[0]) + {offset!r}))")}"""


def code_to_decide(subject: Subject, score: str) -> str:
    """Write the code that prints a score and its class."""
    return f"""score = {score}
print(f"{{score:.6f}}", "morph" if score >= {_number(subject.threshold)} else "bonafide")"""


def _number(value: float) -> str:
    """Write a number as a Python expression; infinity has no literal."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def write_view(subject: Subject, draft: Path) -> None:
    """Write preprocessor_config.json for transformers and other tools. It is approximate; the card's code is exact."""
    height, width = subject.image_size
    view = {
        "image_processor_type": "CLIPImageProcessor",
        **{
            "do_convert_rgb": True,
            "do_resize": not subject.is_native,
            "size": {"shortest_edge": min(height, width)},
            "resample": 3,
        },
        **{"do_center_crop": True, "crop_size": {"height": height, "width": width}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": list(subject.mean), "image_std": list(subject.std)},
    }
    write_synced(draft / "preprocessor_config.json", json.dumps(view, indent=1) + "\n")


def call_arguments(name: str, options: Mapping[str, Any]) -> str:
    """Write the arguments of `timm.create_model`."""
    return ", ".join([json.dumps(name), *(f"{key}={value!r}" for key, value in options.items())])


def model_card(loading: Loading, colours: str, card: Mapping[str, Any], packages: tuple[str, ...], licence: str) -> str:
    """Write the README: front matter for the hub, the snippet, and the facts about the weights."""
    colours = colours and f" Images were {colours}; the code below does not do that: give it sRGB."
    versions = {name: version(name) for name in ("torch", *packages, "safetensors")}
    parts = [
        f"---\nlicense: {json.dumps(licence or 'unknown')}\nlibrary_name: {packages[0]}\n---\n",
        f"# {loading.title}\n\n{loading.notes}{colours}\n",
        f"Inside this folder:\n\n```python\n{loading.snippet}\n```\n",
    ]
    for title, value in (_without_folders(card) | {"Versions that wrote and checked it": versions}).items():
        text = value if isinstance(value, str) else f"```json\n{json.dumps(value, indent=1)}\n```"
        parts.append(f"## {title}\n\n{text}\n")
    return "\n".join(parts)


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths to their last name: a card is read on other machines."""
    if isinstance(value, Mapping):
        return {name: _without_folders(entry) for name, entry in value.items() if name not in ("path", "relative")}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    parts = [part if not part.strip().startswith(("/", "~")) else Path(part).name for part in value.split(",")]
    return _PLACE.sub(r"\1", ",".join(parts))
