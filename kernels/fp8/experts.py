"""The experts of one MoE layer in FP8: forward and the gradient of the inputs in e4m3, weight gradients as in bf16.

A row of activations or gradients has one scale, a weight's output channel another (`e4m3.py`); the weights come
quantised from the slab's `QuantisedPool`. On a GPU the products are PyTorch's scaled grouped GEMM, one launch for all
experts of a span, without a wait for the device; elsewhere each expert's product is computed from the same numbers in
fp32. Weight gradients take the rows in the model's type: to quantise those by column would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.backend import Impl
from moue_dist.kernels.experts.grouped_gemm import LoopGemm, TorchGemm, join
from moue_dist.kernels.experts.slab import PoolView
from moue_dist.kernels.experts.wgrad import WeightGradients
from moue_dist.kernels.fp8.e4m3 import quantise_rows, swiglu_backward_fp8, swiglu_forward_fp8
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.kernels.fp8.scaled import Scaled
from moue_dist.kernels.sizes import check_sizes


@dataclass(frozen=True, eq=False)
class Fp8Experts:
    """One use of a slab's experts: rows sorted by expert, `gemm` knows which are whose, and the weights.

    What it returns has the type of the slab's weights. `live` [1] int32 on the device is the number of rows where the
    host need not know it (None: all).
    """

    slab: PoolView
    pool: QuantisedPool
    sums: WeightGradients
    gemm: TorchGemm | LoopGemm
    counts_n: Tensor
    impl: Impl
    live: Tensor | None = None

    @staticmethod
    def of(
        slab: PoolView,
        pool: QuantisedPool,
        sums: WeightGradients,
        gemm: TorchGemm | LoopGemm,
        counts_n: Tensor,
        impl: Impl,
        live: Tensor | None = None,
    ) -> Fp8Experts:
        """ConfigError where the products refuse the sizes, ValueError where they refuse the weights' type."""
        check_sizes("fp8", slab.hidden, slab.width, slab.weight.element_size())
        if slab.weight.is_cuda and slab.weight.dtype != torch.bfloat16:
            raise ValueError(f"backend fp8 takes bf16 on a GPU, got {slab.weight.dtype}")
        return Fp8Experts(slab, pool, sums, gemm, counts_n, impl, live)

    def up(self, x: Scaled) -> Tensor:
        """Rows -> pre-activations [R, 2f]."""
        return self._product(x, self.pool.w_in.out)

    def down(self, z_r2f: Tensor) -> Tensor:
        """Pre-activations -> outputs [R, d]."""
        return self._product(swiglu_forward_fp8(z_r2f, self.impl, self.live), self.pool.w_out.out)

    def backward(
        self, x_rd: Tensor, z_r2f: Tensor, dy_rd: Tensor, dy: Scaled, weight_r: Tensor | None = None
    ) -> tuple[Scaled, Tensor | None, Callable[[], None]]:
        """(gradient of the pre-activations, dweight, what adds weight gradients) from the gradient of the outputs.

        With a weight `dy` belongs to the weighted outputs. The last of the three must be called once: it hands x, dy
        and the activations to `sums`.
        """
        dh_rf = self._product(dy, self.pool.w_out.into)
        dz_r2f, dz, h_rf, dweight_r = swiglu_backward_fp8(z_r2f, dh_rf, weight_r, self.impl, self.live)

        def add() -> None:
            self.sums.add(self.slab, self.gemm, self.counts_n, dz_r2f, x_rd, dy_rd, h_rf)

        return dz, dweight_r, add

    def back_up(self, dz: Scaled) -> Tensor:
        """Gradient of the pre-activations -> of the rows [R, d]."""
        return self._product(dz, self.pool.w_in.into)

    def _product(self, x: Scaled, w: Scaled) -> Tensor:
        """y[r] = x[r] w[expert of r]^T, [R, o]; x [R, i], w [n, o, i]."""
        if isinstance(self.gemm, TorchGemm) and x.q.is_cuda:
            return join([self._grouped(x, w, *part) for part in self.gemm.parts])
        assert isinstance(self.gemm, LoopGemm)
        y_ro = torch.empty(x.q.shape[0], w.q.shape[1], dtype=self.slab.weight.dtype, device=x.q.device)
        for e, a, b in self.gemm.segments:
            y_ro[a:b] = (x.q[a:b].float() @ w.q[e].float().t()) * x.scale[a:b, None] * w.scale[e]
        return y_ro

    def _grouped(
        self, x: Scaled, w: Scaled, experts: tuple[int, int], rows: tuple[int, int], counts_n: Tensor, offsets: Tensor
    ) -> Tensor:
        (e, f), (a, b) = experts, rows
        return torch._scaled_grouped_mm(
            x.q[a:b],
            w.q[e:f].transpose(1, 2),
            x.scale[a:b],
            w.scale[e:f],
            offs=offsets,
            out_dtype=self.slab.weight.dtype,
            use_fast_accum=True,  # changes no digit of the error against fp32, and is a third faster
        )


def run_experts(x_rd: Tensor, experts: Fp8Experts, recompute: bool) -> Tensor:
    """`mlp.expert_mlp` with backend `fp8`. Kept for backward: x and, without `recompute`, the pre-activation."""
    anchor = torch.empty(0, device=x_rd.device, requires_grad=True)  # as in mlp.py
    y_rd: Tensor = _Fp8Experts.apply(x_rd, anchor, experts, recompute)
    return y_rd


def backward_without_graph(x_rd: Tensor, dy_rd: Tensor, weight_r: Tensor, experts: Fp8Experts) -> tuple[Tensor, Tensor]:
    """`mlp.expert_backward` with backend `fp8`."""
    z_r2f = experts.up(quantise_rows(x_rd, impl=experts.impl))
    dz, dweight_r, add = experts.backward(x_rd, z_r2f, dy_rd, quantise_rows(dy_rd, impl=experts.impl), weight_r)
    add()
    assert dweight_r is not None
    return experts.back_up(dz), dweight_r


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_rd: Tensor, anchor: Tensor, experts: Fp8Experts, recompute: bool) -> Tensor:
        ctx.experts = experts
        x_rd = x_rd.contiguous()
        if x_rd.shape[0] == 0:
            return x_rd.new_empty(x_rd.shape)
        z_r2f = experts.up(quantise_rows(x_rd, impl=experts.impl))
        ctx.save_for_backward(x_rd, None if recompute else z_r2f)
        return experts.down(z_r2f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_rd: Tensor) -> tuple[Tensor | None, ...]:
        if dy_rd.shape[0] == 0:
            return dy_rd, None, None, None
        experts, dy_rd = ctx.experts, dy_rd.contiguous()
        x_rd, z_r2f = ctx.saved_tensors
        if z_r2f is None:
            z_r2f = experts.up(quantise_rows(x_rd, impl=experts.impl))
        dz, _, add = experts.backward(x_rd, z_r2f, dy_rd, quantise_rows(dy_rd, impl=experts.impl))
        add()
        return experts.back_up(dz) if ctx.needs_input_grad[0] else None, None, None, None
