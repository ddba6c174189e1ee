"""GPUs by their data sheets (NVIDIA's): what they compute, hold and send."""

from dataclasses import dataclass

GB = 1e9

DENSE_BF16_PEAK = {
    # FLOP/s without sparsity; the first name that is part of the device's name counts.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU of a node, and its links."""

    dense_flops: dict[str, float]
    """FLOP/s by precision, without sparsity; fp32 without TF32, as torch computes by default."""
    memory: float
    """Bytes."""
    nvlink: float
    """Bytes/s of one GPU to its neighbours, one direction."""
    infiniband: float
    """Bytes/s of one GPU's adapter."""


def _sxm(name: str, fp32: float, memory: float, nvlink: float, infiniband: float) -> Hardware:
    peak = DENSE_BF16_PEAK[name]
    return Hardware({"bf16": peak, "fp16": peak, "fp32": fp32}, memory, nvlink, infiniband)


HARDWARE = {
    "a100": _sxm("A100", 19.5e12, 80 * GB, 300 * GB, 25 * GB),
    "h100": _sxm("H100", 67e12, 80 * GB, 450 * GB, 50 * GB),
    "h200": _sxm("H200", 67e12, 141 * GB, 450 * GB, 50 * GB),
}
ETHERNET = 12.5 * GB
"""Bytes/s of a host's adapter."""
