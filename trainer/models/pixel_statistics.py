"""Mean and standard deviation of RGB pixels in [0, 1], by which models expect their input to be normalised."""

import torch
from torch import Tensor

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Value of the recipe's ``normalisation`` -> (mean, deviation) of red, green and blue."""


def statistics_on(device: torch.device, normalisation: str) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of `STATISTICS`, each float32 (C, 1, 1)."""
    mean_C11, std_C11 = (constant(values, device)[:, None, None] for values in STATISTICS[normalisation])
    return mean_C11, std_C11


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Write a few numbers into a float32 tensor on the device, one fill each.

    ``torch.tensor(values, device="cuda")`` copies from pageable memory, so the host waits for the device in every
    forward pass, and a compiled graph keeps a CPU constant, for which torch 2.6 to 2.8 make no CUDA graph. A buffer of
    the module would be rounded where an engine casts buffers.
    """
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])
