"""Every ViT-like name of timm is computed as timm does or refused; the oracle is timm's own ``forward_features``.

One model of each kind runs always; TRAINER_ALL_MODELS=1 runs every name (minutes) and says how many there are of what.
"""

import os
import re
from typing import Any

import pytest
import timm
import torch

from trainer.config.settings import DetectorRecipe
from trainer.errors import ConfigError
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.mask_utils import patchify

PATTERNS = ("*vit*", "*deit*", "eva*", "beit*", "cait*", "xcit*", "*siglip*", "*dino*", "*clip*", "*mae*", "*aim*")
MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit", "naflexvit")
ONE_OF_EACH_KIND = (
    "beit3_base_patch16_224",
    "deit3_small_patch16_224",
    "deit_tiny_patch16_224",
    "flexivit_small",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg1_tipsv2",
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_reg4_gap_256",
    "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
)
THE_WIDER_KINDS = (
    "aimv2_large_patch14_224",
    "eva_large_patch14_196",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg1_tipsv2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_huge_patch16_radio_v3",
    "vit_intern300m_patch14_448",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_so400m_patch16_radio_v4",
)


def kind_of(vit: Any) -> tuple[Any, ...]:
    """What may make one model be computed otherwise than another."""
    block = vit.blocks[0]
    modules = (vit, vit.patch_embed, vit.patch_embed.norm, block, block.attn, block.mlp, block.ls1)
    around = (vit.norm_pre, vit.norm, vit.fc_norm, vit.attn_pool, block.norm1, block.attn.q_norm, block.attn.norm)
    plain = (vit.num_prefix_tokens, vit.has_class_token, vit.no_embed_class, vit.dynamic_img_size)
    return (*(type(module).__name__ for module in (*modules, *around)), *plain, block.attn.gate is None)


@torch.no_grad()
def difference_from_timm(name: str) -> float:
    """The largest, of one block and all around it, with every parameter shaken; nan if nothing can be shown of it."""
    patch = PatchEncoder(name, image_size=224, depth=1).patch
    encoder = PatchEncoder(name, image_size=3 * patch, depth=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():  # also tokens, norms and scales, which start at 0 and 1
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    images = torch.randn(2, 3, 3 * patch, 3 * patch, generator=generator)
    patches = patchify(images, patch)
    works = encoder.attention_rollout(patches).shape == (2, 3, 3) and encoder.flops(9) > 0
    found = float((encoder(patches) - encoder.vit.forward_features(images)).abs().max())
    return found if works else float("nan")


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH_KIND, *(pytest.param(name, marks=pytest.mark.slow) for name in THE_WIDER_KINDS)]
)
def test_what_is_taken_computes_what_timm_computes(name: str) -> None:
    assert difference_from_timm(name) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif("TRAINER_ALL_MODELS" not in os.environ, reason="takes minutes: set TRAINER_ALL_MODELS=1")
def test_every_vit_like_name_of_timm_is_computed_alike_or_refused_with_a_reason() -> None:
    names = {name for pattern in PATTERNS for name in timm.list_models(pattern)}
    names |= {name for module in MODULES for name in timm.list_models(module=module)}
    alike, differ, refused, kinds = [], {}, [], {}
    for name in sorted(names):
        try:
            with torch.device("meta"):
                kinds.setdefault(kind_of(PatchEncoder(name, image_size=224, depth=1).vit), []).append(name)
        except ConfigError as error:
            reason = rf"model '{re.escape(name)}' is no plain ViT, .+: choose one such as \S+|image_size is 224, .+"
            assert re.fullmatch(reason, str(error))
            refused.append(name)
            continue
        difference = difference_from_timm(name)
        if difference < 1e-4:
            alike.append(name)
        else:
            differ[name] = difference
    print(f"{len(names)} names: {len(alike)} alike, {len(refused)} refused, {len(differ)} differ; {len(kinds)} kinds")
    assert not differ
    assert len(alike) > 150
    unseen = [names for names in kinds.values() if not set(names) & {*ONE_OF_EACH_KIND, *THE_WIDER_KINDS}]
    assert not unseen, "add one of each to ONE_OF_EACH_KIND"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_tiny_distilled_patch16_224", "a distillation token, which we would leave out"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed embeds its patches"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
        ("vit_base_patch16_224.nosuch", "timm knows no weights 'nosuch' of vit_base_patch16_224"),
        ("facebook/vit-mae-base", "which timm .* does not know"),
    ],
)
def test_a_model_that_would_be_another_one_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchEncoder(name, image_size=224, depth=1)


def test_a_name_with_a_tag_that_timm_knows_is_the_model() -> None:
    assert PatchEncoder("vit_tiny_patch16_224.augreg_in21k", image_size=32, depth=1).width == 192


def test_the_class_token_is_pooled_only_where_there_is_one() -> None:
    encoder = PatchEncoder("vit_base_patch16_siglip_224", image_size=32, depth=1)
    with pytest.raises(ConfigError, match="no class token: set --pooling avg"):
        MorphDetector(encoder, normalisation="half", head=HeadOptions.of(DetectorRecipe(pooling="cls")))
    MorphDetector(encoder, normalisation="half", head=HeadOptions.of(DetectorRecipe(pooling="avg")))
