"""Triton kernels of `swiglu.py` and of `grouped_gemm.accumulate`. Import this file only where Triton is.

Elementwise and memory-bound; the references beside them define the contracts. They run in Triton's interpreter
(TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.permute_triton import tile


def swiglu_forward(z_r2f: Tensor) -> Tensor:
    """See `swiglu.swiglu_forward`."""
    z_r2f = z_r2f.contiguous()
    rows, f = z_r2f.shape[0], z_r2f.shape[1] // 2
    h_rf = z_r2f.new_empty(rows, f)
    if h_rf.numel():
        block_r, block_f = tile(f)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(f, block_f))
        _swiglu_forward[grid](z_r2f, h_rf, rows, f, block_r, block_f)
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


def accumulate(total_noi: Tensor, part_noi: Tensor, counts_n: Tensor) -> None:
    """See `grouped_gemm.accumulate`: total[n] += part[n] where counts[n] > 0, without reading the others."""
    n, size = part_noi.shape[0], part_noi[0].numel() if part_noi.shape[0] else 0
    if n and size:
        part_noi = part_noi.contiguous()
        block = min(triton.next_power_of_2(size), 4096)
        grid = (triton.cdiv(size, block), n)
        _accumulate[grid](total_noi, part_noi, counts_n.contiguous(), total_noi.stride(0), size, block)


@triton.jit
def _swiglu_forward(z_ptr, h_ptr, rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
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
def _accumulate(total_ptr, part_ptr, counts_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    if tl.load(counts_ptr + n) > 0:
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(total_ptr + n * stride + c, mask=c < SIZE, other=0.0)
        part = tl.load(part_ptr + n * SIZE + c, mask=c < SIZE, other=0.0)
        tl.store(total_ptr + n * stride + c, total + part.to(total.dtype), mask=c < SIZE)
