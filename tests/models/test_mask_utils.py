import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.models.mask_utils import Strategy, apply_mask, draw_mask, num_kept, patchify, random_masking, unpatchify

STRATEGIES = ("random", "block", "grid")


@given(st.integers(2, 15), st.integers(2, 15), st.floats(0.05, 0.95), st.sampled_from(STRATEGIES), st.integers(1, 4))
def test_every_strategy_splits_the_patches_exactly(rows, columns, ratio, strategy, mask_block) -> None:
    num_patches = rows * columns
    if not 0 < round(num_patches * (1 - ratio)) < num_patches:
        return
    noise_BN = torch.rand(3, num_patches, generator=torch.Generator().manual_seed(rows))
    keep, masked = draw_mask(noise_BN, mask_ratio=ratio, strategy=strategy, grid=(rows, columns), mask_block=mask_block)
    assert keep.shape == (3, round(num_patches * (1 - ratio)))
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(num_patches).expand(3, -1))


def test_counts_are_rounded_and_not_cut() -> None:
    assert num_kept(100, 0.29) == 71  # int(100 * (1 - 0.29)) is 71, int(100 * 0.71 - tiny) would be 70
    assert num_kept(10, 0.75) == 2  # 2.5 to even
    assert num_kept(49, 0.9) == 5  # int() gives 4
    assert num_kept(196, 0.75) == 49


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0, 0.999])
def test_a_ratio_that_leaves_no_patch_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        num_kept(16, ratio)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_part_to_predict_is_drawn_evenly_from_the_hidden_patches(strategy: Strategy) -> None:
    noise_BN = torch.rand(8000, 36, generator=torch.Generator().manual_seed(0))
    keep, every = draw_mask(noise_BN, mask_ratio=0.75, strategy=strategy, grid=(6, 6))
    same, some = draw_mask(noise_BN, mask_ratio=0.75, strategy=strategy, grid=(6, 6), predict_share=1 / 3)
    assert torch.equal(keep, same)
    assert some.shape == (8000, 9)
    assert (some.diff(dim=1) > 0).all()
    assert all(set(b) <= set(a) for a, b in zip(every.tolist(), some.tolist(), strict=True))
    hidden, chosen = (torch.bincount(index.flatten(), minlength=36) for index in (every, some))
    assert (chosen / hidden - 1 / 3).abs().max() < 0.03


def test_the_block_strategy_hides_one_connected_region() -> None:
    noise_BN = torch.rand(64, 14 * 14, generator=torch.Generator().manual_seed(0))
    _, masked = draw_mask(noise_BN, mask_ratio=0.6, strategy="block", grid=(14, 14))
    for hidden in masked.tolist():
        reached, todo = set(), [hidden[0]]
        while todo:
            place = todo.pop()
            if place in reached or place not in hidden:
                continue
            reached.add(place)
            column = place % 14
            todo += [place - 14, place + 14] + [place - 1] * (column > 0) + [place + 1] * (column < 13)
        assert reached == set(hidden)


def test_the_grid_strategy_hides_whole_cells() -> None:
    noise_BN = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    _, masked = draw_mask(noise_BN, mask_ratio=0.75, strategy="grid", grid=(8, 8), mask_block=2)
    mask = torch.zeros(8, 64).scatter_(1, masked, 1.0).view(8, 4, 2, 4, 2)
    assert (mask.amax((2, 4)) == mask.amin((2, 4))).all()


def test_the_seeds_interface_restores_the_order() -> None:
    x = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    x_masked, mask, ids_restore = random_masking(x, mask_ratio=0.75, generator=torch.Generator().manual_seed(1))
    assert x_masked.shape == (2, 2, 3)
    assert mask.sum(1).tolist() == [6, 6]
    filled = torch.cat([x_masked, torch.zeros(2, 6, 3)], 1).gather(1, ids_restore[..., None].expand(-1, -1, 3))
    assert torch.equal(filled, apply_mask(x, mask))
    assert torch.equal(apply_mask(x, mask, torch.full((3,), 9.0))[mask.bool()], torch.full((12, 3), 9.0))


def test_random_masks_hide_every_patch_equally_often() -> None:
    noise_BN = torch.rand(4000, 16, generator=torch.Generator().manual_seed(2))
    _, masked = draw_mask(noise_BN, mask_ratio=0.75, grid=(4, 4))
    share = torch.bincount(masked.flatten(), minlength=16) / 4000
    assert (share - 0.75).abs().max() < 0.03


def test_patchify_inverts() -> None:
    image = torch.rand(2, 3, 12, 20)
    assert torch.equal(unpatchify(patchify(image, 4), 4, (3, 5)), image)
