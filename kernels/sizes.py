"""What sizes the GEMMs of an expert backend take. Free of torch: a configuration is refused before anything starts.

`hidden` and `width` are d and f of an expert, in numbers of `itemsize` bytes.
"""

from __future__ import annotations

from moue_dist.config import ConfigError


def unit_of(backend: str, itemsize: int) -> int:
    """Of what d and f must be multiples: rows of 16 bytes in PyTorch's grouped GEMM, also in FP8, 16 numbers in
    Transformer Engine's, anything in the loop."""
    return {"torch": 16 // itemsize, "fp8": 16, "te": 16}.get(backend, 1)


def sizes_fit(backend: str, hidden: int, width: int, itemsize: int) -> bool:
    """Whether `backend` takes experts of these sizes. Example: ("torch", 2048, 1024, 2) -> True."""
    unit = unit_of(backend, itemsize)
    return hidden % unit == 0 and width % unit == 0


def check_sizes(backend: str, hidden: int, width: int, itemsize: int) -> None:
    """Raise ConfigError, naming the options and the way out, where `backend` does not take the sizes."""
    if not sizes_fit(backend, hidden, width, itemsize):
        instead = "train.precision=bf16" if backend == "fp8" else "moe.experts=loop"
        raise ConfigError(
            f"moe.experts={backend} needs model.hidden_size={hidden} and moe.expert_width={width} in multiples of "
            f"{unit_of(backend, itemsize)}; change them or use {instead}"
        )
