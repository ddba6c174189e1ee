"""Oracles: timm's own forward for the encoder, transformers' ViTMAE for loss and gradients."""

from typing import Literal

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from trainer.errors import ConfigError
from trainer.models.cross_block import CrossBlock
from trainer.models.encoder import PatchEncoder, attend_from, sine_cosine_positions
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask, patchify
from trainer.models.pixel_statistics import STATISTICS

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"])
def test_with_all_patches_the_encoder_is_timms(name: str) -> None:
    encoder = PatchEncoder(name, image_size=56 if "14" in name else 64, depth=2).eval()
    side = encoder.grid[0] * encoder.patch
    image = torch.randn(2, 3, side, side)
    every = torch.arange(encoder.num_patches).expand(2, -1)
    expected = encoder.vit.forward_features(image)
    for keep in (None, every):
        torch.testing.assert_close(encoder(patchify(image, encoder.patch), keep), expected)


def test_attending_from_the_last_tokens_equals_the_whole_block() -> None:
    block = PatchEncoder("test_vit", image_size=64).vit.blocks[0]
    tokens = torch.randn(2, 21, 64)
    torch.testing.assert_close(attend_from(block, tokens, 6), block(tokens)[:, -6:])


def test_a_cross_block_is_torchs_attention_and_a_perceptron() -> None:
    block, oracle = CrossBlock(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    oracle.in_proj_weight.data = torch.cat([block.query.weight, block.key_value.weight])
    oracle.in_proj_bias.data = torch.cat([block.query.bias, block.key_value.bias])
    oracle.out_proj.load_state_dict(block.proj.state_dict())
    hidden, seen = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    normed = block.norm_seen(seen)
    expected = hidden + oracle(block.norm1(hidden), normed, normed)[0]
    torch.testing.assert_close(block(hidden, seen), expected + block.mlp(block.norm2(expected)))


def test_with_a_cross_decoder_a_patch_comes_out_alike_whatever_else_is_predicted() -> None:
    mae = MaskedAutoencoder(
        PatchEncoder("test_vit", image_size=64, depth=1),
        DecoderOptions(decoder_width=32, decoder_heads=4, decoder_type="cross"),
    )
    patches, noise = torch.randn(3, 16, 3 * 16 * 16), torch.rand(3, 16)
    keep, every = draw_mask(noise, mask_ratio=0.75, grid=(4, 4))
    same, some = draw_mask(noise, mask_ratio=0.75, grid=(4, 4), predict_share=0.4)
    assert torch.equal(keep, same)
    assert some.shape == (3, 5)
    where = torch.stack([torch.searchsorted(a, b) for a, b in zip(every, some, strict=True)])
    whole = mae._predict(patches, keep, every)
    expected = whole.gather(1, where[..., None].expand(-1, -1, whole.shape[2]))
    torch.testing.assert_close(mae._predict(patches, keep, some), expected)


def pair(*, norm_pix_loss: bool) -> tuple[MaskedAutoencoder, ViTMAEForPreTraining]:
    """The same weights in both implementations."""
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192, image_size=64,
            patch_size=16, decoder_hidden_size=32, decoder_num_hidden_layers=3, decoder_num_attention_heads=4,
            decoder_intermediate_size=128, norm_pix_loss=norm_pix_loss, layer_norm_eps=1e-6, mask_ratio=0.75,
        )
    )  # fmt: skip
    ours = MaskedAutoencoder(
        PatchEncoder("test_vit", image_size=64, depth=2, fixed_positions=True),
        DecoderOptions(decoder_width=32, decoder_depth=3, decoder_heads=4),
        norm_pix_loss=norm_pix_loss,
    )
    for parameter in theirs.parameters():  # also biases and norms, which start at 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    return ours, theirs


