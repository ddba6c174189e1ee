"""Heads, losses, MixStyle and the detector: laws, and pytorch-metric-learning's CosFace as an oracle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import CosFaceLoss
from scipy.stats import beta, chisquare, kstest
from torch import nn
from torch.nn import functional as F

from trainer.config.settings import DetectorRecipe
from trainer.models.classifier import MorphClassifier
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.heads import CosineLayer, ProjectionHead
from trainer.models.losses import margin_loss, weighted_cross_entropy
from trainer.models.mixstyle import MixStyle, beta_quantiles, partners, quantile
from trainer.models.parameter_groups import parameter_groups


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("margin", "scale", "weights"), [(0.3, 30.0, (1.0, 1.0)), (0.2, 64.0, (1.0, 4.0))])
def test_the_margin_loss_is_pytorch_metric_learnings_cosface(margin: float, scale: float, weights) -> None:
    layer, embedding_BD = CosineLayer(16), rand(12, 16)
    labels_B = torch.arange(12) % 2
    oracle = CosFaceLoss(num_classes=2, embedding_size=16, margin=margin, scale=scale)
    with torch.no_grad():
        oracle.W.copy_(layer.weight.T)
    each = [oracle(embedding_BD[i : i + 1], labels_B[i : i + 1]).item() for i in range(12)]
    expected = np.mean([weights[int(labels_B[i])] * each[i] for i in range(12)])
    ours = margin_loss(layer(embedding_BD), labels_B, margin=margin, scale=scale, class_weights=weights)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_weighted_cross_entropy_does_not_depend_on_how_a_batch_is_cut() -> None:
    logits_BC, labels_B, weights = rand(8, 2), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]), (0.5, 3.0)
    whole = weighted_cross_entropy(logits_BC, labels_B, class_weights=weights)
    cuts = [slice(i, i + 2) for i in (0, 2, 4, 6)]
    parts = [weighted_cross_entropy(logits_BC[cut], labels_B[cut], class_weights=weights) for cut in cuts]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-6)
    even = weighted_cross_entropy(logits_BC, labels_B)
    assert float(even) == pytest.approx(float(F.cross_entropy(logits_BC, labels_B)), rel=1e-6)
    scaled = weighted_cross_entropy(logits_BC, labels_B, class_weights=weights) * 8 / (0.5 * 6 + 3.0 * 2)
    torchs = F.cross_entropy(logits_BC, labels_B, weight=torch.tensor(weights))
    assert float(scaled) == pytest.approx(float(torchs), rel=1e-6)


def test_the_projection_is_linear_relu_linear() -> None:
    head, x_BD = ProjectionHead(8, proj_dim=5, hidden_dim=7), rand(3, 8)
    by_hand = F.relu(x_BD @ head.hidden.weight.T + head.hidden.bias) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(x_BD), by_hand)
    assert ProjectionHead(8).hidden.out_features == 8


def test_prototypes_give_cosines() -> None:
    cosine_BC = CosineLayer(6)(1e3 * rand(50, 6))
    assert cosine_BC.abs().max() <= 1 + 1e-6
    assert MorphClassifier(6, hidden_dim=9, cosine=True)(rand(4, 6)).shape == (4, 2)


def test_the_classifier_is_norm_linear_gelu_dropout_and_a_last_layer() -> None:
    head, x_BD = MorphClassifier(6, hidden_dim=9, dropout=0.5).eval(), 100 * rand(4, 6)
    hidden_BH = F.gelu(head.hidden(F.layer_norm(x_BD, (6,))))
    torch.testing.assert_close(head(x_BD), head.out(hidden_BH))
    head.train()
    assert not torch.equal(head(x_BD), head(x_BD)), "nothing was dropped in training"
    cosine_BC = MorphClassifier(6, cosine=True)(x_BD)
    assert cosine_BC.abs().max() <= 1 + 1e-6
    assert F.cosine_similarity(CosineLayer(6).weight, torch.ones(2, 6)).abs().max() < 1


def test_smoothing_is_torchs_and_losses_are_taken_in_float32() -> None:
    logits_BC, labels_B = 5 * rand(8, 2), torch.arange(8) % 2
    ours = weighted_cross_entropy(logits_BC, labels_B, label_smoothing=0.2)
    torch.testing.assert_close(ours, F.cross_entropy(logits_BC, labels_B, label_smoothing=0.2))
    half_BC = logits_BC.bfloat16()
    for loss in (weighted_cross_entropy, margin_loss):
        assert loss(half_BC, labels_B).dtype == torch.float32
        assert torch.equal(loss(half_BC, labels_B), loss(half_BC.float(), labels_B))


# ---------------------------------------------------------------------------------------------- MixStyle


def mixed(tokens_BTD: torch.Tensor, draws_BK: torch.Tensor, labels_B: torch.Tensor, **options) -> torch.Tensor:
    return MixStyle(num_prefix=1, group=len(tokens_BTD), **options).train()(tokens_BTD, draws_BK, labels_B)


def test_mixstyle_mixes_the_statistics_of_two_samples_and_nothing_else() -> None:
    tokens_BTD, labels_B = 2 * rand(4, 10, 6) + 1, torch.tensor([0, 1, 0, 1])
    draws_BK = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    result_BTD = mixed(tokens_BTD, draws_BK, labels_B, p=1.0, alpha=1.0)
    partner_B = partners(draws_BK[:, 1], 4)
    weight_B1 = quantile(beta_quantiles(1.0), draws_BK[:, 2])[:, None]
    before_BND, after_BND = tokens_BTD[:, 1:], result_BTD[:, 1:]
    mean_BD = before_BND.mean(1)
    torch.testing.assert_close(after_BND.mean(1), weight_B1 * mean_BD + (1 - weight_B1) * mean_BD[partner_B])
    scale_BD = before_BND.std(1)
    expected_BD = weight_B1 * scale_BD + (1 - weight_B1) * scale_BD[partner_B]
    torch.testing.assert_close(after_BND.std(1), expected_BD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result_BTD[:, 0], tokens_BTD[:, 0], rtol=0, atol=0)
    normed = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (before_BND, after_BND)]
    torch.testing.assert_close(*normed, rtol=1e-4, atol=1e-4)


def test_mixstyle_is_off_in_evaluation_and_an_unmixed_sample_keeps_its_bits() -> None:
    tokens_BTD, labels_B = rand(6, 5, 4), torch.zeros(6, dtype=torch.long)
    draws_BK = torch.rand(6, 3, generator=torch.Generator().manual_seed(2))
    layer = MixStyle(num_prefix=1, group=6, p=0.5)
    assert torch.equal(layer.eval()(tokens_BTD, draws_BK, labels_B), tokens_BTD)
    result_BTD = layer.train()(tokens_BTD, draws_BK, labels_B)
    unmixed_B = draws_BK[:, 0] >= 0.5
    assert 0 < unmixed_B.sum() < 6
    assert torch.equal(result_BTD[unmixed_B], tokens_BTD[unmixed_B])


def test_mixstyle_takes_statistics_of_half_precision_tokens_in_float32() -> None:
    tokens_BTD, labels_B = (rand(4, 50, 6) + 20).bfloat16(), torch.zeros(4, dtype=torch.long)
    draws_BK = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    whole_BTD = mixed(tokens_BTD.float(), draws_BK, labels_B, p=1.0, alpha=1.0)
    assert torch.equal(mixed(tokens_BTD, draws_BK, labels_B, p=1.0, alpha=1.0), whole_BTD.bfloat16())


def test_mixstyles_statistics_carry_no_gradient() -> None:
    tokens_BTD = rand(3, 9, 4).requires_grad_()
    draws_BK = torch.tensor([[0.0, 0.1, 0.5], [0.0, 0.5, 0.5], [0.0, 0.9, 0.5]])
    result_BTD = mixed(tokens_BTD, draws_BK, torch.zeros(3, dtype=torch.long), p=1.0, alpha=1.0)
    result_BTD[0].sum().backward()
    assert tokens_BTD.grad is not None
    assert not tokens_BTD.grad[1:].any(), "a partner's statistics got a gradient"
    assert len(tokens_BTD.grad[0, 1:].unique(dim=0)) == 1, "the own statistics got a gradient"


@settings(max_examples=50)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_partners_serve_once_are_of_the_group_and_of_the_class_and_never_oneself(
    group: int, num_groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = group * num_groups
    labels_B = torch.randint(0, 2, (size,), generator=generator)
    order_B = torch.rand(size, generator=generator)
    partner_B = partners(order_B, group, labels_B)
    assert torch.equal(labels_B[partner_B], labels_B)
    assert sorted(partner_B.tolist()) == list(range(size))
    alone_B = [(labels_B[i // group * group :][:group] == labels_B[i]).sum() == 1 for i in range(size)]
    assert (partner_B == torch.arange(size)).tolist() == alone_B
    free_B = partners(order_B, group)
    assert sorted(free_B.tolist()) == list(range(size))
    assert not (free_B == torch.arange(size)).any(), "a sample is its own partner"
    assert torch.equal(free_B // group, torch.arange(size) // group)


def test_every_partner_is_equally_likely() -> None:
    order_B = torch.rand(8 * 3000, generator=torch.Generator().manual_seed(4))
    distance_B = (partners(order_B, 8) - torch.arange(len(order_B))) % 8
    counts = torch.bincount(distance_B, minlength=8)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > 1e-3


def test_mixing_weights_follow_the_beta_distribution() -> None:
    uniform_N = torch.rand(20_000, generator=torch.Generator().manual_seed(3))
    drawn = quantile(beta_quantiles(0.1), uniform_N).numpy()
    assert kstest(drawn[(drawn > 1e-3) & (drawn < 1 - 1e-3)], _truncated(0.1)).pvalue > 0.01
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(beta(0.1, 0.1).var(), rel=0.02)


def _truncated(alpha: float):
    whole = beta(alpha, alpha)
    low, high = whole.cdf(1e-3), whole.cdf(1 - 1e-3)
    return lambda x: (whole.cdf(x) - low) / (high - low)


# ---------------------------------------------------------------------------------------------- the detector


def detector(**options) -> MorphDetector:
    mixstyle = [MixStyle(num_prefix=1, group=2)] * options.pop("mixstyle", 0)
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8)
    return MorphDetector(
        encoder,
        normalisation="imagenet",
        head=HeadOptions.of(DetectorRecipe(**{"mix_group": 2} | options)),
        mixstyle=mixstyle,
    )


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "cls"},
        {"use_projection_head": True, "proj_dim": 12},
        {"use_improved_classifier": True, "cls_hidden_dim": 20},
        {"use_margin_loss": True},
        {"use_projection_head": True, "use_improved_classifier": True, "use_margin_loss": True},
        {"mixup_alpha": 0.8, "label_smoothing": 0.1},
        {"mixstyle": 2},
    ],
)
def test_every_head_learns_four_pictures(options) -> None:
    model, images, labels = detector(**options).train(), pictures(), torch.tensor([0, 1, 1, 0])
    draws = torch.rand(4, model.num_draws, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = model(images, labels, draws).item()
    for _ in range(40):
        loss = model(images, labels, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    logits_BC = model.eval()(images, want="logits")
    assert logits_BC.shape == (4, 2)
    if not options.keys() & {"mixup_alpha", "mixstyle"}:  # those learn from mixtures, and these are none
        assert logits_BC.argmax(1).tolist() == labels.tolist()
    map_BRC = model(images, want="attention")
    assert map_BRC.shape == (4, 4, 4)
    assert map_BRC.max().item() == 1.0
    assert map_BRC.min() >= 0


def test_the_untrained_loss_of_a_linear_head_is_that_of_a_coin() -> None:
    model = detector().eval()
    loss = model(pictures(64), torch.arange(64) % 2, torch.zeros(64, 1)).item()
    assert loss == pytest.approx(math.log(2), abs=0.05)


def test_attention_rows_follow_timms_own_attention() -> None:
    model = detector().eval()
    vit, seen = model.encoder.vit, []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, args, _o: seen.append(args[0].mean(1)))
    map_BRC = model(pictures(2), want="attention")
    flow = torch.eye(seen[0].shape[-1]).expand(2, -1, -1)
    for weights_BTT in seen:
        flow = (0.5 * weights_BTT + 0.5 * torch.eye(flow.shape[-1])) @ flow
    prefix = model.encoder.num_prefix
    expected_BN = flow[:, prefix:, prefix:].mean(1)
    torch.testing.assert_close(map_BRC.flatten(1), expected_BN / expected_BN.amax(1, keepdim=True))


def test_layer_decay_gives_each_block_its_learning_rate() -> None:
    model = detector()
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    depth = len(model.encoder.vit.blocks)
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale_of.keys() == {id(p) for p in named.values()}
    assert scale_of[id(named["head.weight"])] == scale_of[id(named["encoder.vit.norm.weight"])] == 1.0
    assert scale_of[id(named[f"encoder.vit.blocks.{depth - 1}.attn.qkv.weight"])] == 0.5
    assert scale_of[id(named["encoder.vit.blocks.0.attn.qkv.weight"])] == 0.5**depth
    assert scale_of[id(named["encoder.vit.patch_embed.proj.weight"])] == 0.5 ** (depth + 1)
    assert len(parameter_groups(model, 0.05)) == 2


def test_fine_tuning_spares_positions_and_tokens_from_weight_decay_as_timm_does() -> None:
    model = detector()
    named = {id(p): name for name, p in model.named_parameters()}

    def decaying(**how: bool) -> set[str]:
        groups = parameter_groups(model, 0.05, **how)
        return {named[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    spared = decaying() - decaying(decay_embeddings=False)
    assert spared == {f"encoder.vit.{name}" for name in model.encoder.vit.no_weight_decay()} & set(named.values())
    assert {"encoder.vit.pos_embed", "encoder.vit.cls_token"} <= spared


def test_the_head_has_its_own_learning_rate() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "encoder": nn.Linear(4, 4)})
    groups = parameter_groups(model, 0.05, head_lr_scale=10.0)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scales[id(p)] for p in model["head"].parameters()} == {10.0}
    assert {scales[id(p)] for p in model["encoder"].parameters()} == {1.0}


def test_an_engine_in_bf16_rounds_no_table_of_mixing_weights() -> None:
    layer, uniform_N = MixStyle(num_prefix=1, group=2), torch.linspace(0, 0.999, 500)
    expected_N = layer.weights(uniform_N)
    rounded_N = layer.bfloat16().weights(uniform_N)
    assert rounded_N.dtype == torch.float32
    assert torch.equal(rounded_N, expected_N)
