"""GPUs by their data sheets (NVIDIA's): what they compute, hold and send."""

import re
from dataclasses import dataclass

GB = 1e9

DENSE_BF16_PEAK = {
    # FLOP/s without sparsity; the first name that stands in the device's name as whole words counts.
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,  # in fp16; it has no bf16
    "MI300X": 1307e12,
    "MI250X": 191e12,  # one of its two dies, which are devices of their own
    "MI250": 181e12,
}


def dense_bf16_peak(device_name: str) -> float | None:
    """Return FLOP/s of a device by its name as CUDA gives it, such as "NVIDIA A100-SXM4-80GB"; None if unknown."""
    known = (peak for name, peak in DENSE_BF16_PEAK.items() if re.search(rf"\b{name}\b", device_name))
    return next(known, None)


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
