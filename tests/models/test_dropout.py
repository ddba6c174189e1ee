"""Dropout and drop path belong to the sample: masks do not depend on how a batch is cut, and they are random."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.config.settings import DetectorRecipe
from trainer.models.classifier import MorphClassifier
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.dropout import KeyedDropout, KeyedDropPath, SampleKeys, _mix, key_dropouts
from trainer.models.encoder import PatchEncoder, chance_of_skipping
from trainer.models.lora import add_lora
from trainer.models.mixstyle import MixStyle
from trainer.seeds import Purpose, uniforms


def draws(count: int, num_draws: int = 2, first: int = 0, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, Purpose.MASK, range(first, first + count), num_draws))


def dropped(p: float, num_samples: int, num_elements: int, *, layer: int = 0, layers: int = 4) -> torch.Tensor:
    keys = SampleKeys(layers)
    keys.assign(draws(num_samples))
    return KeyedDropout(p, layer, keys).train()(torch.ones(num_samples, num_elements)) == 0


def close_to_independent(one: torch.Tensor, other: torch.Tensor, p: float) -> bool:
    """Whether the rows of two masks coincide as often as independent ones: a chi-square of their covariances."""
    n = one.shape[1]
    z_B = ((one.double() - p) * (other.double() - p)).sum(dim=1) / (p * (1 - p) * math.sqrt(n))
    return bool(abs(float(z_B.square().mean()) - 1) < 5 * math.sqrt(2 / len(z_B))) and bool(z_B.abs().max() < 5)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_masks_drop_their_share_and_are_independent_between_elements_samples_and_layers(p: float) -> None:
    first, second = (dropped(p, 200, 50 * 96, layer=layer) for layer in (0, 1))
    share_B = first.double().mean(dim=1)
    assert abs(float(share_B.mean()) - p) < 5 * math.sqrt(p * (1 - p) / first.numel())
    assert float((share_B - p).abs().max()) < 5 * math.sqrt(p * (1 - p) / first.shape[1])
    assert close_to_independent(first, second, p)
    assert close_to_independent(first, first.roll(1, dims=0), p)
    assert close_to_independent(first, first.roll(1, dims=1), p)
    assert close_to_independent(first, first.roll(96, dims=1), p)


def test_what_stays_is_scaled_so_that_the_mean_stays_and_evaluation_drops_nothing() -> None:
    keys = SampleKeys(2)
    keys.assign(draws(64))
    layer, x_BE = KeyedDropout(0.25, 0, keys).train(), torch.ones(64, 1000)
    result_BE = layer(x_BE)
    assert set(result_BE.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert float(result_BE.mean()) == pytest.approx(1, abs=0.01)
    assert layer.eval()(x_BE) is x_BE
    path = KeyedDropPath(0.25, 1, keys).train()
    rows_B = path(torch.ones(64, 5, 3)).flatten(1)
    assert (rows_B == rows_B[:, :1]).all()
    assert 4 < int((rows_B[:, 0] == 0).sum()) < 28
    assert path.eval()(x_BE) is x_BE


def test_the_hash_is_splitmix64_as_numpy_computes_it_without_signs() -> None:
    value = np.arange(1000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    assert (_mix(torch.from_numpy(value.view(np.int64))).numpy().view(np.uint64) == mixed).all()


def test_a_recomputed_block_drops_the_same() -> None:
    keys, gradients = SampleKeys(1), []
    keys.assign(draws(6))
    layer = nn.Sequential(nn.Linear(20, 20), KeyedDropout(0.5, 0, keys)).train()
    for recompute in (False, True):
        x_BD = torch.ones(6, 20, requires_grad=True)
        y_BD = checkpoint(layer, x_BD, use_reentrant=False) if recompute else layer(x_BD)
        y_BD.square().sum().backward()
        gradients.append(x_BD.grad)
    assert torch.equal(*gradients)


def test_a_traced_model_drops_the_same() -> None:
    keys = SampleKeys(1)
    keys.assign(draws(6))
    layer = KeyedDropout(0.5, 0, keys).train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(6, 20)), layer(torch.ones(6, 20)))
    keys.assign(draws(6, first=6))
    assert torch.equal(compiled(torch.ones(6, 20)), layer(torch.ones(6, 20)))


def all_on() -> MorphDetector:
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=3, drop_path=0.4)
    add_lora(encoder.vit, dropout=0.3, targets=("query", "value", "fc2"))
    for name, parameter in encoder.vit.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    styles = [MixStyle(num_prefix=encoder.num_prefix, group=4, p=0.5) for _ in range(2)]
    head = HeadOptions.of(DetectorRecipe(mixup_alpha=0.4, mix_group=4, use_improved_classifier=True))
    return MorphDetector(encoder, normalisation="imagenet", head=head, mixstyle=styles).train()


def gradients(model: MorphDetector, parts: Iterator[slice] | list[slice]) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    labels, noise = torch.arange(16) % 2, draws(16, model.num_draws)
    model.zero_grad()
    for part in parts:
        (model(images[part], labels[part], noise[part]) * len(labels[part]) / 16).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_with_all_that_drops_and_mixes_on_the_gradients_do_not_depend_on_the_micro_batch() -> None:
    model = all_on()
    whole = gradients(model, [slice(0, 16)])
    torch.manual_seed(99)  # no generator has a say
    for size in (4, 8):
        parts = gradients(model, [slice(i, i + size) for i in range(0, 16, size)])
        assert parts.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_every_module_of_a_detector_that_drops_is_keyed() -> None:
    model = all_on()
    kinds = [type(module) for module in model.modules()]
    assert nn.Dropout not in [type(m) for m in model.modules() if getattr(m, "p", 0)]
    assert all(chance_of_skipping(module) == 0 for module in model.modules())
    assert kinds.count(KeyedDropPath) == 4  # two branches of the blocks behind the first
    assert kinds.count(KeyedDropout) == 7  # two adapters a block and the classifier's
    assert key_dropouts(MorphClassifier(6, dropout=0.0)) is None
