"""The branch on high-pass residuals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.settings import DetectorRecipe
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.residual import ResidualBranch


def detector(*, residual: bool) -> MorphDetector:
    torch.manual_seed(0)
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1)
    head = HeadOptions.of(DetectorRecipe(pooling="avg"))
    return MorphDetector(encoder, normalisation="imagenet", head=head, residual=residual).eval()


def test_even_slopes_leave_no_residual_and_a_point_leaves_each_kernel() -> None:
    branch = ResidualBranch(16)
    slope_BCHW = (torch.arange(24.0)[:, None] * 3 + torch.arange(24.0) * 2).expand(1, 3, 24, 24)
    assert branch.residuals(slope_BCHW)[:, :, 2:-2, 2:-2].abs().max() < 1e-4
    point_BCHW = torch.zeros(1, 3, 9, 9)
    point_BCHW[:, :, 4, 4] = 8.0
    # Each kernel's centre is divided by its size: a point of 8 leaves 8, and the branch halves it.
    assert branch.residuals(point_BCHW)[0, :, 4, 4].abs().tolist() == pytest.approx([4.0] * 5)


def test_features_of_an_image_depend_on_no_other_and_on_its_energy() -> None:
    torch.manual_seed(0)
    branch, noise_BCHW = ResidualBranch(16), torch.randn(4, 1, 30, 26).expand(-1, 3, -1, -1)
    images_BCHW = 128 + 3 * noise_BCHW
    together_BD = branch(images_BCHW)
    alone_BD = torch.cat([branch(image_CHW[None]) for image_CHW in images_BCHW])
    torch.testing.assert_close(together_BD, alone_BD, rtol=1e-4, atol=1e-5)
    # A norm over the image would make these equal.
    assert (branch(128 + 0.5 * noise_BCHW) - together_BD).abs().mean() > 0.1 * together_BD.abs().mean()


def test_a_detector_with_a_branch_is_the_plain_one_and_the_branchs_features() -> None:
    plain, joined = detector(residual=False), detector(residual=True)
    assert not any(name.startswith("residual.") for name in plain.state_dict())
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for name, value in plain.named_parameters():
            joined.get_parameter(name).copy_(value)
        assert joined.residual is not None
        added_BC = joined.residual(images_BCHW.float()) @ joined.head.weight.T
        expected_BC = plain(images_BCHW, want="logits") + added_BC
        torch.testing.assert_close(joined(images_BCHW, want="logits"), expected_BC, rtol=1e-3, atol=1e-4)


def test_the_branch_counts_its_flops() -> None:
    branch, counted = ResidualBranch(16), FlopCounterMode(display=False)
    with counted:
        branch(torch.rand(1, 3, 44, 52))
    assert branch.flops(44, 52) == pytest.approx(counted.get_total_flops(), rel=0.02)
    assert detector(residual=True).flops_per_image() > detector(residual=False).flops_per_image()
