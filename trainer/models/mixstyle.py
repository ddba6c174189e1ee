"""MixStyle: give a sample the feature statistics of another one, so that the model does not rely on a camera's style.

The published module draws from global generators whether a whole batch is mixed, and a permutation of it, which may
map a sample to itself. Here a sample's draws are uniform numbers keyed by its position in the run, as its crop is. Each
sample is mixed or not independently, and never with itself if there is another one. Partners are in the same group of a
fixed size, which the loader never cuts (`trainer.data.stream.Slice`), so they depend neither on the micro batch nor on
the number of ranks.

Shapes: B samples, G samples of a group, T = prefix + N tokens, N patches, D width, K = 3 draws a sample.
Source: Zhou et al. 2021, arXiv 2104.02008, section 3.1; on tokens of a ViT: Noori et al. 2023, arXiv 2303.15698.
"""

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

NUM_DRAWS = 3
"""Uniform numbers for each sample: whether it is mixed, with which one, and how much."""

_QUANTILES = 1 << 14
_EPS = 1e-6


class MixStyle(nn.Module):
    """Mixes means and deviations over the patch tokens of two samples; class and register tokens stay unchanged.

    Args:
        num_prefix: class and register tokens in front of the patches.
        group: number of consecutive samples that are partners of each other; a batch holds whole groups.
        p: probability that a sample is mixed.
        alpha: mixing weights come from Beta(alpha, alpha).
        same_label: mix only samples of one class.
    """

    def __init__(
        self, *, num_prefix: int, group: int, p: float = 0.5, alpha: float = 0.1, same_label: bool = False
    ) -> None:
        super().__init__()
        self._num_prefix, self._group, self._p, self._same_label = num_prefix, group, p, same_label
        self.weights = BetaDraws(alpha)

    def forward(self, tokens_BTD: Tensor, draws_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Mix in training; in evaluation return the tokens. Statistics are float32 and have no gradient."""
        if not self.training:
            return tokens_BTD
        prefix_BPD, patches_BND = tokens_BTD[:, : self._num_prefix], tokens_BTD[:, self._num_prefix :].float()
        weight_B = torch.where(draws_BK[:, 0] < self._p, self.weights(draws_BK[:, 2]), 1.0)
        partner_B = partners(draws_BK[:, 1], self._group, labels_B if self._same_label else None)
        with torch.no_grad():
            mean_B1D = patches_BND.mean(dim=1, keepdim=True)
            scale_B1D = (patches_BND.var(dim=1, keepdim=True) + _EPS).sqrt()
            weight_B11 = weight_B[:, None, None]
            new_mean_B1D = weight_B11 * mean_B1D + (1 - weight_B11) * mean_B1D[partner_B]
            new_scale_B1D = weight_B11 * scale_B1D + (1 - weight_B11) * scale_B1D[partner_B]
        mixed_BND = (patches_BND - mean_B1D) / scale_B1D * new_scale_B1D + new_mean_B1D
        chosen_BND = torch.where(weight_B11 < 1, mixed_BND, patches_BND)  # an unmixed sample keeps its bits
        return torch.cat([prefix_BPD, chosen_BND.to(tokens_BTD.dtype)], dim=1)


class BetaDraws(nn.Module):
    """Draws of Beta(alpha, alpha) from uniform numbers; the table moves with the module, without a copy a step."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        # An engine in bf16 or fp16 casts buffers of floats, which would round the weights; it leaves integers alone.
        self._bits: Tensor
        self.register_buffer("_bits", beta_quantiles(alpha).view(torch.int32), persistent=False)

    def forward(self, uniform_B: Tensor) -> Tensor:
        """Return one float32 draw for each uniform number in [0, 1)."""
        return quantile(self._bits.view(torch.float32), uniform_B)


def beta_quantiles(alpha: float) -> Tensor:
    """Tabulate the inverse CDF of Beta(alpha, alpha) at the middles of 16,384 equal shares, float32."""
    return torch.from_numpy(betaincinv(alpha, alpha, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)).float()


def quantile(table: Tensor, uniform_B: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into draws of the tabulated distribution."""
    return table[(uniform_B * len(table)).long()]


def partners(order_B: Tensor, group: int, labels_B: Tensor | None = None) -> Tensor:
    """Give each sample another one of its group: the next in a random order, so that each is a partner once.

    Args:
        order_B: random numbers that decide the order.
        group: number of consecutive samples that form a group.
        labels_B: if given, partners are of the same class; the only sample of a class is its own partner.

    Returns:
        partner_B: int64 indices into the batch.

    Example: numbers 0.3 0.1 0.9 0.5 order the samples 1, 0, 3, 2, so the partners of 0, 1, 2, 3 are 3, 0, 1, 2.
    """
    # argsort gives the samples in order, and argsort of that the place of each sample.
    place_BG = order_B.view(-1, group).argsort(dim=1, stable=True).argsort(dim=1)
    ahead_BGG = (
        place_BG[:, None, :] - place_BG[:, :, None] - 1
    ) % group  # steps to each other one, from 0; itself is last
    if labels_B is not None:
        label_BG = labels_B.view(-1, group)
        # A sample of another class counts as further away than any of the same class, itself included.
        ahead_BGG = ahead_BGG + group * (label_BG[:, None, :] != label_BG[:, :, None])
    first_B1 = torch.arange(0, len(order_B), group, device=order_B.device)[:, None]
    return (ahead_BGG.argmin(dim=2) + first_B1).flatten()
