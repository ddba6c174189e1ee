"""Dropout and drop path whose masks belong to the sample: the same for every micro batch, rank, device and restart.

torch's modules draw from a generator, so their masks depend on how a batch is cut. Here a mask is a function of the
sample's draws (uniform numbers keyed by its position in the run, which come with the batch), the layer and the element.
It is computed on the device of the tokens with integer arithmetic alone: there is no synchronisation with the host, a
CPU and a GPU get the same bits, and a block that is recomputed in the backward pass drops the same elements.

All samples share a table of hashed element numbers. Each sample and layer has its own multiplier and offset, and
element e gets the number table[e] * multiplier + offset modulo 2**32 (multiply-shift hashing). That costs one fused
multiplication and one comparison for each element.

Shapes: B samples, L layers that drop, E elements of a sample.
Source: Steele et al. 2014, "Fast splittable pseudorandom number generators" (the finaliser); Dietzfelbinger 1996,
"Universal hashing and k-wise independent random variables via integer arithmetic without primes" (multiply-shift).
"""

import torch
from torch import Tensor, nn

from trainer.models.encoder import chance_of_skipping

NUM_DRAWS = 2
"""Uniform numbers for each sample, of 24 bits each."""

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class SampleKeys:
    """The keys of the current batch; all dropping modules of a model share one object.

    Keys stay until the next batch, because a recomputed block needs them again in the backward pass.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._multiplier_LB: Tensor | None = None
        self._offset_LB: Tensor | None = None
        self._tables: dict[tuple[torch.device, int], Tensor] = {}

    def assign(self, draws_B2: Tensor) -> None:
        """Hash the draws of new samples, once for all layers."""
        # Two draws of 24 bits make one key of 48 bits. Example: 0.5 and 0.25 are 8388608 and 4194304, so the key is
        # 8388608 * 2**24 + 4194304. Each layer adds its own multiple of the golden ratio before mixing (SplitMix64).
        high_B, low_B = (draws_B2 * 2.0**24).long().unbind(dim=1)
        words_B = (high_B << 24) + low_B
        layers_L = torch.arange(1, self._num_layers + 1, device=draws_B2.device) * _GOLDEN
        mixed_LB = _mix(words_B + layers_L[:, None])
        # An odd multiplier maps the table one to one.
        self._multiplier_LB, self._offset_LB = (mixed_LB | 1).to(torch.int32), (mixed_LB >> 32).to(torch.int32)

    def offsets(self, layer: int) -> Tensor:
        """Return one uniform int32 number for each sample, (B,)."""
        assert self._offset_LB is not None, "a model that drops was called in training without its samples' draws"
        return self._offset_LB[layer]

    def numbers(self, layer: int, num_elements: int) -> Tensor:
        """Return uniform int32 numbers (B, E)."""
        offset_B = self.offsets(layer)
        assert self._multiplier_LB is not None
        where = (offset_B.device, num_elements)
        if where not in self._tables:
            self._tables[where] = _mix(torch.arange(num_elements, device=offset_B.device)).to(torch.int32)
        return torch.addcmul(offset_B[:, None], self._tables[where], self._multiplier_LB[layer][:, None])


class KeyedDropout(nn.Module):
    """torch's dropout with masks that belong to the samples; the first axis must be the batch."""

    def __init__(self, p: float, layer: int, keys: SampleKeys) -> None:
        super().__init__()
        self.p, self._layer, self._keys = p, layer, keys

    def forward(self, x_BE: Tensor) -> Tensor:
        """Drop elements in training and scale the others by 1 / (1 - p); any axes may follow the first."""
        if not self.training:
            return x_BE
        drawn_BE = self._keys.numbers(self._layer, x_BE[0].numel())
        return x_BE.masked_fill((drawn_BE < _threshold(self.p)).view_as(x_BE), 0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Return the share of dropped elements, for ``print(model)``."""
        return f"p={self.p}"


class KeyedDropPath(nn.Module):
    """timm's drop path (Huang et al. 2016, arXiv 1603.09382): one draw for each sample and branch of a block."""

    def __init__(self, p: float, layer: int, keys: SampleKeys) -> None:
        super().__init__()
        self.p, self._layer, self._keys = p, layer, keys

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Skip the branch for some samples in training, and scale it by 1 / (1 - p) for the others."""
        if not self.training:
            return x_BTD
        skipped_B = self._keys.offsets(self._layer) < _threshold(self.p)
        return x_BTD.masked_fill(skipped_B[:, None, None], 0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Return the probability of skipping, for ``print(model)``."""
        return f"p={self.p}"


def key_dropouts(model: nn.Module) -> SampleKeys | None:
    """Replace all dropping modules by keyed ones, in place; returns their keys, None if nothing drops."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (isinstance(child, nn.Dropout) and child.p > 0) or chance_of_skipping(child) > 0
    ]
    if not found:
        return None
    keys = SampleKeys(len(found))
    for layer, (parent, name, child) in enumerate(found):
        if isinstance(child, nn.Dropout):
            parent.add_module(name, KeyedDropout(child.p, layer, keys))
        else:
            parent.add_module(name, KeyedDropPath(chance_of_skipping(child), layer, keys))
    return keys


def _threshold(p: float) -> int:
    """Return the int32 below which a share p of all int32 numbers lies: 0.5 -> 0, 0.1 -> -1717986918."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


def _mix(value: Tensor) -> Tensor:
    """Mix 64 bits as `trainer.seeds` does. int64 wraps around; the masks clear the sign bits that >> copies in."""
    mixed = (value ^ ((value >> 30) & (2**34 - 1))) * _MULTIPLIERS[0]
    mixed = (mixed ^ ((mixed >> 27) & (2**37 - 1))) * _MULTIPLIERS[1]
    return mixed ^ ((mixed >> 31) & (2**33 - 1))
