"""SwiGLU, h = silu(gate) * up, forward and backward: the plain-PyTorch reference and its dispatcher.

The Triton kernels with the same contracts stand in `swiglu_triton.py`. Legend: r row, f expert width;
z_r2f = [gate | up]. Computed in fp32 (fp64 for fp64) and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.backend import Impl, default_impl


def swiglu_forward(z_r2f: Tensor, impl: Impl | None = None, live: Tensor | None = None) -> Tensor:
    """h[r] = silu(z[r, :f]) * z[r, f:], [R, f] in z's dtype. Example: z = [[0, 2], [20, 2]] -> [[0], [40]].

    `live` [1] int32 on the device: from that row on nothing is computed, and the result holds anything.
    """
    if (impl or default_impl(z_r2f.device)) == "triton":
        from moue_dist.kernels.experts import swiglu_triton

        return swiglu_triton.swiglu_forward(z_r2f, live)
    gate, up = _wide(z_r2f).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(z_r2f.dtype)


def swiglu_backward(z_r2f: Tensor, dh_rf: Tensor, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    """(dz [R, 2f], h [R, f]): the gradient and, from the same pass, h again, so that nobody needs to keep it.

    With s = sigmoid(gate): dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s.
    Example: z = [[0, 2]], dh = [[1]] -> dz = [[1, 0]], h = [[0]].
    """
    if (impl or default_impl(z_r2f.device)) == "triton":
        from moue_dist.kernels.experts import swiglu_triton

        return swiglu_triton.swiglu_backward(z_r2f, dh_rf)
    gate, up = _wide(z_r2f).chunk(2, dim=-1)
    dh = dh_rf.to(gate.dtype)
    s = torch.sigmoid(gate)
    silu = gate * s
    dz = torch.cat((dh * up * s * (1 + gate * (1 - s)), dh * silu), dim=-1)
    return dz.to(z_r2f.dtype), (silu * up).to(z_r2f.dtype)


def swiglu_weighted_backward(
    z_r2f: Tensor, dh_rf: Tensor, weight_r: Tensor, impl: Impl | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a row that is weighted behind the experts: (dz of weight * dh, weight * h, dweight = <h, dh>).

    `live` as in `swiglu_forward`. dweight is [R] fp32 (fp64 for fp64). Example: z = [[20, 2]], dh = [[1]], weight =
    [0.5] -> dz = [[1, 10]], weight * h = [[20]], dweight = [40].
    """
    if (impl or default_impl(z_r2f.device)) == "triton":
        from moue_dist.kernels.experts import swiglu_triton

        return swiglu_triton.swiglu_weighted_backward(z_r2f, dh_rf, weight_r, live)
    wide = torch.float64 if z_r2f.dtype == torch.float64 else torch.float32
    w_r1, dh = weight_r.to(wide)[:, None], dh_rf.to(wide)
    dz_r2f, h_rf = swiglu_backward(z_r2f.to(wide), dh * w_r1, "torch")
    return dz_r2f.to(z_r2f.dtype), (h_rf * w_r1).to(z_r2f.dtype), (h_rf * dh).sum(-1)


def swiglu(z_r2f: Tensor, impl: Impl | None = None) -> Tensor:
    """`swiglu_forward` with gradients; keeps z only."""
    return _SwiGLU.apply(z_r2f, impl or default_impl(z_r2f.device))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_r2f: Tensor, impl: Impl) -> Tensor:
        ctx.save_for_backward(z_r2f)
        ctx.impl = impl
        return swiglu_forward(z_r2f, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_rf: Tensor) -> tuple[Tensor, None]:
        (z_r2f,) = ctx.saved_tensors
        return swiglu_backward(z_r2f, dh_rf, ctx.impl)[0], None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
