"""Triton kernels of `pair.py`, where the contracts and the reference stand. Import this file only where Triton is.

As in `permute_triton.py`: memory-bound, every row read once, 64-bit offsets. What one of the two tensors does not hold
is masked, and a masked load moves nothing. The distance of rows is a constant of the kernel, or loads would not know
how a row is aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.rows.permute_triton import check_rows, tile


def gather_pair(first_ad: Tensor, second_bd: Tensor, index_r: Tensor, out: Tensor) -> None:
    """See `pair.gather_pair`."""
    _check(first_ad, second_bd)
    rows, d = index_r.shape[0], first_ad.shape[1]
    if rows and d:
        block_r, block_d = tile(d)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(d, block_d))
        _gather_pair[grid](
            first_ad, second_bd, index_r.contiguous(), out, rows, first_ad.shape[0],
            first_ad.stride(0), second_bd.stride(0), out.stride(0), d, block_r, block_d,
        )  # fmt: skip


def gather_sum_pair(first_ad: Tensor, second_bd: Tensor, index_tk: Tensor, weight_tk: Tensor | None) -> Tensor:
    """See `pair.gather_sum_pair`."""
    _check(first_ad, second_bd)
    index_tk = index_tk.contiguous()
    (tokens, k), d = index_tk.shape, first_ad.shape[1]
    y_td = first_ad.new_empty(tokens, d)
    if y_td.numel():
        weight = index_tk if weight_tk is None else weight_tk.contiguous()
        block_t, block_d = tile(d)
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(d, block_d))
        _gather_sum_pair[grid](
            first_ad, second_bd, index_tk, weight, y_td, tokens, first_ad.shape[0],
            first_ad.stride(0), second_bd.stride(0), d, k, weight_tk is not None, block_t, block_d,
        )  # fmt: skip
    return y_td


def _check(first: Tensor, second: Tensor) -> None:
    check_rows(first)
    if second.dtype != first.dtype or second.shape[1] != first.shape[1]:
        raise ValueError(f"rows of {first.dtype} and {second.dtype}, {first.shape[1]} and {second.shape[1]} wide")
    if first.stride(1) != 1 or second.stride(1) != 1:
        raise ValueError("the numbers of a row must stand side by side")


@triton.jit
def _load_pair(
    first_ptr, second_ptr, source, split, c, inside, FIRST: tl.constexpr, SECOND: tl.constexpr
):  # fmt: skip
    """Rows `source` of the two, columns c; zeros where source is -1 or `inside` says no."""
    here = (source >= 0) & (source < split)
    x = tl.load(first_ptr + source[:, None] * FIRST + c[None, :], mask=inside & here[:, None], other=0.0)
    there = source >= split
    beyond = source - split
    z = tl.load(second_ptr + beyond[:, None] * SECOND + c[None, :], mask=inside & there[:, None], other=0.0)
    return tl.where(there[:, None], z, x)


@triton.jit
def _gather_pair(
    first_ptr, second_ptr, index_ptr, y_ptr, rows, split,
    FIRST: tl.constexpr, SECOND: tl.constexpr, OUT: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    source = tl.load(index_ptr + r, mask=r < rows, other=-1).to(tl.int64)
    x = _load_pair(first_ptr, second_ptr, source, split, c, inside, FIRST, SECOND)
    tl.store(y_ptr + r[:, None] * OUT + c[None, :], x, mask=inside)


@triton.jit
def _gather_sum_pair(
    first_ptr, second_ptr, index_ptr, weight_ptr, y_ptr, tokens, split,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (c < D)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for j in tl.static_range(K):  # unrolled, so that the loads of all choices are in flight together
        row = tl.load(index_ptr + t * K + j, mask=t < tokens, other=-1).to(tl.int64)
        x = _load_pair(first_ptr, second_ptr, row, split, c, inside, FIRST, SECOND).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + t * K + j, mask=(t < tokens) & (row >= 0), other=0.0).to(tl.float32)
            x = x * weight[:, None]
        total += x
    tl.store(y_ptr + t[:, None] * D + c[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
