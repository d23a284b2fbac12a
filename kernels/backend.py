"""Which implementation computes what: chosen from the device, the precision and what is installed, then passed on.

Nothing here is remembered: a choice travels as an argument, so forward and backward cannot disagree about it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

Impl = Literal["torch", "triton"]  # the reference in plain PyTorch, or the Triton kernel beside it
# Per-expert matmuls, PyTorch's grouped GEMM, its scaled one in FP8, Transformer Engine.
ExpertBackend = Literal["loop", "torch", "fp8", "te"]


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
