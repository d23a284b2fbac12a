"""The trajectory state behind the hidden states: one tensor between pipeline stages.

megatron-core's schedules pass one tensor between stages and back-propagate only the first of a list (schedules.py:443,
:485). So a stage's last layer packs hidden [s, b, d] and state [s, b, r] into [s, b, d + lanes], and the next stage's
first layer unpacks them. A fp32 state behind 16-bit hidden states travels bit-exact as 2r 16-bit lanes, and so does
its gradient: legal because the packed tensor has exactly one consumer, so that autograd never adds two of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lanes(width: int, hidden_dtype: torch.dtype) -> int:
    """Columns that a fp32 state of `width` takes behind hidden states of that type: bf16, 32 -> 64."""
    return width * torch.float32.itemsize // hidden_dtype.itemsize


def pack(hidden_sbd: Tensor, state_sbr: Tensor) -> Tensor:
    """[s, b, d] and fp32 [s, b, r] -> [s, b, d + lanes] in the hidden states' type."""
    packed: Tensor = _Pack.apply(hidden_sbd, state_sbr)
    return packed


def unpack(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    hidden, state = _Unpack.apply(packed, hidden_size)
    return hidden, state


def _join(hidden: Tensor, state: Tensor) -> Tensor:
    return torch.cat([hidden, state.contiguous().view(hidden.dtype)], dim=-1)


def _split(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    return packed[..., :hidden_size].contiguous(), packed[..., hidden_size:].contiguous().view(torch.float32)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, state: Tensor) -> Tensor:
        ctx.hidden_size = hidden.shape[-1]
        return _join(hidden, state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _split(grad, ctx.hidden_size)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
        return _split(packed, hidden_size)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_state: Tensor) -> tuple[Tensor, None]:
        return _join(grad_hidden, grad_state), None
