"""Experts whose rows are weighted behind them, forward and backward without a graph, in buffers with spare room.

For exchanges that bring the routing weights to the experts' rank: the sum over a token's choices is taken there, and
the weight's gradient is <h, dh>, so that no output is kept. Rows are fetched from tokens by `source`, sorted by expert;
how many there are may be known on the device alone (`live`), and what stands behind them is neither read nor written.

Legend: N tokens, C rows with room, n visible experts held here, d hidden, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend, Impl, default_impl
from moue_dist.kernels.experts.grouped_gemm import LoopGemm, TorchGemm
from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.kernels.experts.swiglu import swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.fp8.e4m3 import gather_and_quantise, quantise_rows
from moue_dist.kernels.fp8.experts import Fp8Experts
from moue_dist.kernels.rows.permute import gather_rows
from moue_dist.kernels.sizes import check_sizes


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one layer at this rank's experts: their counts and the products over them."""

    slab: ExpertSlab
    counts_n: Tensor  # [n] int64 on the device
    gemm: TorchGemm | LoopGemm
    impl: Impl
    live: Tensor | None  # [1] int32 on the device; None: all rows
    fp8: Fp8Experts | None  # computes instead of `gemm`, but for the weight gradients

    def fetch(self, x_nd: Tensor, source_c: Tensor) -> Tensor:
        """Tokens' rows [C, d], as `backward` needs them."""
        return gather_rows(x_nd, source_c, impl=self.impl, live=self.live)


def rows_of(
    slab: ExpertSlab,
    counts_n: Tensor,
    rows: int,
    *,
    backend: ExpertBackend,
    live: Tensor | None = None,
    impl: Impl | None = None,
) -> Rows:
    """`rows`: the room of the buffers. `loop` waits for the counts, `torch` and `fp8` where no one range covers the
    experts; off a GPU `fp8` waits, too.
    """
    impl = impl or default_impl(counts_n.device)
    gemm: TorchGemm | LoopGemm
    if backend == "te":
        raise ValueError(f"no experts of backend {backend} in buffers with spare room")
    if backend == "torch":
        check_sizes("torch", slab.hidden, slab.width, slab.weight.element_size())
    if backend == "torch" or (backend == "fp8" and counts_n.is_cuda):
        gemm = TorchGemm.covering(slab.spans, slab.row_ids, counts_n, rows, impl)
    else:
        gemm = LoopGemm.of(slab.spans, counts_n.tolist())
    fp8 = slab.in_fp8(gemm, counts_n, impl, live) if backend == "fp8" else None
    return Rows(slab, counts_n, gemm, impl, live, fp8)


def forward(rows: Rows, x_nd: Tensor, source_c: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs [C, d] of the rows x[source], pre-activations [C, 2f]), the latter for `backward`."""
    if not rows.slab.count:  # a layer whose experts are all on other ranks
        return x_nd.new_empty(0, rows.slab.hidden), x_nd.new_empty(0, 2 * rows.slab.width)
    if rows.fp8 is not None:
        z_c2f = rows.fp8.up(quantise_rows(x_nd, source_c, rows.impl, rows.live))
        return rows.fp8.down(z_c2f), z_c2f
    z_c2f = rows.gemm.forward(rows.fetch(x_nd, source_c), rows.slab.w_in)
    return rows.gemm.forward(swiglu_forward(z_c2f, rows.impl, rows.live), rows.slab.w_out), z_c2f


def backward(
    rows: Rows, x_cd: Tensor, z_c2f: Tensor | None, dy_nd: Tensor, source_c: Tensor, weight_c: Tensor
) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """(gradients of rows [C, d], of routing weights [C] fp32, what adds weight gradients) of weight[c] * expert(x[c]).

    `x_cd` comes from `fetch`; dy[source] is the gradient of the weighted row; without `z` the first product runs again.
    The last of the three must be called once: it hands x, dy and the activations to `slab.sums`, which may keep them
    until the next layer's.
    """
    slab, gemm = rows.slab, rows.gemm
    if not slab.count:
        return x_cd.new_empty(0, slab.hidden), weight_c[:0], lambda: None
    if rows.fp8 is not None:
        return _backward_fp8(rows.fp8, x_cd, z_c2f, dy_nd, source_c, weight_c)
    dy_cd = rows.fetch(dy_nd, source_c)
    if z_c2f is None:
        z_c2f = gemm.forward(x_cd, slab.w_in)
    dh_cf = gemm.dgrad(dy_cd, slab.w_out)
    dz_c2f, h_cf, dweight_c = swiglu_weighted_backward(z_c2f, dh_cf, weight_c, rows.impl, rows.live)

    def add() -> None:
        slab.sums.add(slab, gemm, rows.counts_n, dz_c2f, x_cd, dy_cd, h_cf)

    return gemm.dgrad(dz_c2f, slab.w_in), dweight_c, add


def _backward_fp8(
    fp8: Fp8Experts, x_cd: Tensor, z_c2f: Tensor | None, dy_nd: Tensor, source_c: Tensor, weight_c: Tensor
) -> tuple[Tensor, Tensor, Callable[[], None]]:
    dy_cd, dy = gather_and_quantise(dy_nd, source_c, fp8.impl, fp8.live)
    if z_c2f is None:
        z_c2f = fp8.up(quantise_rows(x_cd, None, fp8.impl, fp8.live))
    dz, dweight_c, add = fp8.backward(x_cd, z_c2f, dy_cd, dy, weight_c)
    del dy  # of the memory of the peak
    assert dweight_c is not None
    return fp8.back_up(dz), dweight_c, add
