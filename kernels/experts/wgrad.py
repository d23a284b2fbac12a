"""Weight gradients of the experts, several layers' in one pass over the pool's fp32 buffer.

Layers share experts, so in backward one expert's gradient is added to once a layer. Each time costs a read and a write
of the whole expert in fp32, which with few rows an expert is more than the product itself. `WeightGradients` therefore
keeps the rows of some layers and adds what they give together. Rows are kept, not sums: no second buffer.

The Triton kernel stands in `wgrad_triton.py`; its contract and the plain-PyTorch reference stand here.

Legend: g layer that waits, r row, n expert of the pool held here, o out, i in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl

if TYPE_CHECKING:
    from moue_dist.kernels.experts.grouped_gemm import Gemm
    from moue_dist.kernels.experts.slab import PoolView


def add_weight_gradients(
    total_noi: Tensor,
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    counts_gn: Tensor,
    starts_gn: Tensor,
    impl: Impl | None = None,
) -> None:
    """total[n] += sum_g dy_g[rows of n]^T x_g[rows of n], in fp32; experts without rows are not touched.

    dys[g] [R_g, o] and xs[g] [R_g, i] hold expert n's rows from starts[g, n] on, counts[g, n] of them (int64). `total`
    may be strided over n. Example: one layer, dy = [[1], [2], [3]], x = [[1], [1], [2]], counts [[2, 1]], starts
    [[0, 2]], total = [[[0]], [[1]]] -> [[[3]], [[7]]].
    """
    if (impl or default_impl(total_noi.device)) == "triton":
        from moue_dist.kernels.experts import wgrad_triton

        wgrad_triton.add_weight_gradients(total_noi, dys, xs, counts_gn, starts_gn)
        return
    for dy_ro, x_ri, counts_n, starts_n in zip(dys, xs, counts_gn.tolist(), starts_gn.tolist(), strict=True):
        for n, (count, start) in enumerate(zip(counts_n, starts_n, strict=True)):
            if count:
                rows = slice(start, start + count)
                total_noi[n].addmm_(dy_ro[rows].t().to(total_noi.dtype), x_ri[rows].to(total_noi.dtype))


@dataclass(frozen=True)
class _Waiting:
    """A layer's rows: w_in's gradient is dz^T x, w_out's is dy^T h."""

    slab: PoolView
    gemm: Gemm
    counts_n: Tensor  # of the slab's visible experts, in its spans' order
    dz_r2f: Tensor
    x_rd: Tensor
    dy_rd: Tensor
    h_rf: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        return self.dz_r2f, self.x_rd, self.dy_rd, self.h_rf

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` is through: it may belong to the stream of another slot's backward."""
        for tensor in (self.counts_n, *self.rows):
            tensor.record_stream(stream)


class WeightGradients:
    """Collects `layers` layers' rows before it adds; 1 adds at once. All slabs are views of one pool.

    `flush` must come after the last backward and before anybody reads the gradients.
    """

    def __init__(self, layers: int = 1) -> None:
        self.layers = layers
        self._waiting: list[_Waiting] = []

    def add(
        self, slab: PoolView, gemm: Gemm, counts_n: Tensor, dz_r2f: Tensor, x_rd: Tensor, dy_rd: Tensor, h_rf: Tensor
    ) -> None:
        """Take a layer's rows, sorted by expert in the order of the slab's spans; nobody may write to them any more."""
        self._waiting.append(_Waiting(slab, gemm, counts_n, dz_r2f, x_rd, dy_rd, h_rf))
        if len(self._waiting) >= self.layers:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        if all(w.gemm.fused for w in waiting):
            _add_together(waiting)
        else:
            for w in waiting:
                w.gemm.wgrad(w.dy_rd, w.h_rf, w.slab.g_out)
                w.gemm.wgrad(w.dz_r2f, w.x_rd, w.slab.g_in)
        if waiting[0].x_rd.is_cuda:
            for w in waiting:
                w.used_on(torch.cuda.current_stream())

    def drop(self) -> None:
        """Forget what waits: a step broke off."""
        self._waiting = []


def _add_together(waiting: Sequence[_Waiting]) -> None:
    """All at once, over the experts from the first that any of the layers sees to the last."""
    pool = waiting[0].slab
    first = min(a for w in waiting for a, _ in w.slab.spans)
    end = max(b for w in waiting for _, b in w.slab.spans)
    counts_gn, starts_gn = (
        torch.stack([_spread(w.slab, of(w.counts_n), first, end) for w in waiting])
        for of in (lambda c: c, lambda c: c.cumsum(0) - c)
    )
    dzs, xs, dys, hs = zip(*(w.rows for w in waiting), strict=True)
    add_weight_gradients(pool.g_out[first:end], dys, hs, counts_gn, starts_gn, "triton")
    add_weight_gradients(pool.g_in[first:end], dzs, xs, counts_gn, starts_gn, "triton")


def _spread(slab: PoolView, values_n: Tensor, first: int, end: int) -> Tensor:
    """Numbers of the visible experts -> of the pool's rows from `first` to `end`, 0 for the others."""
    if slab.spans == ((first, end),):
        return values_n
    return values_n.new_zeros(end - first).index_copy_(0, slab.row_ids - first, values_n)