def translate(theirs: dict[str, torch.Tensor], ours: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    renamed = {
        "encoder.vit.cls_token": theirs["vit.embeddings.cls_token"],
        "encoder.vit.pos_embed": theirs["vit.embeddings.position_embeddings"],
        "mask_token": theirs["decoder.mask_token"],
        "decoder_pos_embed": theirs["decoder.decoder_pos_embed"][:, 1:],
    }
    for kind in ("weight", "bias"):
        renamed[f"encoder.vit.patch_embed.proj.{kind}"] = theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        renamed[f"encoder.vit.norm.{kind}"] = theirs[f"vit.layernorm.{kind}"]
        for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
            renamed[f"{name}.{kind}"] = theirs[f"decoder.{name}.{kind}"]
        stacks = (("encoder.vit.blocks", "vit.layers", 2), ("decoder_blocks", "decoder.decoder_layers", 3))
        for mine, other, depth in stacks:
            for i in range(depth):
                qkv = [theirs[f"{other}.{i}.attention.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{mine}.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
                for a, b in (
                    ("attn.proj", "attention.o_proj"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                    ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                ):  # fmt: skip
                    renamed[f"{mine}.{i}.{a}.{kind}"] = theirs[f"{other}.{i}.{b}.{kind}"]
    return renamed


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.versions
def test_loss_and_gradients_equal_the_published_implementation(norm_pix_loss: bool) -> None:
    ours, theirs = pair(norm_pix_loss=norm_pix_loss)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    noise = torch.rand(4, 16, generator=generator)
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS["imagenet"])
    # The class token's decoder position is the one place where we hold none; theirs was set to zero when drawn.
    theirs.decoder.decoder_pos_embed.data[:, 0] = 0
    expected = theirs((images.float() / 255 - mean) / std, noise=noise).loss
    found = ours(images, *draw_mask(noise, mask_ratio=0.75, grid=(4, 4)))
    assert abs(float(found) / float(expected) - 1) < 1e-5
    found.backward()
    expected.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    missing = {name: torch.zeros_like(p) for name, p in theirs.named_parameters() if p.grad is None}
    wanted = translate(grads | missing, ours)
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 60


def test_a_step_costs_4_percent_less_than_the_published_one() -> None:
    mae = MaskedAutoencoder(PatchEncoder("vit_base_patch16_224", image_size=224), DecoderOptions(decoder_depth=8))
    assert mae.flops_per_image(49, 147) / 58.7e9 == pytest.approx(0.963, abs=0.003)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_every_switch_trains_what_it_says(
    learned: bool, separate: bool, fixed: bool, decoder: Literal["self", "cross"]
) -> None:
    mae = MaskedAutoencoder(
        PatchEncoder("test_vit", image_size=64, depth=1, fixed_positions=fixed),
        DecoderOptions(
            decoder_width=32, decoder_depth=1, decoder_heads=4, decoder_type=decoder,
            use_learned_mask_token=learned, use_separate_pos_embed=separate, fixed_pos_embed=fixed,
        ),
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mae(images, *draw_mask(torch.rand(2, 16), mask_ratio=0.5, grid=(4, 4))).backward()
    moved = {name for name, p in mae.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert ("mask_token" in moved) == learned
    assert ("encoder.vit.pos_embed" in moved) == (not fixed)
    assert ("decoder_pos_embed" in moved) == (separate and not fixed)
    assert ("position_embed.weight" in moved) == (not separate)
    assert {name for name, p in mae.named_parameters() if p.requires_grad} == moved
    if not learned:
        assert not mae.mask_token.any()


def test_grad_checkpointing_changes_no_number() -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = PatchEncoder("test_vit", image_size=64, depth=2, grad_checkpointing=checkpointing)
        mae = MaskedAutoencoder(encoder, DecoderOptions(decoder_width=32, decoder_depth=1, decoder_heads=4))
        images = torch.arange(3 * 64 * 64).view(1, 3, 64, 64).to(torch.uint8)
        mae(images, *draw_mask(torch.linspace(0, 0.9, 16)[None], mask_ratio=0.5, grid=(4, 4))).backward()
        grads.append([p.grad.clone() for p in mae.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_pictures_keep_what_was_seen_and_grey_what_was_hidden() -> None:
    decoder = DecoderOptions(decoder_width=32, decoder_heads=4)
    mae = MaskedAutoencoder(PatchEncoder("test_vit", image_size=64, depth=1), decoder)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    keep, masked = draw_mask(torch.rand(2, 16), mask_ratio=0.75, grid=(4, 4))
    original, seen, painted = mae(images, keep, masked, want="pictures")
    assert torch.equal(original, images)
    for b in range(2):
        patches = [patchify(rows[b : b + 1], 16)[0] for rows in (original, seen, painted)]
        assert torch.equal(patches[0][keep[b]], patches[1][keep[b]])
        assert torch.equal(patches[0][keep[b]], patches[2][keep[b]])
        assert (patches[1][masked[b]] == 128).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_bas_patch16_224", {}, "vit_base_patch16_224"),
        ("resnet18", {}, "no plain ViT|no ViT"),
        ("vit_base_patch16_rope_224", {}, "no plain ViT|no ViT"),
        ("test_vit", {"image_size": 70}, "image_size is 70"),
    ],
)
def test_a_model_that_cannot_be_masked_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchEncoder(name, **({"image_size": 224} | options))


def test_positions_tell_all_patches_apart() -> None:
    positions = sine_cosine_positions((7, 5), 32)[0]
    distances = torch.cdist(positions, positions) + 100 * torch.eye(35)
    assert distances.min() > 0.1
    assert torch.equal(positions[0, :16], positions[5, :16])  # same column: the same first half
    assert torch.equal(positions[0, 16:], positions[1, 16:])  # same row: the same second half
