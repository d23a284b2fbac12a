"""Triton kernels of `permute.py`, where the contracts and the reference stand. Import this file only where Triton is.

Memory-bound: every kernel reads each row once, in tiles of whole rows where they fit. Offsets are 64-bit, since
R * d passes 2**31 at full size. Runs in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers of one program's tile: 16 a thread with 4 warps


def tile(width: int, elements: int = TILE) -> tuple[int, int]:
    """(rows, columns) of a tile over rows of `width` numbers; powers of two, columns masked beyond `width`.

    Example: width 96 -> (16, 128); width 8192 -> (1, 2048).
    """
    columns = min(triton.next_power_of_2(max(width, 1)), elements)
    return elements // columns, columns


def gather_rows(x_td: Tensor, index_r: Tensor, scale_r: Tensor | None, live: Tensor | None = None) -> Tensor:
    """See `permute.gather_rows`."""
    check_rows(x_td)
    x_td, index_r = x_td.contiguous(), index_r.contiguous()
    rows, d = index_r.shape[0], x_td.shape[1]
    y_rd = x_td.new_empty(rows, d)
    if y_rd.numel():
        scale = index_r if scale_r is None else scale_r.contiguous()
        block_r, block_d = tile(d)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(d, block_d))
        _gather_rows[grid](
            x_td, index_r, scale, y_rd, index_r if live is None else live, rows,
            d, scale_r is not None, live is not None, block_r, block_d,
        )  # fmt: skip
    return y_rd


def gather_sum(rows_rd: Tensor, index_tk: Tensor, weight_tk: Tensor | None) -> Tensor:
    """See `permute.gather_sum`."""
    check_rows(rows_rd)
    rows_rd, index_tk = rows_rd.contiguous(), index_tk.contiguous()
    (tokens, k), d = index_tk.shape, rows_rd.shape[1]
    y_td = rows_rd.new_empty(tokens, d)
    if y_td.numel():
        weight = index_tk if weight_tk is None else weight_tk.contiguous()
        block_t, block_d = tile(d)
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(d, block_d))
        _gather_sum[grid](rows_rd, index_tk, weight, y_td, tokens, d, k, weight_tk is not None, block_t, block_d)
    return y_td


def gather_dot(rows_rd: Tensor, index_tk: Tensor, dy_td: Tensor) -> Tensor:
    """See `permute.gather_dot`."""
    check_rows(rows_rd)
    rows_rd, index_tk, dy_td = rows_rd.contiguous(), index_tk.contiguous(), dy_td.contiguous()
    (tokens, k), d = index_tk.shape, rows_rd.shape[1]
    dw_tk = torch.empty(tokens, k, dtype=torch.float32, device=rows_rd.device)
    if dw_tk.numel():
        k_padded = triton.next_power_of_2(k)
        _, block_d = tile(d, max(16, 2 * TILE // k_padded))
        _gather_dot[(tokens,)](rows_rd, index_tk, dy_td, dw_tk, d, k, k_padded, block_d)
    return dw_tk


def check_rows(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the Triton kernels take fp32, bf16 and fp16 rows, got {x.dtype}; pass impl='torch'")


@triton.jit
def _gather_rows(
    x_ptr, index_ptr, scale_ptr, y_ptr, live_ptr, rows,
    D: tl.constexpr, SCALED: tl.constexpr, LIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    source = tl.load(index_ptr + r, mask=r < rows, other=-1).to(tl.int64)
    x = tl.load(x_ptr + source[:, None] * D + c[None, :], mask=inside & (source >= 0)[:, None], other=0.0)
    if SCALED:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32)
        # the scale of a row that nobody owns may be anything: keep its zeros
        x = tl.where((source >= 0)[:, None], x.to(tl.float32) * scale[:, None], 0.0)
    tl.store(y_ptr + r[:, None] * D + c[None, :], x.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gather_sum(
    rows_ptr, index_ptr, weight_ptr, y_ptr, tokens,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (c < D)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for j in tl.static_range(K):  # unrolled, so that the loads of all choices are in flight together
        row = tl.load(index_ptr + t * K + j, mask=t < tokens, other=-1).to(tl.int64)
        x = tl.load(rows_ptr + row[:, None] * D + c[None, :], mask=inside & (row >= 0)[:, None], other=0.0)
        x = x.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + t * K + j, mask=(t < tokens) & (row >= 0), other=0.0).to(tl.float32)
            x = x * weight[:, None]
        total += x
    tl.store(y_ptr + t[:, None] * D + c[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gather_dot(
    rows_ptr, index_ptr, dy_ptr, dw_ptr,
    D: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K_PADDED)
    row = tl.load(index_ptr + t * K + j, mask=j < K, other=-1).to(tl.int64)
    total = tl.zeros([K_PADDED], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        mask = (row >= 0)[:, None] & (c < D)[None, :]
        dy = tl.load(dy_ptr + t * D + c, mask=c < D, other=0.0).to(tl.float32)
        x = tl.load(rows_ptr + row[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * dy[None, :], axis=1)
    tl.store(dw_ptr + t * K + j, total, mask=j < K)
