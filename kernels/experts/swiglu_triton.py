"""Triton kernels of `swiglu.py`. Import this file only where Triton is.

Elementwise and memory-bound; the references beside them define the contracts. They run in Triton's interpreter
(TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.rows.permute_triton import tile


def swiglu_forward(z_r2f: Tensor, live: Tensor | None = None) -> Tensor:
    """See `swiglu.swiglu_forward`."""
    z_r2f = z_r2f.contiguous()
    rows, f = z_r2f.shape[0], z_r2f.shape[1] // 2
    h_rf = z_r2f.new_empty(rows, f)
    if h_rf.numel():
        block_r, block_f = tile(f)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(f, block_f))
        _swiglu_forward[grid](z_r2f, h_rf, h_rf if live is None else live, rows, f, live is not None, block_r, block_f)
    return h_rf


def swiglu_backward(z_r2f: Tensor, dh_rf: Tensor) -> tuple[Tensor, Tensor]:
    """See `swiglu.swiglu_backward`."""
    z_r2f, dh_rf = z_r2f.contiguous(), dh_rf.contiguous()
    rows, f = dh_rf.shape
    dz_r2f, h_rf = z_r2f.new_empty(rows, 2 * f), z_r2f.new_empty(rows, f)
    if h_rf.numel():
        block_r, block_f = tile(f, 1024)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(f, block_f))
        _swiglu_backward[grid](z_r2f, dh_rf, dz_r2f, h_rf, rows, f, block_r, block_f)
    return dz_r2f, h_rf


def swiglu_weighted_backward(
    z_r2f: Tensor, dh_rf: Tensor, weight_r: Tensor, live: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `swiglu.swiglu_weighted_backward`."""
    z_r2f, dh_rf, weight_r = z_r2f.contiguous(), dh_rf.contiguous(), weight_r.contiguous()
    rows, f = dh_rf.shape
    dz_r2f, h_rf, dweight_r = z_r2f.new_empty(rows, 2 * f), z_r2f.new_empty(rows, f), weight_r.new_empty(rows)
    if h_rf.numel():
        block_r, block_f = tile(f, 1024)
        grid = (triton.cdiv(rows, block_r),)
        _swiglu_weighted_backward[grid](
            z_r2f, dh_rf, weight_r, dz_r2f, h_rf, dweight_r, h_rf if live is None else live, rows,
            f, live is not None, block_r, block_f,
        )  # fmt: skip
    return dz_r2f, h_rf, dweight_r


@triton.jit
def _swiglu_forward(
    z_ptr, h_ptr, live_ptr, rows,
    F: tl.constexpr, LIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (r < rows)[:, None] & (c < F)[None, :]
    at = r[:, None] * (2 * F) + c[None, :]
    gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + r[:, None] * F + c[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    z_ptr, dh_ptr, dz_ptr, h_ptr, rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (r < rows)[:, None] & (c < F)[None, :]
    narrow = r[:, None] * F + c[None, :]
    at = r[:, None] * (2 * F) + c[None, :]
    gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dgate = dh * up * s * (1 + gate * (1 - s))
    tl.store(dz_ptr + at, dgate.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dz_ptr + at + F, (dh * silu).to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(h_ptr + narrow, (silu * up).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_weighted_backward(
    z_ptr, dh_ptr, w_ptr, dz_ptr, h_ptr, dw_ptr, live_ptr, rows,
    F: tl.constexpr, LIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    if LIVE:
        rows = tl.load(live_ptr)
        if tl.program_id(0) * BLOCK_R >= rows:
            return
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    w = tl.load(w_ptr + r, mask=r < rows, other=0.0)[:, None]
    dw = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, F, BLOCK_F):
        c = first + tl.arange(0, BLOCK_F)
        inside = (r < rows)[:, None] & (c < F)[None, :]
        narrow = r[:, None] * F + c[None, :]
        at = r[:, None] * (2 * F) + c[None, :]
        gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        dw += tl.sum(silu * up * dh, axis=1)
        dh *= w
        dgate = dh * up * s * (1 + gate * (1 - s))
        tl.store(dz_ptr + at, dgate.to(dz_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + at + F, (dh * silu).to(dz_ptr.dtype.element_ty), mask=inside)
        tl.store(h_ptr + narrow, (silu * up * w).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + r, dw.to(dw_ptr.dtype.element_ty), mask=r < rows)
