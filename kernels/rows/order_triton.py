"""Triton kernel of `order.py`, where the contract and the reference stand. Import this file only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def place(choice_r: Tensor, weight_tk: Tensor, live: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `order._place`."""
    rows, k = choice_r.shape[0], weight_tk.shape[1]
    source_c = choice_r.new_empty(capacity, dtype=torch.int32)
    weight_c = choice_r.new_empty(capacity, dtype=torch.float32)
    position_tk = choice_r.new_empty(weight_tk.shape, dtype=torch.int32)
    if rows:
        grid = (triton.cdiv(rows, BLOCK),)
        _place[grid](
            choice_r, weight_tk.contiguous(), live, source_c, weight_c, position_tk, rows, capacity, k, BLOCK
        )  # fmt: skip
    return source_c, weight_c, position_tk


@triton.jit
def _place(
    choice_ptr, weight_ptr, live_ptr, source_ptr, out_ptr, position_ptr, rows, capacity,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(live_ptr)
    choice = tl.load(choice_ptr + r, mask=r < rows, other=0)
    mine = r < live
    tl.store(position_ptr + choice, tl.where(mine, r, -1), mask=r < rows)
    room = (r < capacity) & (r < rows)
    weight = tl.load(weight_ptr + choice, mask=room & mine, other=0.0).to(tl.float32)
    tl.store(source_ptr + r, tl.where(mine, (choice // K).to(tl.int32), -1), mask=room)
    tl.store(out_ptr + r, weight, mask=room)
