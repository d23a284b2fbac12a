"""The SwiGLU experts of one MoE layer, computed over a slab of the pool, with weight gradients added in place.

Legend: r row (a token's copy for one expert), n expert held by this rank, d hidden, f expert width.
expert(x) = (silu(x W_gate^T) * (x W_up^T)) W_out^T. A row of the pool holds w_in [2f, d] (gate rows first), then
w_out [d, f].

The weights are no autograd leaves. An expert that several layers use would otherwise be summed by autograd through a
gradient of the whole slab per layer and microbatch; here backward adds to one fp32 buffer, only for experts that got
rows. Gradients are added in backward alone, so recomputing the forward (checkpointing) cannot count them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.backend import ExpertBackend, Impl, default_impl
from moue_dist.kernels.experts.grouped_gemm import Gemm, LoopGemm, TorchGemm
from moue_dist.kernels.experts.slab import PoolView
from moue_dist.kernels.experts.swiglu import swiglu_backward, swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.experts.wgrad import WeightGradients
from moue_dist.kernels.fp8.experts import Fp8Experts, backward_without_graph, run_experts
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.kernels.sizes import check_sizes


@dataclass(frozen=True, eq=False)
class ExpertSlab(PoolView):
    """What one MoE layer of this rank computes with.

    Build it after the pool has its final storage: it holds views, and a wrapper that moves parameters into a buffer
    of its own (megatron-core's DistributedDataParallel) leaves older views behind. Keep it for the layer's lifetime:
    `te` holds Transformer Engine's FP8 state.
    """

    sums: WeightGradients = field(default_factory=WeightGradients)  # shared by the slabs of a pool
    fp8: QuantisedPool | None = None  # the pool's weights in FP8, which backend `fp8` computes with

    @cached_property
    def te(self) -> Callable[..., Tensor]:
        """Transformer Engine's modules over these weights, built on first use (`te.make_te_experts`)."""
        from moue_dist.kernels.experts.te import make_te_experts

        return make_te_experts(self)

    def in_fp8(
        self, gemm: TorchGemm | LoopGemm, counts_n: Tensor, impl: Impl, live: Tensor | None = None
    ) -> Fp8Experts:
        """These experts in FP8, over the rows that `gemm` cuts. ValueError where the pool is not quantised."""
        if self.fp8 is None:
            raise ValueError("backend fp8 needs the slab of a pool that is quantised")
        return Fp8Experts.of(self, self.fp8, self.sums, gemm, counts_n, impl, live)


def expert_mlp(
    x_rd: Tensor,
    counts_n: Tensor,
    slab: ExpertSlab,
    *,
    backend: ExpertBackend,
    recompute: bool = False,
    counts_host: list[int] | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Run every row through its expert; [R, d] in x's dtype. In backward weight gradients go to `slab.sums`.

    x_rd: rows sorted by visible expert, in the order of `slab.spans`. counts_n: int64 on x's device, rows of each
    visible expert; they sum to R, or the result is undefined (checking would wait for the device; with `counts_host`,
    the same numbers on the host, it is checked). Any count may be 0, and so may R.
    Kept for backward: x and the pre-activation [R, 2f]; with `recompute` x alone, at the price of one more GEMM.
    `impl` picks the activation kernel (None: by device).

    `loop` and `te` need the counts on the host and wait for the device without `counts_host`; so do `torch` and `fp8`
    with several spans. `torch` needs d and f in multiples of 16 bytes, `fp8` in multiples of 16 (ConfigError).
    Example: spans ((4, 6),), counts [2, 1] -> rows 0 and 1 go through the pool's row 4, row 2 through row 5.
    """
    if counts_n.shape[0] != slab.count:
        raise ValueError(f"{counts_n.shape[0]} counts for {slab.count} visible experts")
    if counts_host is not None and (len(counts_host) != slab.count or sum(counts_host) != x_rd.shape[0]):
        raise ValueError(f"counts_host {counts_host} does not describe {x_rd.shape[0]} rows of {slab.count} experts")
    if backend == "te":
        return slab.te(x_rd, counts_n.tolist() if counts_host is None else counts_host, recompute=recompute)
    impl = impl or default_impl(x_rd.device)
    if backend == "torch":
        check_sizes("torch", slab.hidden, slab.width, x_rd.element_size())
    gemm = _gemm(backend, x_rd.shape[0], counts_n, slab, counts_host, impl)
    if backend == "fp8":
        return run_experts(x_rd, slab.in_fp8(gemm, counts_n, impl), recompute)
    # without a tensor that needs a gradient, autograd would drop the node and with it the weight gradients
    anchor = torch.empty(0, device=x_rd.device, requires_grad=True)
    return _ExpertMLP.apply(x_rd, anchor, counts_n, slab, gemm, recompute, impl)


def expert_backward(
    x_rd: Tensor,
    dy_rd: Tensor,
    weight_r: Tensor,
    counts_n: Tensor,
    slab: ExpertSlab,
    *,
    backend: ExpertBackend,
    counts_host: list[int],
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward of `weight[r] * expert(x[r])` without a graph: (dx [R, d], dweight [R] fp32).

    For rows that do not meet in backward as they met in forward. `dy` is the gradient of the weighted row; fc1 runs
    again, fc2 does not, since dweight = <h, dy W_out>. Weight gradients go to `slab.sums`.
    """
    if x_rd.shape[0] == 0:
        return x_rd, weight_r
    impl = impl or default_impl(x_rd.device)
    if backend == "te":
        return _te_backward(x_rd, dy_rd, weight_r, slab, counts_host)
    gemm = _gemm(backend, x_rd.shape[0], counts_n, slab, counts_host, impl)
    x_rd, dy_rd = x_rd.contiguous(), dy_rd.contiguous()
    if backend == "fp8":
        return backward_without_graph(x_rd, dy_rd, weight_r, slab.in_fp8(gemm, counts_n, impl))
    z_r2f = gemm.forward(x_rd, slab.w_in)
    dh_rf = gemm.dgrad(dy_rd, slab.w_out)
    dz_r2f, h_rf, dweight_r = swiglu_weighted_backward(z_r2f, dh_rf, weight_r, impl)
    slab.sums.add(slab, gemm, counts_n, dz_r2f, x_rd, dy_rd, h_rf)
    return gemm.dgrad(dz_r2f, slab.w_in), dweight_r


def _gemm(
    backend: ExpertBackend, rows: int, counts_n: Tensor, slab: ExpertSlab, counts_host: list[int] | None, impl: Impl
) -> TorchGemm | LoopGemm:
    if backend == "torch" or (backend == "fp8" and counts_n.is_cuda):
        return TorchGemm.of(slab.spans, counts_n, rows, counts_host, impl)
    return LoopGemm.of(slab.spans, counts_n.tolist() if counts_host is None else counts_host)


def _te_backward(
    x_rd: Tensor, dy_rd: Tensor, weight_r: Tensor, slab: ExpertSlab, counts_host: list[int]
) -> tuple[Tensor, Tensor]:
    """Transformer Engine has no backward without its graph: run the forward again, fc2 included."""
    with torch.enable_grad():
        x_rd = x_rd.detach().requires_grad_()
        y_rd = slab.te(x_rd, counts_host)
    (dx_rd,) = torch.autograd.grad(y_rd, x_rd, (dy_rd * weight_r[:, None]).to(dy_rd.dtype))
    return dx_rd, (y_rd.detach().float() * dy_rd.float()).sum(-1)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_rd: Tensor,
        anchor: Tensor,
        counts_n: Tensor,
        slab: ExpertSlab,
        gemm: Gemm,
        recompute: bool,
        impl: Impl,
    ) -> Tensor:
        ctx.counts_n, ctx.slab, ctx.gemm, ctx.impl = counts_n, slab, gemm, impl
        x_rd = x_rd.contiguous()
        if x_rd.shape[0] == 0:
            return x_rd.new_empty(x_rd.shape)
        z_r2f = gemm.forward(x_rd, slab.w_in)
        ctx.save_for_backward(x_rd, None if recompute else z_r2f)
        return gemm.forward(swiglu_forward(z_r2f, impl), slab.w_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_rd: Tensor) -> tuple[Tensor | None, ...]:
        slab, gemm = ctx.slab, ctx.gemm
        if dy_rd.shape[0] == 0:
            return (dy_rd, *[None] * 6)
        dy_rd = dy_rd.contiguous()
        x_rd, z_r2f = ctx.saved_tensors
        if z_r2f is None:
            z_r2f = gemm.forward(x_rd, slab.w_in)
        dh_rf = gemm.dgrad(dy_rd, slab.w_out)
        dz_r2f, h_rf = swiglu_backward(z_r2f, dh_rf, ctx.impl)
        slab.sums.add(slab, gemm, ctx.counts_n, dz_r2f, x_rd, dy_rd, h_rf)
        dx_rd = gemm.dgrad(dz_r2f, slab.w_in) if ctx.needs_input_grad[0] else None
        return (dx_rd, *[None] * 6)
