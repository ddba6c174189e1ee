"""Adapters against plain peft on plain timm models: same logits, same steps, same files."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from trainer.errors import ConfigError
from trainer.models.encoder import PatchEncoder
from trainer.models.lora import add_lora, backbone_sha256, lora_parameters, merged_state, save_adapter
from trainer.models.mask_utils import patchify


def plain(pool: str = "token", num_classes: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    options = {"img_size": 32, "patch_size": 8, "num_classes": num_classes, "global_pool": pool, "fc_norm": False}
    return timm.create_model("test_vit", **options).eval()


def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(vit: Any, steps: int = 5) -> None:
    """Move the adapters away from their start."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in vit.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    vit.train()
    for _ in range(steps):
        optimizer.zero_grad()
        vit(pictures()).square().sum().backward()
        optimizer.step()
    vit.eval()


VARIANTS = [
    {},
    {"targets": ("query", "value")},
    {"targets": ("key", "fc1")},
    {"targets": ("proj", "fc2"), "use_dora": True},
    {"use_rslora": True},
    {"use_dora": True},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.versions
def test_merging_gives_a_plain_model_with_equal_logits(options: dict[str, Any]) -> None:
    vit = plain()
    add_lora(vit, **options)
    before, own = vit(pictures()), backbone_sha256(vit)
    train(vit)
    with_adapters = vit(pictures())
    assert not torch.allclose(before, with_adapters, atol=1e-3), "nothing was learned"
    merged = plain(seed=9)
    merged.load_state_dict(merged_state(vit))
    torch.testing.assert_close(merged(pictures()), with_adapters, rtol=1e-5, atol=1e-5)
    assert backbone_sha256(vit) == own == backbone_sha256(plain())
    torch.testing.assert_close(vit(pictures()), with_adapters, rtol=0, atol=0)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.versions
def test_plain_peft_loads_what_is_saved_on_a_plain_timm_model(
    tmp_path: Path, options: dict[str, Any], pool: str
) -> None:
    vit = plain(pool)
    add_lora(vit, **options)
    train(vit)
    nn.init.normal_(vit.head.weight)
    save_adapter(tmp_path / "adapter", vit, vit.head.state_dict(), base_model="test_vit")
    peft_model = PeftModel.from_pretrained(plain(pool), tmp_path / "adapter").eval()
    torch.testing.assert_close(peft_model(pictures()), vit(pictures()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [options for options in VARIANTS if "use_dora" not in options])
def test_a_saved_adapter_is_the_file_that_plain_peft_saves_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    vit = plain()
    add_lora(vit, **options)
    train(vit)
    save_adapter(tmp_path / "adapter", vit, vit.head.state_dict(), base_model="test_vit")
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)  # "auto" asks the hub
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert saved.keys() == again.keys()
    for name, value in saved.items():
        assert torch.equal(value, again[name]), name


def test_all_of_query_key_and_value_step_as_plain_peft_does() -> None:
    vit, other = plain(), plain()
    torch.manual_seed(7)
    add_lora(vit, r=4, alpha=32, dropout=0.0)
    torch.manual_seed(7)
    wrapped = get_peft_model(other, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["qkv"]))
    for model in (vit, wrapped):
        train(model)
    torch.testing.assert_close(vit(pictures()), wrapped(pictures()))


def test_rows_that_are_not_named_stay_exactly_zero_and_the_others_step_as_plain_pefts() -> None:
    vit, other = plain(), plain()
    torch.manual_seed(7)
    add_lora(vit, dropout=0.0, targets=("query", "value"))
    torch.manual_seed(7)
    wrapped = get_peft_model(other, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["qkv"]))
    width = vit.embed_dim
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # the oracle: peft with the gradients of the key's rows struck out
            keep = torch.ones(3 * width, 1)
            keep[width : 2 * width] = 0
            parameter.register_hook(lambda gradient, keep=keep: gradient * keep)
    for model in (vit, wrapped):
        train(model)
    for name, value in lora_parameters(vit).items():
        if "lora_B" in name:
            assert not value[width : 2 * width].any()
            assert value[:width].any()
            assert value[2 * width :].any()
    torch.testing.assert_close(vit(pictures()), wrapped(pictures()))


def test_only_adapters_train_unless_the_backbone_is_let_free() -> None:
    frozen, free = plain(), plain()
    add_lora(frozen)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == set(lora_parameters(frozen))
    add_lora(free, freeze=False)
    assert all(p.requires_grad for p in free.parameters())


def test_the_published_size_of_vit_bs_adapter() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        add_lora(vit, r=4)
    assert sum(p.numel() for p in lora_parameters(vit).values()) == 12 * (4 * 768 + 4 * 2304) == 147_456


def test_adapters_work_through_the_patch_encoder_with_checkpointing_and_bf16() -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, grad_checkpointing=checkpointing)
        add_lora(encoder.vit, dropout=0.0)
        torch.manual_seed(1)
        for name, parameter in lora_parameters(encoder.vit).items():
            nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 1.0)
        encoder.train()
        encoder(patchify(pictures(), 8)).square().sum().backward()
        results.append([p.grad for p in lora_parameters(encoder.vit).values()])
    torch.testing.assert_close(results[0], results[1])
    half = encoder.to(torch.bfloat16).eval()
    assert half(patchify(pictures(), 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("query", "gate")}, "query, key, value, proj, fc1, fc2"),
        ({"targets": ()}, "must name some of"),
        ({"targets": ("query",), "use_dora": True}, "use_dora"),
    ],
)
def test_wrong_targets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(plain(), **options)


def test_a_model_without_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer blocks\.\*\.attn\.qkv"):
        add_lora(nn.Sequential(nn.Linear(3, 3)))


def test_a_saved_adapter_names_its_backbone(tmp_path: Path) -> None:
    vit = plain()
    add_lora(vit)
    train(vit)
    save_adapter(tmp_path / "adapter", vit, None, base_model="test_vit")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "test_vit"
    assert config["auto_mapping"] == {"backbone_sha256": backbone_sha256(plain())}
    assert config["auto_mapping"] != {"backbone_sha256": backbone_sha256(plain(seed=5))}
