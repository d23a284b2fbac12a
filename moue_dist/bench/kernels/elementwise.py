"""SwiGLU beside megatron-core's fused one, AdamW beside PyTorch's fused one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moue_dist.bench.kernels.inputs import Bench
from moue_dist.bench.kernels.products import Maker
from moue_dist.bench.timing.contest import Contest
from moue_dist.kernels.adam import Hyper, adamw_step
from moue_dist.kernels.experts.swiglu import swiglu_backward, swiglu_forward, swiglu_weighted_backward

STOCK = "megatron-core"
CLIP = 0.5


def elementwise(bench: Bench) -> Iterator[tuple[str, Maker]]:
    yield "SwiGLU", lambda: _swiglu(bench)
    yield "SwiGLU backward", lambda: _swiglu_backward(bench)
    yield "SwiGLU backward, weighted", lambda: _swiglu_weighted(bench)
    yield "AdamW", lambda: _adamw(bench, 1.0)
    yield "AdamW, clipped", lambda: _adamw(bench, CLIP)


def _facts(bench: Bench, tensors: int) -> dict[str, int]:
    """`tensors` [R, f] that are read or written."""
    s = bench.sizes
    return {"rows": s.rows, "bytes": tensors * s.rows * s.width * (4 if bench.dtype == torch.float32 else 2)}


def _swiglu(bench: Bench) -> Contest:
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    z_r2f = bench.normal(bench.sizes.rows, 2 * bench.sizes.width)
    ways = {"ours": lambda: [swiglu_forward(z_r2f, bench.impl)], STOCK: lambda: [swiglu(z_r2f)]}
    return Contest(ways, bench.rounded_on_the_way, facts=_facts(bench, 3))


def _swiglu_backward(bench: Bench) -> Contest:
    """The gradient, and the activation once more for the weights' gradient."""
    from megatron.core.fusions.fused_bias_swiglu import swiglu, swiglu_back

    z_r2f = bench.normal(bench.sizes.rows, 2 * bench.sizes.width)
    dh_rf = bench.normal(bench.sizes.rows, bench.sizes.width)
    ways = {
        "ours": lambda: list(swiglu_backward(z_r2f, dh_rf, bench.impl)),
        STOCK: lambda: [swiglu_back(dh_rf, z_r2f), swiglu(z_r2f)],
    }
    return Contest(ways, bench.rounded_on_the_way, facts=_facts(bench, 6))


def _swiglu_weighted(bench: Bench) -> Contest:
    """The same, with the routing weight applied and its gradient."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu, weighted_swiglu_back

    z_r2f = bench.normal(bench.sizes.rows, 2 * bench.sizes.width)
    dh_rf = bench.normal(bench.sizes.rows, bench.sizes.width)
    weight_r = bench.wide(bench.sizes.rows).sigmoid()

    def stock() -> Sequence[Tensor]:
        dz_r2f, dweight_r1 = weighted_swiglu_back(dh_rf, z_r2f, weight_r[:, None])
        return [dz_r2f, weighted_swiglu(z_r2f, weight_r[:, None]), dweight_r1.squeeze(1)]

    ways = {"ours": lambda: list(swiglu_weighted_backward(z_r2f, dh_rf, weight_r, bench.impl)), STOCK: stock}
    return Contest(ways, bench.rounded_on_the_way, facts=_facts(bench, 6))


def _adamw(bench: Bench, clip: float) -> Contest:
    """One step on fp32 masters and moments, the model's weight rounded from the master; the gradient is kept."""
    n, lr, betas, eps, decay = bench.sizes.numbers, 1e-3, (0.9, 0.95), 1e-8, 0.1
    grad = bench.wide(n)
    start = bench.wide(n).mul_(1e-3)
    mine, other = start.clone(), torch.nn.Parameter(start.clone())
    first, second = torch.zeros_like(grad), torch.zeros_like(grad)
    weights = [torch.empty(n, dtype=bench.dtype, device=bench.device) for _ in range(2)]
    optimizer = torch.optim.AdamW([other], lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
    other.grad = grad if clip == 1.0 else torch.empty_like(grad)
    steps = 0

    def ours() -> Sequence[Tensor]:
        nonlocal steps
        steps += 1
        adamw_step(mine, grad, first, second, weights[0], Hyper(lr, *betas, eps, decay, steps), clip, bench.impl)
        return [mine, weights[0]]

    @torch.no_grad()
    def fused() -> Sequence[Tensor]:
        if clip != 1.0:
            torch.mul(grad, clip, out=other.grad)
        optimizer.step()
        weights[1].copy_(other)
        return [other, weights[1]]

    facts = {"numbers": n, "bytes": n * (28 + weights[0].element_size())}
    return Contest({"ours": ours, "torch.optim.AdamW": fused}, 1e-3, facts=facts)
