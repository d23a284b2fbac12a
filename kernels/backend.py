"""Which implementation computes what: chosen from the device, the precision and what is installed, then passed on.

Nothing here is remembered: a choice travels as an argument, so forward and backward cannot disagree about it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from moue_dist.config import ConfigError

Impl = Literal["torch", "triton"]  # the reference in plain PyTorch, or the Triton kernel beside it
ExpertBackend = Literal["loop", "torch", "te"]  # per-expert matmuls, PyTorch's grouped GEMM, Transformer Engine


@cache
def has_triton() -> bool:
    """Is Triton installed? CPU-only installs of PyTorch come without it."""
    return find_spec("triton") is not None


@cache
def has_transformer_engine() -> bool:
    """Is Transformer Engine installed? Found without importing it, which takes seconds and loads CUDA's libraries."""
    return find_spec("transformer_engine") is not None


def default_impl(device: torch.device) -> Impl:
    """`triton` on CUDA where Triton is installed, else `torch`."""
    return "triton" if device.type == "cuda" and has_triton() else "torch"


def resolve_experts(
    option: Literal["auto", "loop", "torch", "te"],
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["fp32", "bf16", "fp8"],
    hidden: int,
    width: int,
) -> ExpertBackend:
    """Turn `moe.experts` into one backend, or refuse.

    `auto`: fp8 -> te; bf16 on CUDA -> torch where the sizes allow it, else loop; fp32 or CPU -> loop.
    Example: resolve_experts("auto", device="cuda", precision="bf16", hidden=2048, width=1024) -> "torch".
    Raises ConfigError, naming the option and the way out, where the combination cannot run.
    """
    if precision == "fp8" and device == "cpu":
        raise ConfigError("train.precision=fp8 needs a GPU; use train.precision=fp32 on CPU")
    if option == "auto":
        if precision == "fp8":
            option = "te"
        elif device == "cuda" and precision == "bf16" and grouped_sizes_fit(hidden, width, 2):
            option = "torch"
        else:
            option = "loop"
    if precision == "fp8" and option != "te":
        raise ConfigError(f"moe.experts={option} cannot compute in FP8; use moe.experts=te or train.precision=bf16")
    if option == "te":
        if device == "cpu" or precision == "fp32":
            raise ConfigError("moe.experts=te needs a GPU and train.precision=bf16 or fp8; use moe.experts=loop here")
        if not has_transformer_engine():
            raise ConfigError(
                "Transformer Engine is not installed, which moe.experts=te and train.precision=fp8 need: install the "
                "extra 'gpu', or set moe.experts=torch and train.precision=bf16"
            )
        check_te_sizes(hidden, width)
    if option == "torch":
        if device == "cuda" and precision == "fp32":
            raise ConfigError("moe.experts=torch needs bf16 on a GPU; set train.precision=bf16 or moe.experts=loop")
        check_grouped_sizes(hidden, width, 4 if precision == "fp32" else 2)
    return option


def grouped_sizes_fit(hidden: int, width: int, itemsize: int) -> bool:
    """Do rows of `hidden` and `width` numbers of `itemsize` bytes keep the grouped GEMM's 16-byte alignment?"""
    return hidden * itemsize % 16 == 0 and width * itemsize % 16 == 0


def check_grouped_sizes(hidden: int, width: int, itemsize: int) -> None:
    """Raise ConfigError where PyTorch's grouped GEMM would refuse the sizes (rows must be multiples of 16 bytes)."""
    if not grouped_sizes_fit(hidden, width, itemsize):
        unit = 16 // itemsize
        raise ConfigError(
            f"moe.experts=torch needs model.hidden_size and moe.expert_width in multiples of {unit}, got {hidden} and "
            f"{width}; change them or use moe.experts=loop"
        )


def check_te_sizes(hidden: int, width: int) -> None:
    """Raise ConfigError where Transformer Engine's GEMMs would refuse the sizes (FP8 needs multiples of 16)."""
    if hidden % 16 or width % 16:
        raise ConfigError(
            f"moe.experts=te needs model.hidden_size and moe.expert_width in multiples of 16, got {hidden} and "
            f"{width}; change them or use moe.experts=loop"
        )
