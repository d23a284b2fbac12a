"""Triton kernel of `wgrad.py`. Import this file only where Triton is.

A program owns one tile of one expert's gradient. It walks over that expert's rows, those of the first layer, then of
the next, sums dy^T x in fp32 registers and adds the tile to the buffer once: 8 bytes of traffic for each number of the
buffer, however many layers, where a GEMM into bf16 and an addition take 12 for each layer. Runs in Triton's
interpreter (TRITON_INTERPRET=1) on CPU tensors.

Two kernels: one loads through pointers, in tiles of which two fit on a multiprocessor; the other, for one layer whose
experts have many rows, brings large tiles by the copy engine for tensors (TMA, from compute capability 9.0 on).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """A program's tile of a weight [o, i] and the rows it takes at a time. The defaults were the best (docs/log.md).

    Through pointers: two programs to a multiprocessor, so that one adds its tile while the other multiplies; larger
    tiles and more warps were slower.
    """

    o: int = 128
    i: int = 128
    k: int = 64
    warps: int = 4
    stages: int = 3


TENSOR_COPIES = Tiles(256, 128, 64, 8, 4)
MANY_ROWS = 2048  # of an expert on average: from here on large tiles pay


def add_weight_gradients(
    total_noi: Tensor,
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    counts_gn: Tensor,
    starts_gn: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """See `wgrad.add_weight_gradients`."""
    n, o, i = total_noi.shape
    if not any(dy.shape[0] for dy in dys) or not n:
        return
    dys, xs = tuple(dy.contiguous() for dy in dys), tuple(x.contiguous() for x in xs)
    counts_gn, starts_gn = counts_gn.contiguous(), starts_gn.contiguous()
    by_tma = takes_tensor_copies(total_noi, dys) if tiles is None else tiles == TENSOR_COPIES
    tiles = tiles or (TENSOR_COPIES if by_tma else Tiles())
    grid = (n * triton.cdiv(o, tiles.o) * triton.cdiv(i, tiles.i),)
    if by_tma:
        triton.set_allocator(lambda size, alignment, stream: dys[0].new_empty(size, dtype=torch.int8))
        _weight_gradients_tma[grid](
            dys[0], xs[0], counts_gn, starts_gn, total_noi, total_noi.stride(0), n, dys[0].shape[0], o, i,
            tiles.o, tiles.i, tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return
    _weight_gradients[grid](
        dys, xs, counts_gn, starts_gn, total_noi, total_noi.stride(0), n, o, i, len(dys),
        tiles.o, tiles.i, tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def takes_tensor_copies(total_noi: Tensor, dys: Sequence[Tensor]) -> bool:
    """One layer's 16-bit rows, many to an expert, on a device that copies tensors; rows of whole 16 bytes."""
    n, o, i = total_noi.shape
    device = total_noi.device
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and len(dys) == 1
        and dys[0].element_size() == 2
        and dys[0].shape[0] >= MANY_ROWS * n
        and o % 8 == 0
        and i % 8 == 0
    )


@triton.jit
def _weight_gradients_tma(
    dy_ptr, x_ptr, counts_ptr, starts_ptr, total_ptr, stride, n, rows_all, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (IN + BLOCK_I - 1) // BLOCK_I
    tiles: tl.constexpr = across * ((OUT + BLOCK_O - 1) // BLOCK_O)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_o, first_i = (tile // across) * BLOCK_O, (tile % across) * BLOCK_I
    o, i, k = first_o + tl.arange(0, BLOCK_O), first_i + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_K)
    dy_all = tl.make_tensor_descriptor(dy_ptr, [rows_all, OUT], [OUT, 1], [BLOCK_K, BLOCK_O])
    x_all = tl.make_tensor_descriptor(x_ptr, [rows_all, IN], [IN, 1], [BLOCK_K, BLOCK_I])
    rows = tl.load(counts_ptr + expert).to(tl.int32)
    start = tl.load(starts_ptr + expert).to(tl.int32)
    whole = rows // BLOCK_K * BLOCK_K
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for at in range(0, whole, BLOCK_K):
        total = tl.dot(dy_all.load([start + at, first_o]).T, x_all.load([start + at, first_i]), total)
    if whole < rows:  # a block of copies would bring the next expert's rows, too
        r = (start + whole + k).to(tl.int64)
        inside = (k < rows - whole)[:, None]
        dy = tl.load(dy_ptr + r[:, None] * OUT + o[None, :], mask=inside & (o < OUT)[None, :], other=0.0)
        x = tl.load(x_ptr + r[:, None] * IN + i[None, :], mask=inside & (i < IN)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total)
    if rows > 0:
        tile_at = total_ptr + expert.to(tl.int64) * stride + o[:, None] * IN + i[None, :]
        mask = (o < OUT)[:, None] & (i < IN)[None, :]
        tl.store(tile_at, tl.load(tile_at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def _weight_gradients(
    dys, xs, counts_ptr, starts_ptr, total_ptr, stride, n, OUT: tl.constexpr, IN: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (IN + BLOCK_I - 1) // BLOCK_I
    tiles: tl.constexpr = across * ((OUT + BLOCK_O - 1) // BLOCK_O)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    seen = 0
    for layer in tl.static_range(LAYERS):
        rows = tl.load(counts_ptr + layer * n + expert).to(tl.int32)
        start = tl.load(starts_ptr + layer * n + expert)
        seen += rows
        dy_at = dys[layer] + start * OUT + k[:, None] * OUT + o[None, :]
        x_at = xs[layer] + start * IN + k[:, None] * IN + i[None, :]
        for at in range(0, rows, BLOCK_K):
            inside = (k < rows - at)[:, None]
            dy = tl.load(dy_at, mask=inside & (o < OUT)[None, :], other=0.0)
            x = tl.load(x_at, mask=inside & (i < IN)[None, :], other=0.0)
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
            # Moved on, not computed from `at`: rows times width pass 2**31 within one expert.
            dy_at += BLOCK_K * OUT
            x_at += BLOCK_K * IN
    if seen > 0:
        tile_at = total_ptr + expert.to(tl.int64) * stride + o[:, None] * IN + i[None, :]
        mask = (o < OUT)[:, None] & (i < IN)[None, :]
        tl.store(tile_at, tl.load(tile_at, mask=mask, other=0.0) + total, mask=mask)
