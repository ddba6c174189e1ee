"""The branch on high-pass residuals, and its normalisation over groups."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.settings import DetectorRecipe
from trainer.detection.build import load_trained
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.residual import GhostNorm, ResidualBranch


def detector(*, residual: bool, seed: int = 0) -> MorphDetector:
    torch.manual_seed(seed)
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1)
    head = HeadOptions.of(DetectorRecipe(pooling="avg", mix_group=4))
    return MorphDetector(encoder, normalisation="imagenet", head=head, residual=residual).eval()


def noise(num_images: int, *, side: int = 30) -> torch.Tensor:
    return 128 + 3 * torch.randn(num_images, 1, side, side - 4).expand(-1, 3, -1, -1)


def test_even_slopes_leave_no_residual_and_a_point_leaves_each_kernel() -> None:
    branch = ResidualBranch(16, group=4)
    slope_BCHW = (torch.arange(24.0)[:, None] * 3 + torch.arange(24.0) * 2).expand(1, 3, 24, 24)
    assert branch.residuals(slope_BCHW)[:, :, 2:-2, 2:-2].abs().max() < 1e-4
    point_BCHW = torch.zeros(1, 3, 9, 9)
    point_BCHW[:, :, 4, 4] = 8.0
    # Each kernel's centre is divided by its size: a point of 8 leaves 8, a quarter of which the branch sees.
    assert branch.residuals(point_BCHW)[0, :, 4, 4].abs().tolist() == pytest.approx([2.0] * 5)


def test_one_group_is_pytorchs_batch_norm_with_gradients_and_measured_statistics() -> None:
    torch.manual_seed(0)
    ghost, batch = GhostNorm(3, group=8), nn.BatchNorm2d(3, momentum=1.0)
    x_BCHW = torch.randn(8, 3, 5, 4) * 3 + 1
    a_BCHW, b_BCHW = x_BCHW.clone().requires_grad_(), x_BCHW.clone().requires_grad_()
    torch.testing.assert_close(ghost(a_BCHW), batch(b_BCHW))
    (ghost(a_BCHW) ** 3).sum().backward()
    (batch(b_BCHW) ** 3).sum().backward()
    torch.testing.assert_close(a_BCHW.grad, b_BCHW.grad)
    ghost.eval().measures = True
    ghost(x_BCHW)
    ghost.measures = False
    mean_C, variance_C = ghost.statistics
    torch.testing.assert_close(mean_C, batch.running_mean)
    torch.testing.assert_close(variance_C * 160 / 159, batch.running_var)  # PyTorch divides by n - 1


def test_in_training_features_depend_on_the_own_group_alone() -> None:
    torch.manual_seed(0)
    branch, images_BCHW = ResidualBranch(16, group=4), noise(8)
    together_BD = branch(images_BCHW)
    apart_BD = torch.cat([branch(images_BCHW[:4]), branch(images_BCHW[4:])])
    torch.testing.assert_close(together_BD, apart_BD, rtol=1e-4, atol=1e-5)
    swapped_BD = branch(torch.cat([images_BCHW[:4], noise(4)]))
    torch.testing.assert_close(together_BD[:4], swapped_BD[:4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together_BD[:4], branch(images_BCHW[[0, 1, 2, 7]]), atol=1e-3)


def test_evaluation_uses_the_measured_statistics_whatever_the_batch() -> None:
    torch.manual_seed(0)
    branch, images_BCHW = ResidualBranch(16, group=4).eval(), noise(6)
    before_BD = branch(images_BCHW)
    measured_BD = branch.measure(images_BCHW)
    torch.testing.assert_close(branch(images_BCHW), measured_BD, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before_BD, measured_BD, atol=1e-2)
    alone_BD = torch.cat([branch(image_CHW[None]) for image_CHW in images_BCHW])
    torch.testing.assert_close(measured_BD, alone_BD, rtol=1e-4, atol=1e-5)


def test_measured_statistics_stay_float32_in_bf16_and_are_saved() -> None:
    torch.manual_seed(0)
    model, images_BCHW = detector(residual=True), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    model(images_BCHW, want="measure")
    exact = {name: value.clone() for name, value in model.measured.items()}
    assert any(value.to(torch.bfloat16).float().ne(value).any() for value in exact.values())
    for name, value in model.to(torch.bfloat16).measured.items():
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0)

    model.float()
    other = detector(residual=True, seed=1)
    load_trained(other, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | exact)
    with torch.no_grad():
        for name, value in model.named_parameters():
            other.get_parameter(name).copy_(value)
    torch.testing.assert_close(other(images_BCHW, want="logits"), model(images_BCHW, want="logits"))


def test_a_detector_with_a_branch_is_the_plain_one_and_the_branchs_features() -> None:
    plain, joined = detector(residual=False), detector(residual=True)
    assert plain.measured == {}
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for name, value in plain.named_parameters():
            joined.get_parameter(name).copy_(value)
        assert joined.residual is not None
        joined(images_BCHW, want="measure")
        added_BC = joined.residual(images_BCHW.float()) @ joined.head.weight.T
        expected_BC = plain(images_BCHW, want="logits") + added_BC
        torch.testing.assert_close(joined(images_BCHW, want="logits"), expected_BC, rtol=1e-3, atol=1e-4)


def test_the_branch_counts_its_flops() -> None:
    branch, counted = ResidualBranch(16, group=4), FlopCounterMode(display=False)
    with counted:
        branch(torch.rand(1, 3, 44, 52))
    assert branch.flops(44, 52) == pytest.approx(counted.get_total_flops(), rel=0.02)
    assert detector(residual=True).flops_per_image() > detector(residual=False).flops_per_image()
