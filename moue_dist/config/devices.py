"""Known accelerators: peak rates, memory and FP8 recipes. Pure tables, free of torch.

Peaks are the vendors' dense figures (no structured sparsity) in TFLOP/s; memory is what the driver reports, in GiB.
A device that is not here has no peak, so a run on it reports no MFU and says why.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """One accelerator. `bf16_tflops` and `fp8_tflops` are dense peaks; None means unknown or unsupported."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None

    def peak_tflops(self, precision: str) -> float | None:
        """The peak that MFU divides by. FP8 runs do their GEMMs in FP8; fp32 has no peak here."""
        return {"bf16": self.bf16_tflops, "fp8": self.fp8_tflops}.get(precision)


# All words of the key must stand in the name; the first match wins, so the special forms come before the general.
_TABLE: tuple[tuple[str, Device], ...] = (
    ("gb300", Device("GB300", (10, 3), 276.0, 2500.0, 5000.0)),
    ("gb200", Device("GB200", (10, 0), 184.0, 2500.0, 5000.0)),
    ("b300", Device("B300", (10, 3), 267.0, 2250.0, 4500.0)),
    ("b200", Device("B200", (10, 0), 178.0, 2250.0, 4500.0)),
    ("gh200 480gb", Device("GH200 96GB", (9, 0), 94.5, 989.4, 1978.9)),
    ("gh200", Device("GH200", (9, 0), 94.5, 989.4, 1978.9)),
    ("h200 nvl", Device("H200 NVL", (9, 0), 139.8, 835.5, 1671.0)),
    ("h200", Device("H200", (9, 0), 139.8, 989.4, 1978.9)),
    ("h100 pcie", Device("H100 PCIe", (9, 0), 79.1, 756.0, 1513.0)),
    ("h100 nvl", Device("H100 NVL", (9, 0), 93.1, 835.5, 1671.0)),
    ("h100", Device("H100 SXM", (9, 0), 79.1, 989.4, 1978.9)),
    ("h800", Device("H800", (9, 0), 79.1, 989.4, 1978.9)),
    ("h20", Device("H20", (9, 0), 95.1, 148.0, 296.0)),
    ("a100 40gb", Device("A100 40GB", (8, 0), 39.4, 312.0)),
    ("a100", Device("A100 80GB", (8, 0), 79.2, 312.0)),
    ("a800", Device("A800", (8, 0), 79.2, 312.0)),
    ("l40s", Device("L40S", (8, 9), 44.4, 362.0, 733.0)),
    ("l40", Device("L40", (8, 9), 44.4, 181.0, 362.0)),
    ("l4", Device("L4", (8, 9), 22.0, 121.0, 242.0)),
    ("rtx 4090", Device("RTX 4090", (8, 9), 23.5, 165.2, 330.3)),
    ("a10", Device("A10", (8, 6), 22.0, 125.0)),
)


def find_device(name: str) -> Device | None:
    """The table's entry for a name as the driver gives it ('NVIDIA H100 80GB HBM3') or a person ('h200').

    Slices (MIG) and laptop parts are not the whole device, so they are unknown: None.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & {"mig", "laptop"}:
        return None
    for key, device in _TABLE:
        if set(key.split()) <= words:
            return device
    return None


def describe_device(name: str, capability: tuple[int, int], memory_gib: float) -> Device:
    """What is known of the device of a running process: the driver's facts, and the table's peaks where it has them."""
    known = find_device(name)
    if known is None:
        return Device(name, capability, memory_gib)
    return replace(known, name=name, capability=capability, memory_gib=memory_gib)


def known_devices() -> tuple[str, ...]:
    """The names that `find_device` knows, as a person types them."""
    return tuple(key for key, _ in _TABLE)


def rank_word(device: str) -> str:
    """What a report calls one rank of a run on this type of device: 'GPU' for 'cuda', else 'rank'."""
    return "GPU" if device == "cuda" else "rank"


def fp8_recipes(capability: tuple[int, int]) -> tuple[str, ...]:
    """Transformer Engine's FP8 recipes that a compute capability computes natively, the preferred first; () for none.

    Hopper has blockwise scaling, data-centre Blackwell has MXFP8, Ada and later have per-tensor scaling
    ('tensorwise' takes the scale from the current tensor, 'delayed' from earlier ones).
    """
    if capability < (8, 9):
        return ()
    per_tensor = ("tensorwise", "delayed")
    if capability[0] == 9:
        return ("blockwise", *per_tensor)
    if capability[0] == 10:
        return ("mxfp8", *per_tensor)
    return per_tensor


def grouped_fp8(capability: tuple[int, int]) -> bool:
    """Does PyTorch's grouped GEMM take FP8 with a scale a row and an output channel there? On Hopper alone."""
    return capability[0] == 9
