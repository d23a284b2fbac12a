"""Triton kernel of `wgrad.py`. Import this file only where Triton is.

A program owns one tile of one expert's gradient. It walks over that expert's rows, those of the first layer, then of
the next, sums dy^T x in fp32 registers and adds the tile to the buffer once: 8 bytes of traffic for each number of the
buffer, however many layers, where a GEMM into bf16 and an addition take 12 for each layer. Runs in Triton's
interpreter (TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """A program's tile of a weight [o, i] and the rows it takes at a time. The default was the best on an H200.

    Two programs to a multiprocessor, so that one adds its tile while the other multiplies: larger tiles and more warps
    were slower (docs/log.md).
    """

    o: int = 128
    i: int = 128
    k: int = 64
    warps: int = 4
    stages: int = 3


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
    tiles = tiles or Tiles()
    dys, xs = tuple(dy.contiguous() for dy in dys), tuple(x.contiguous() for x in xs)
    counts_gn, starts_gn = counts_gn.contiguous(), starts_gn.contiguous()
    grid = (n * triton.cdiv(o, tiles.o) * triton.cdiv(i, tiles.i),)
    _weight_gradients[grid](
        dys, xs, counts_gn, starts_gn, total_noi, total_noi.stride(0), n, o, i, len(dys),
        tiles.o, tiles.i, tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


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
            dy = tl.load(dy_at + at * OUT, mask=inside & (o < OUT)[None, :], other=0.0)
            x = tl.load(x_at + at * IN, mask=inside & (i < IN)[None, :], other=0.0)
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    if seen > 0:
        tile_at = total_ptr + expert.to(tl.int64) * stride + o[:, None] * IN + i[None, :]
        mask = (o < OUT)[:, None] & (i < IN)[None, :]
        tl.store(tile_at, tl.load(tile_at, mask=mask, other=0.0) + total, mask=mask)
