"""Our detector beside a CNN of timm: what is drawn, what is compared, what is refused."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools.bench import detector as bench
from trainer.errors import ConfigError
from trainer.models.encoder import build_peer

NEEDED = {"data": "d", "val_data": "v", "test_sets": "t=t", "output_dir": "o"}


def compared(scores: dict[str, list[np.ndarray[Any, Any]]], label_N: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
    people = [(f"p{number % 10}",) for number in range(len(label_N))]
    test_set: Any = SimpleNamespace(name="t", truth=SimpleNamespace(label_N=label_N, people_N=people))
    logits = {name: {"t": found} for name, found in scores.items()}
    rows = bench.compare(bench.Settings(**NEEDED, num_replicates=200), [test_set], logits)["rows"]
    return {row["method"]: row for row in json.loads(json.dumps(rows))}


def test_differences_are_paired_and_seeds_are_compared_each_with_its_own() -> None:
    rng = np.random.default_rng(0)
    label_N = np.repeat([0, 1], 40)
    good, bad = (label_N + rng.normal(0, spread, (2, 80)) for spread in (0.5, 3.0))
    rows = compared({"ours": list(good), "peer": list(bad), "twin": list(good), "shortcut": [bad[0]]}, label_N)
    # The same scores differ by nothing in every replicate, although each of them has a wide interval.
    assert rows["twin"]["difference_interval"] == [0, 0]
    assert rows["twin"]["interval"][1] - rows["twin"]["interval"][0] > 0.02
    assert rows["twin"]["seeds_won"] == 0
    assert rows["peer"]["ours_minus_it"] == pytest.approx(rows["ours"]["mean"] - rows["peer"]["mean"])
    assert rows["peer"]["difference_interval"][1] < 0
    assert rows["peer"]["seeds_won"] == rows["shortcut"]["seeds_won"] == 2
    assert "ours_minus_it" not in rows["ours"]


def test_the_peer_sees_pixels_as_stored_and_learns_within_its_seconds() -> None:
    rng = np.random.default_rng(0)
    label_N = np.arange(40) % 2
    # Class 1 is noisier, which only unscaled pixels show.
    images = [rng.normal(128, 5 + 30 * label, (20, 24, 3)).clip(0, 255).astype(np.uint8) for label in label_N]
    photographs = bench.Photographs(images, label_N, ["morph" if label else "" for label in label_N])
    centre_BCHW = bench.crops(photographs, [3], 16, None)
    cut_HWC = (centre_BCHW[0].permute(1, 2, 0).numpy() * 0.22 + 0.45) * 255
    np.testing.assert_allclose(cut_HWC, images[3][2:18, 4:20], atol=1e-3)

    settings = bench.Settings(**NEEDED, crop_size=16, batch=8, peer="resnet10t")
    model, spent_s = bench.train_peer(settings, photographs, 1.5, seed=0)
    assert 1.5 <= spent_s < 4
    score_N = bench.score_peer(model, photographs, 16)
    assert score_N[label_N == 1].min() > score_N[label_N == 0].mean()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="seeds is 0"):
        bench.Settings(**NEEDED, seeds=0)
    with pytest.raises(ConfigError, match="cpu_seconds is -1"):
        bench.Settings(**NEEDED, cpu_seconds=-1.0)
    with pytest.raises(ConfigError, match=r"peer is 'resnet10x'.*resnet10t"):
        build_peer("resnet10x")
