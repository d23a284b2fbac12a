"""Rows and weights of the experts in FP8 (e4m3): the plain-PyTorch reference and its dispatcher.

A number is q * scale, with one fp32 scale a row of activations or gradients and one an output channel of a weight:
scale = the largest absolute value / 448, so the largest becomes 448, the largest e4m3. Such a scale leaves a product's
sum over k alone, so a matrix product of two of them is exact up to fp32's rounding. The Triton kernels with the same
contracts stand in `e4m3_triton.py`.

Legend: t token, r row, d hidden, f expert width, n expert, o out, i in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl
from moue_dist.kernels.experts.swiglu import swiglu_backward, swiglu_weighted_backward
from moue_dist.kernels.fp8.scaled import E4M3, LARGEST, LEAST, Layouts, Scaled, SwigluGradients
from moue_dist.kernels.rows.permute import gather_rows


def quantise_rows(
    x_td: Tensor, index_r: Tensor | None = None, impl: Impl | None = None, live: Tensor | None = None
) -> Scaled:
    """Rows x[index[r]] (x[r] without an index; zeros where it is -1) in FP8: q [R, d], scale [R].

    `live` [1] int32 on the device: from that row on nothing is read or written, and the result holds anything.
    Example: x = [[1, -2], [0, 0]], index = [1, 0] -> q = [[0, 0], [224, -448]], scale = [2**-100 / 448, 2 / 448].
    """
    if (impl or default_impl(x_td.device)) == "triton":
        from moue_dist.kernels.fp8 import e4m3_triton

        return e4m3_triton.quantise_rows(x_td, index_r, live)
    return _quantise(x_td if index_r is None else gather_rows(x_td, index_r, impl="torch"))


def gather_and_quantise(
    x_td: Tensor, index_r: Tensor, impl: Impl | None = None, live: Tensor | None = None
) -> tuple[Tensor, Scaled]:
    """`gather_rows` [R, d] in x's type, and the same rows in FP8, from one pass."""
    if (impl or default_impl(x_td.device)) == "triton":
        from moue_dist.kernels.fp8 import e4m3_triton

        return e4m3_triton.gather_and_quantise(x_td, index_r, live)
    rows_rd = gather_rows(x_td, index_r, impl="torch")
    return rows_rd, _quantise(rows_rd)


def swiglu_forward_fp8(z_r2f: Tensor, impl: Impl | None = None, live: Tensor | None = None) -> Scaled:
    """h = silu(z[:, :f]) * z[:, f:] in FP8, q [R, f], scale [R], rounded once. `live` as in `quantise_rows`.

    Example: z = [[20, 2]] -> q = [[448]], scale = [40 / 448].
    """
    if (impl or default_impl(z_r2f.device)) == "triton":
        from moue_dist.kernels.fp8 import e4m3_triton

        return e4m3_triton.swiglu_forward_fp8(z_r2f, live)
    gate, up = z_r2f.float().chunk(2, dim=-1)
    return _quantise(torch.nn.functional.silu(gate) * up)


def swiglu_backward_fp8(
    z_r2f: Tensor,
    dh_rf: Tensor,
    weight_r: Tensor | None = None,
    impl: Impl | None = None,
    live: Tensor | None = None,
) -> SwigluGradients:
    """`swiglu_backward`, or with a weight `swiglu_weighted_backward`, and dz in FP8 from the same pass.

    `live` as in `quantise_rows`. Example: z = [[20, 2]], dh = [[1]], weight = [0.5] -> dz = [[1, 10]], dz8 = [[44,
    448]] * 10 / 448 (44.8 is none of e4m3), h = [[20]], dweight = [40].
    """
    if (impl or default_impl(z_r2f.device)) == "triton":
        from moue_dist.kernels.fp8 import e4m3_triton

        return e4m3_triton.swiglu_backward_fp8(z_r2f, dh_rf, weight_r, live)
    wide = z_r2f.float()
    if weight_r is None:
        dweight_r = None
        dz, h = swiglu_backward(wide, dh_rf, "torch")
    else:
        dz, h, dweight_r = swiglu_weighted_backward(wide, dh_rf, weight_r, "torch")
    return SwigluGradients(dz.to(z_r2f.dtype), _quantise(dz), h.to(z_r2f.dtype), dweight_r)


def quantise_weights(w_noi: Tensor, into: Layouts, impl: Impl | None = None) -> None:
    """Write both layouts of w [n, o, i], which may be strided over n, to `into`.

    Example: w = [[[1, 2], [4, 0]]] -> out q = [[[224, 448], [448, 0]]], scale = [[2/448, 4/448]]; into q =
    [[[112, 448], [448, 0]]], scale = [[4/448, 2/448]].
    """
    if (impl or default_impl(w_noi.device)) == "triton":
        from moue_dist.kernels.fp8 import e4m3_triton

        e4m3_triton.quantise_weights(w_noi, into)
        return
    for layout, w in ((into.out, w_noi), (into.into, w_noi.transpose(1, 2))):
        for q, scale, one in zip(*layout, w, strict=True):  # one expert at a time: no copy of all of them in fp32
            done = _quantise(one)
            q.copy_(done.q)
            scale.copy_(done.scale)


def _quantise(x: Tensor) -> Scaled:
    x = x.float()
    scale = x.abs().amax(-1).clamp_min(LEAST) * (1 / LARGEST)
    return Scaled((x * (1 / scale)[..., None]).to(E4M3), scale)
