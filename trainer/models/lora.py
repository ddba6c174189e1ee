"""Low-rank adapters of peft inside a timm ViT, on timm's fused ``qkv`` layers.

The recipe names ``query``, ``key`` and ``value``, which are thirds of the rows of ``qkv``. One adapter serves all of
them. If only some are named, the rows of the others get no gradient and stay exactly zero::

    qkv of width D, targets query and value          lora_B (3D, R)
    rows 0 to D - 1        query                     trained
    rows D to 2D - 1       key                       zero, always
    rows 2D to 3D - 1      value                     trained

So the saved file is always an ordinary peft adapter of ``qkv``, which plain peft loads on a plain timm model.

Shapes: B images, T tokens, D width, R rank, O rows of a layer.
Source: Hu et al. 2021, arXiv 2106.09685.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import ConfigError

_PARTS = ("query", "key", "value")
_LAYERS = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_ADAPTER = "default"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


class _ChosenRows(nn.Linear):
    """The second matrix of an adapter (lora_B), with only some rows trained.

    The others get a gradient of exactly zero, so they stay zero under AdamW, weight decay and every ZeRO stage.
    """

    def __init__(self, like: nn.Linear, is_trained_O: Tensor) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.weight = like.weight
        self._is_trained: dict[torch.device, Tensor] = {torch.device("cpu"): is_trained_O}

    def forward(self, low_BTR: Tensor) -> Tensor:
        device = low_BTR.device
        if device not in self._is_trained:  # not a buffer: the state dict must be that of a plain adapter
            self._is_trained[device] = self._is_trained[torch.device("cpu")].to(device)
        return F.linear(low_BTR, self.weight) * self._is_trained[device].to(low_BTR.dtype)


def add_lora(
    vit: Any,
    *,
    r: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] = _PARTS,
    use_rslora: bool = False,
    use_dora: bool = False,
    freeze: bool = True,
) -> None:
    """Add adapters to a timm VisionTransformer, in place; before training they change no output.

    Args:
        vit: the model; the adapters' initial weights are drawn from torch's generator.
        r: rank.
        alpha: the adapters' output is scaled by alpha / r.
        dropout: before the adapters, in training.
        targets: any of query, key, value, proj, fc1, fc2.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        use_dora: train magnitude and direction separately (Liu et al. 2024, arXiv 2402.09353).
        freeze: do not train the model's own weights.

    Raises:
        ConfigError: a target is unknown, matches no layer of this model, or does not work with DoRA.
    """
    parts = [name for name in _PARTS if name in targets]
    layers = _matched_layers(vit, targets)
    if use_dora and 0 < len(parts) < len(_PARTS):
        raise ConfigError(
            f"lora_target_modules is {list(targets)} with use_dora, which has one magnitude for each row of a whole "
            "layer: name query, key and value together, or set use_dora false"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=dropout,
        target_modules=sorted(layers),
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, vit)
    if not freeze:
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.replace(".base_layer", "") in trained)
    _choose_rows(vit, parts)


def lora_parameters(vit: Any) -> dict[str, Tensor]:
    """Return the adapters' parameters by their names in the model."""
    return {name: parameter for name, parameter in vit.named_parameters() if ".lora_" in name}


def base_state(vit: Any) -> dict[str, Tensor]:
    """Return timm's own state dict, without the adapters."""
    state: dict[str, Tensor] = vit.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}


def backbone_sha256(vit: Any) -> str:
    """Hash the model's own weights, by name, shape and float32 value; adapters do not count."""
    return state_sha256(base_state(vit))


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash weights by name, shape and float32 value."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def merged_state(vit: Any) -> dict[str, Tensor]:
    """Return timm's own state dict with the adapters merged in; the model is not changed.

    An adapter adds B A x * alpha / r to a layer's W x, so the merged weight is W + (alpha / r) B A; peft computes the
    second term. With DoRA, each row of the sum is then scaled to its trained magnitude: a row of norm 2 with magnitude
    3 is multiplied by 1.5. The bias stays.
    """
    state = {name: value.detach().clone() for name, value in base_state(vit).items()}
    for name, layer in vit.named_modules():
        if isinstance(layer, LoraLinear):
            base: Any = layer.get_base_layer()
            weight = base.weight + layer.get_delta_weight(_ADAPTER)
            if layer.use_dora.get(_ADAPTER):
                magnitude: Any = layer.lora_magnitude_vector[_ADAPTER].weight
                weight = weight * (magnitude / weight.norm(dim=1))[:, None]
            state[f"{name}.weight"] = weight.detach().clone()
    return state


def save_adapter(
    folder: Path,
    vit: Any,
    head: Mapping[str, Tensor] | None,
    *,
    base_model: str,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapters and head for plain peft (``PeftModel.from_pretrained`` on timm's model with this head).

    Args:
        folder: is created; the caller makes it atomic.
        vit: a model with adapters.
        head: state dict of the module that replaces timm's ``head``.
        base_model: name of the timm model, for people.
        values: parameters by name that replace the model's own (gathered from ZeRO's ranks).
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in vit.state_dict().items() if ".lora_" in name} | dict(values or {})
    adapters = {name.replace(f".{_ADAPTER}", ""): value for name, value in state.items() if ".lora_" in name}
    named = {_PEFT_PREFIX + name: value for name, value in adapters.items()}
    if head is not None:
        named |= {f"{_PEFT_PREFIX}head.{name}": value for name, value in head.items()}
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in named.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = vit.peft_config[_ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base_model, "modules_to_save": ["head"] if head is not None else None}
    config |= {"auto_mapping": {"backbone_sha256": backbone_sha256(vit)}, "inference_mode": True}
    for name in ("target_modules", "exclude_modules"):
        config[name] = sorted(config[name]) if config.get(name) else None
    text = json.dumps({name: value for name, value in config.items() if _is_plain(value)}, indent=1, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n")


def _matched_layers(vit: Any, targets: Sequence[str]) -> set[str]:
    """Translate the recipe's names into names of timm's layers."""
    known = (*_PARTS, *_LAYERS)
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise ConfigError(f"lora_target_modules is {list(targets)}, but must name some of {', '.join(known)}")
    names = [name for name, module in vit.named_modules() if isinstance(module, nn.Linear)]
    layers = {"attn.qkv"} if set(_PARTS) & set(targets) else set()
    layers |= {_LAYERS[name] for name in targets if name in _LAYERS}
    for layer in layers:
        if not any(re.fullmatch(rf"blocks\.\d+\.{re.escape(layer)}", name) for name in names):
            raise ConfigError(
                f"lora_target_modules is {list(targets)}, but this model has no linear layer blocks.*.{layer}: "
                f"choose targets among its layers, or a plain ViT such as vit_base_patch16_224"
            )
    return layers


def _choose_rows(vit: Any, parts: Sequence[str]) -> None:
    """Train only the named thirds of ``qkv``."""
    if not 0 < len(parts) < len(_PARTS):
        return
    for name, layer in vit.named_modules():
        if name.endswith("attn.qkv") and isinstance(layer, LoraLinear):
            second: Any = layer.lora_B[_ADAPTER]
            is_trained = torch.tensor([float(part in parts) for part in _PARTS], device="cpu")
            is_trained_O = is_trained.repeat_interleave(second.out_features // len(_PARTS))
            layer.lora_B[_ADAPTER] = _ChosenRows(second, is_trained_O)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
