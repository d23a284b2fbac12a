"""Triton kernels of `e4m3.py`, where the contracts and the reference stand. Import this file only where Triton is.

Memory-bound. A row's scale needs the whole row, so a program holds whole rows in registers and reads them once. A
weight is read twice: its columns' scales are known only when all of its rows were seen. They run in Triton's
interpreter (TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.fp8.scaled import E4M3, LARGEST, LEAST, Layouts, Scaled, SwigluGradients

_LEAST, _TO_SCALE = tl.constexpr(LEAST), tl.constexpr(1 / LARGEST)

STRIPE = 64  # rows of a weight that one program of the first pass sees
TILE_O, TILE_I = 128, 64  # a program's tile in the second pass


def whole_rows(width: int, elements: int, a_warp: int = 1024) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program that holds whole rows of `width`, about `elements` numbers if they fit.

    `a_warp` are the numbers of a warp: fewer where a kernel has many of them in registers. Example: width 1000,
    elements 4096 -> (4, 1024, 4).
    """
    columns = triton.next_power_of_2(max(width, 1))
    rows = max(elements // columns, 1)
    return rows, columns, min(max(rows * columns // a_warp, 4), 16)


def quantise_rows(x_td: Tensor, index_r: Tensor | None, live: Tensor | None) -> Scaled:
    """See `e4m3.quantise_rows`."""
    return _rows(x_td, index_r, live, None)


def gather_and_quantise(x_td: Tensor, index_r: Tensor, live: Tensor | None) -> tuple[Tensor, Scaled]:
    """See `e4m3.gather_and_quantise`."""
    rows_rd = x_td.new_empty(index_r.shape[0], x_td.shape[1])
    return rows_rd, _rows(x_td, index_r, live, rows_rd)


def _rows(x_td: Tensor, index_r: Tensor | None, live: Tensor | None, kept_rd: Tensor | None) -> Scaled:
    x_td = x_td.contiguous()
    rows, d = (x_td if index_r is None else index_r).shape[0], x_td.shape[1]
    to = _room(rows, d, x_td.device)
    if rows and d:
        index = x_td if index_r is None else index_r.contiguous()
        block_r, block_d, warps = whole_rows(d, 4096)
        _quantise_rows[(triton.cdiv(rows, block_r),)](
            x_td, index, x_td if live is None else live, x_td if kept_rd is None else kept_rd, to.q, to.scale, rows,
            d, index_r is not None, kept_rd is not None, live is not None, block_r, block_d, num_warps=warps,
        )  # fmt: skip
    return to


def swiglu_forward_fp8(z_r2f: Tensor, live: Tensor | None) -> Scaled:
    """See `e4m3.swiglu_forward_fp8`."""
    z_r2f = z_r2f.contiguous()
    rows, f = z_r2f.shape[0], z_r2f.shape[1] // 2
    to = _room(rows, f, z_r2f.device)
    if rows and f:
        block_r, block_f, warps = whole_rows(f, 2048)
        _swiglu_forward[(triton.cdiv(rows, block_r),)](
            z_r2f, z_r2f if live is None else live, to.q, to.scale, rows,
            f, live is not None, block_r, block_f, num_warps=warps,
        )  # fmt: skip
    return to


def swiglu_backward_fp8(z_r2f: Tensor, dh_rf: Tensor, weight_r: Tensor | None, live: Tensor | None) -> SwigluGradients:
    """See `e4m3.swiglu_backward_fp8`."""
    z_r2f, dh_rf = z_r2f.contiguous(), dh_rf.contiguous()
    rows, f = dh_rf.shape
    dz_r2f, h_rf, dz8 = torch.empty_like(z_r2f), z_r2f.new_empty(rows, f), _room(rows, 2 * f, z_r2f.device)
    dweight_r = None if weight_r is None else torch.empty(rows, dtype=torch.float32, device=z_r2f.device)
    if rows and f:
        block_r, block_f, warps = whole_rows(f, 1024, 512)
        _swiglu_backward[(triton.cdiv(rows, block_r),)](
            z_r2f, dh_rf, z_r2f if weight_r is None else weight_r.contiguous(), z_r2f if live is None else live,
            dz_r2f, dz8.q, dz8.scale, h_rf, dz8.scale if dweight_r is None else dweight_r, rows,
            f, weight_r is not None, live is not None, block_r, block_f, num_warps=warps,
        )  # fmt: skip
    return SwigluGradients(dz_r2f, dz8, h_rf, dweight_r)


def quantise_weights(w_noi: Tensor, into: Layouts) -> None:
    """See `e4m3.quantise_weights`."""
    n, o, i = w_noi.shape
    if not w_noi.numel():
        return
    if w_noi.stride(1) != i or w_noi.stride(2) != 1:
        raise ValueError(f"each expert's weight must be contiguous, got strides {w_noi.stride()}")
    # Numbers of at least 0 are ordered as the integers of their bits are.
    largest_ni = torch.zeros(n, i, dtype=torch.int32, device=w_noi.device)
    block_o, block_i, warps = whole_rows(i, 8192)
    block_o = min(block_o, STRIPE)
    _quantise_out[(n * triton.cdiv(o, STRIPE),)](
        w_noi, w_noi.stride(0), into.out.q, into.out.scale, largest_ni,
        o, i, max(STRIPE, block_o), block_o, block_i, num_warps=warps,
    )  # fmt: skip
    _quantise_into[(n * triton.cdiv(o, TILE_O) * triton.cdiv(i, TILE_I),)](
        w_noi, w_noi.stride(0), largest_ni.view(torch.float32), into.into.q, into.into.scale, o, i, TILE_O, TILE_I
    )


def _room(rows: int, width: int, device: torch.device) -> Scaled:
    q = torch.empty(rows, width, dtype=E4M3, device=device)
    return Scaled(q, torch.empty(rows, dtype=torch.float32, device=device))


@triton.jit
def _quantise_rows(
    x_ptr, index_ptr, live_ptr, kept_ptr, q_ptr, s_ptr, rows,
    D: tl.constexpr, GATHER: tl.constexpr, KEEP: tl.constexpr, LIVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_D)
    source = r
    if GATHER:
        source = tl.load(index_ptr + r, mask=r < rows, other=-1).to(tl.int64)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    at = r[:, None] * D + c[None, :]
    x = tl.load(x_ptr + source[:, None] * D + c[None, :], mask=inside & (source >= 0)[:, None], other=0.0)
    if KEEP:
        tl.store(kept_ptr + at, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), _LEAST) * _TO_SCALE
    tl.store(q_ptr + at, (x * (1.0 / scale)[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(s_ptr + r, scale, mask=r < rows)


@triton.jit
def _swiglu_forward(
    z_ptr, live_ptr, q_ptr, s_ptr, rows,
    F: tl.constexpr, LIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_F)
    inside = (r < rows)[:, None] & (c < F)[None, :]
    at = r[:, None] * (2 * F) + c[None, :]
    gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    scale = tl.maximum(tl.max(tl.abs(h), 1), _LEAST) * _TO_SCALE
    q = (h * (1.0 / scale)[:, None]).to(tl.float8e4nv)
    tl.store(q_ptr + r[:, None] * F + c[None, :], q, mask=inside)
    tl.store(s_ptr + r, scale, mask=r < rows)


@triton.jit
def _swiglu_backward(
    z_ptr, dh_ptr, w_ptr, live_ptr, dz_ptr, q_ptr, s_ptr, h_ptr, dw_ptr, rows,
    F: tl.constexpr, WEIGHTED: tl.constexpr, LIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_F)
    inside = (r < rows)[:, None] & (c < F)[None, :]
    narrow = r[:, None] * F + c[None, :]
    at = r[:, None] * (2 * F) + c[None, :]
    gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    h = silu * up
    if WEIGHTED:
        w = tl.load(w_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(dw_ptr + r, tl.sum(h * dh, axis=1), mask=r < rows)
        dh = dh * w
        h = h * w
    dgate = dh * up * s * (1 + gate * (1 - s))
    dup = dh * silu
    largest = tl.maximum(tl.max(tl.abs(dgate), 1), tl.max(tl.abs(dup), 1))
    scale = tl.maximum(largest, _LEAST) * _TO_SCALE
    factor = (1.0 / scale)[:, None]
    tl.store(dz_ptr + at, dgate.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dz_ptr + at + F, dup.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(q_ptr + at, (dgate * factor).to(tl.float8e4nv), mask=inside)
    tl.store(q_ptr + at + F, (dup * factor).to(tl.float8e4nv), mask=inside)
    tl.store(s_ptr + r, scale, mask=r < rows)
    tl.store(h_ptr + narrow, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantise_out(
    w_ptr, stride, q_ptr, s_ptr, largest_ptr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """First pass: rows of one expert to FP8, and their share of each column's largest number."""
    stripes: tl.constexpr = (OUT + ROWS - 1) // ROWS
    n = (tl.program_id(0) // stripes).to(tl.int64)
    first = (tl.program_id(0) % stripes) * ROWS
    i = tl.arange(0, BLOCK_I)
    column = tl.zeros((BLOCK_I,), dtype=tl.float32)
    for at in range(0, ROWS, BLOCK_O):
        o = first + at + tl.arange(0, BLOCK_O)
        inside = (o < OUT)[:, None] & (i < IN)[None, :]
        w = tl.load(w_ptr + n * stride + o[:, None] * IN + i[None, :], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(w)
        column = tl.maximum(column, tl.max(size, 0))
        scale = tl.maximum(tl.max(size, 1), _LEAST) * _TO_SCALE
        q = (w * (1.0 / scale)[:, None]).to(tl.float8e4nv)
        tl.store(q_ptr + n * OUT * IN + o[:, None] * IN + i[None, :], q, mask=inside)
        tl.store(s_ptr + n * OUT + o, scale, mask=o < OUT)
    tl.atomic_max(largest_ptr + n * IN + i, column.to(tl.int32, bitcast=True), mask=i < IN, sem="relaxed")


@triton.jit
def _quantise_into(
    w_ptr, stride, largest_ptr, q_ptr, s_ptr, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Second pass: a tile of one expert to FP8, scaled by column and transposed."""
    across: tl.constexpr = (IN + BLOCK_I - 1) // BLOCK_I
    tiles: tl.constexpr = across * ((OUT + BLOCK_O - 1) // BLOCK_O)
    n, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (o < OUT)[:, None] & (i < IN)[None, :]
    w = tl.load(w_ptr + n * stride + o[:, None] * IN + i[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.load(largest_ptr + n * IN + i, mask=i < IN, other=0.0), _LEAST) * _TO_SCALE
    q = (w * (1.0 / scale)[None, :]).to(tl.float8e4nv)
    tl.store(q_ptr + n * OUT * IN + i[:, None] * OUT + o[None, :], tl.trans(q), mask=tl.trans(inside))
    if tile // across == 0:
        tl.store(s_ptr + n * IN + i, scale, mask=i < IN)
