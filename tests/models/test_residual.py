"""The branch on an image's texture, and the gate in front of the ViT."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.settings import DetectorRecipe
from trainer.errors import ConfigError
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.residual import ResidualBranch


def detector(*, residual: bool, seed: int = 0) -> MorphDetector:
    torch.manual_seed(seed)
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1)
    head = HeadOptions.of(DetectorRecipe(pooling="avg"))
    return MorphDetector(encoder, normalisation="imagenet", head=head, residual=residual).eval()


def noise(num_images: int, *, deviation: float = 3.0) -> torch.Tensor:
    return 128 + deviation * torch.randn(num_images, 1, 28, 40).expand(-1, 3, -1, -1)


def test_energies_are_those_of_scipys_filters() -> None:
    torch.manual_seed(0)
    branch, image_BCHW = ResidualBranch(16, (28, 40)), noise(1, deviation=20)
    grey_HW = image_BCHW[0, 0].double().numpy()
    kernels = branch.kernels_K1HW[:, 0].numpy()
    found = [ndimage.correlate(grey_HW, kernel / np.abs(kernel).max(), mode="mirror") for kernel in kernels]
    scales = [grey_HW, *(ndimage.gaussian_filter(grey_HW, sigma, mode="mirror", truncate=3) for sigma in (1, 2, 4))]
    found += [finer - coarser for finer, coarser in itertools.pairwise(scales)]
    cells_FRS = np.abs(found)[:, :, :35].reshape(8, 4, 7, 5, 7).mean(axis=(2, 4))
    expected_FRS = torch.from_numpy(np.log(cells_FRS + 0.3) - 1).float()
    torch.testing.assert_close(branch.energies(image_BCHW)[0], expected_FRS, rtol=1e-4, atol=1e-4)


def test_even_slopes_and_brightness_have_no_texture() -> None:
    """What remains is the logarithm of the least energy. Edges are reflected, which the coarsest band sees from far."""
    branch = ResidualBranch(16, (64, 64))
    slope_BCHW = (torch.arange(64.0)[:, None] + torch.arange(64.0) * 2).expand(1, 3, 64, 64)
    least = float(np.log(0.3)) - 1
    for image_BCHW in (slope_BCHW, slope_BCHW + 20):
        inside_FRS = branch.energies(image_BCHW)[0, :, 4:5, 4:5]
        torch.testing.assert_close(inside_FRS, torch.full_like(inside_FRS, least), rtol=0, atol=1e-2)


def test_an_image_counts_by_itself_and_where_its_texture_lies_matters() -> None:
    torch.manual_seed(0)
    branch, images_BCHW, pooled_BD = ResidualBranch(16, (28, 40)).eval(), noise(5), torch.zeros(5, 16)
    together_BD = branch(images_BCHW, pooled_BD)
    alone_BD = torch.cat([branch(image_CHW[None], pooled_BD[:1]) for image_CHW in images_BCHW])
    torch.testing.assert_close(together_BD, alone_BD, rtol=1e-4, atol=1e-5)
    smooth_left, smooth_right = noise(1), noise(1)
    smooth_left[..., :20], smooth_right[..., 20:] = 128, 128
    apart = branch(smooth_left, pooled_BD[:1]) - branch(smooth_right, pooled_BD[:1])
    assert apart.abs().max() > 1e-3


def test_what_fills_no_cell_is_not_seen() -> None:
    torch.manual_seed(0)
    branch, image_BCHW = ResidualBranch(16, (34, 34)), 128 + torch.randn(1, 3, 34, 34)
    assert branch.energies(image_BCHW).shape[-2:] == (4, 4)
    changed_BCHW = image_BCHW.clone()
    changed_BCHW[:, :, :, 31:] += 50  # the kernels reach two pixels beyond the last cell, which ends at 28
    kernels = [branch.energies(images)[:, :5] for images in (image_BCHW, changed_BCHW)]
    torch.testing.assert_close(*kernels)
    with pytest.raises(ConfigError, match="image_size is 20, but use_residual_branch needs at least 24"):
        ResidualBranch(16, (64, 20))


def test_a_detector_with_a_branch_is_the_gated_vit_and_the_branchs_features() -> None:
    plain, joined = detector(residual=False), detector(residual=True)
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for name, value in plain.named_parameters():
            joined.get_parameter(name).copy_(value)
        assert joined.residual is not None
        joined.residual.gate.fill_(0.25)
        features_BD = joined.residual(images_BCHW.float(), torch.zeros(3, 192))
        expected_BC = 0.25 * plain(images_BCHW, want="logits") + features_BD @ joined.head.weight.T
        torch.testing.assert_close(joined(images_BCHW, want="logits"), expected_BC, rtol=1e-3, atol=1e-4)


def test_filters_are_exact_in_bf16() -> None:
    torch.manual_seed(0)
    branch, images_BCHW = ResidualBranch(16, (28, 40)), noise(2)
    exact = branch.energies(images_BCHW)
    torch.testing.assert_close(branch.to(torch.bfloat16).energies(images_BCHW), exact, rtol=0, atol=0)
    assert branch(images_BCHW, torch.zeros(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_branch_counts_its_flops() -> None:
    branch, counted = ResidualBranch(16, (44, 52)), FlopCounterMode(display=False)
    with counted, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused attention of CPUs
        branch(torch.rand(1, 3, 44, 52), torch.zeros(1, 16)).sum().backward()
    assert branch.flops(44, 52) == pytest.approx(counted.get_total_flops(), rel=1e-3)
    assert detector(residual=True).flops_per_image() > detector(residual=False).flops_per_image()
