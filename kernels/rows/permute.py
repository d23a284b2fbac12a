"""Moving rows between token order and expert order, with gradients: the plain-PyTorch reference and its dispatcher.

The Triton kernels with the same contracts stand in `permute_triton.py`.

Legend: t token, k choice of a token, r row (a token's copy for one expert), d hidden. Indices are int32 or int64;
-1 means nobody. Low-precision inputs are summed in fp32, fp64 in fp64.

`position_tk` says which row holds a token's k-th choice; `choice_r` is its inverse in flattened (t, k) order and
`source_r = choice_r // k` the token. Example, 2 tokens, k = 2, rows sorted by expert, choices [[1, 0], [0, 2]]:
position_tk = [[2, 0], [1, 3]], choice_r = [1, 2, 0, 3], source_r = [0, 1, 0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.backend import Impl, default_impl


def gather_rows(
    x_td: Tensor,
    index_r: Tensor,
    scale_r: Tensor | None = None,
    impl: Impl | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """y[r] = x[index[r]] * scale[r]; a row of zeros where index[r] is -1. Returns [R, d] in x's dtype.

    `live` [1] int32 on the device: from that row on nothing is read or written, and the result holds anything.

    Example: x = [[1, 2], [3, 4]], index = [1, -1, 0], scale = [2, 5, 1] -> [[6, 8], [0, 0], [1, 2]].
    `impl` None picks by device (`backend.default_impl`).
    """
    if (impl or default_impl(x_td.device)) == "triton":
        from moue_dist.kernels.rows import permute_triton

        return permute_triton.gather_rows(x_td, index_r, scale_r, live)
    if x_td.shape[0] == 0:
        return x_td.new_zeros(index_r.shape[0], x_td.shape[1])
    y_rd = x_td.index_select(0, index_r.clamp_min(0))
    if scale_r is not None:
        y_rd = (y_rd.to(_wide(x_td.dtype)) * scale_r.to(_wide(x_td.dtype))[:, None]).to(x_td.dtype)
    return y_rd.masked_fill_((index_r < 0)[:, None], 0)


def gather_sum(rows_rd: Tensor, index_tk: Tensor, weight_tk: Tensor | None = None, impl: Impl | None = None) -> Tensor:
    """y[t] = sum_k weight[t, k] * rows[index[t, k]]; index -1 adds nothing. Returns [T, d] in rows' dtype.

    Example: rows = [[1, 1], [10, 10]], index = [[0, 1], [1, -1]], weight = [[1, .5], [2, 9]] -> [[6, 6], [20, 20]].
    """
    if (impl or default_impl(rows_rd.device)) == "triton":
        from moue_dist.kernels.rows import permute_triton

        return permute_triton.gather_sum(rows_rd, index_tk, weight_tk)
    wide = _wide(rows_rd.dtype)
    y_td = torch.zeros(index_tk.shape[0], rows_rd.shape[1], dtype=wide, device=rows_rd.device)
    if weight_tk is not None:
        weight_tk = weight_tk.to(wide).masked_fill(index_tk < 0, 0)
    # one choice at a time: the same order of summation as the kernel, and a k-th of the memory
    for j in range(index_tk.shape[1]):
        part_td = gather_rows(rows_rd, index_tk[:, j], impl="torch").to(wide)
        if weight_tk is not None:
            part_td = part_td * weight_tk[:, j, None]
        y_td += part_td
    return y_td.to(rows_rd.dtype)


def gather_dot(rows_rd: Tensor, index_tk: Tensor, dy_td: Tensor, impl: Impl | None = None) -> Tensor:
    """dw[t, k] = <dy[t], rows[index[t, k]]>; 0 where the index is -1. Returns [T, k] in fp32 (fp64 for fp64 rows).

    Example: rows = [[1, 2], [3, 4]], index = [[1, 0], [0, -1]], dy = [[1, 1], [2, 0]] -> [[7, 3], [2, 0]].
    """
    if (impl or default_impl(rows_rd.device)) == "triton":
        from moue_dist.kernels.rows import permute_triton

        return permute_triton.gather_dot(rows_rd, index_tk, dy_td)
    wide = _wide(rows_rd.dtype)
    dw_tk = torch.zeros(index_tk.shape, dtype=wide, device=rows_rd.device)
    for j in range(index_tk.shape[1]):
        part_td = gather_rows(rows_rd, index_tk[:, j], impl="torch")
        dw_tk[:, j] = (part_td.to(wide) * dy_td.to(wide)).sum(-1)
    return dw_tk


def histogram(ids: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 stands in the flat `ids` (int64); [bins] int64, without waiting for the device.

    torch.bincount looks for the largest id first, and waits for it. Example: ids = [2, 0, 2], bins = 4 -> [1, 0, 2, 0].
    """
    return ids.new_zeros(bins).scatter_add_(0, ids, torch.ones_like(ids))


def permute(x_td: Tensor, source_r: Tensor, position_tk: Tensor, impl: Impl | None = None) -> Tensor:
    """Copy each token to its experts' rows: rows[r] = x[source[r]], [R, d]. Differentiable in x.

    Backward gathers (dx[t] = sum_k drows[position[t, k]]) instead of scattering, so it is deterministic.
    Example: x = [[1], [2]], source = [0, 1, 0, 1] -> [[1], [2], [1], [2]].
    """
    return _Permute.apply(x_td, source_r, position_tk, impl or default_impl(x_td.device))


def combine(
    rows_rd: Tensor,
    weight_tk: Tensor,
    position_tk: Tensor,
    source_r: Tensor,
    choice_r: Tensor,
    impl: Impl | None = None,
) -> Tensor:
    """Weighted sum of each token's expert rows: y[t] = sum_k weight[t, k] * rows[position[t, k]], [T, d].

    Differentiable in rows and weight. `source_r` (-1: a row that no token reads) and `choice_r` in [0, T*k) invert
    `position_tk` and serve backward: drows[r] = weight[slot[r]] * dy[source[r]].
    """
    return _Combine.apply(rows_rd, weight_tk, position_tk, source_r, choice_r, impl or default_impl(rows_rd.device))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, source_r: Tensor, position_tk: Tensor, impl: Impl) -> Tensor:
        ctx.save_for_backward(position_tk)
        ctx.impl = impl
        return gather_rows(x_td, source_r, impl=impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_rd: Tensor) -> tuple[Tensor | None, ...]:
        (position_tk,) = ctx.saved_tensors
        return gather_sum(drows_rd, position_tk, impl=ctx.impl), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_rd: Tensor,
        weight_tk: Tensor,
        position_tk: Tensor,
        source_r: Tensor,
        choice_r: Tensor,
        impl: Impl,
    ) -> Tensor:
        # the rows are large and only the weights' gradient reads them again
        kept_rd = rows_rd if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_rd, weight_tk, position_tk, source_r, choice_r)
        ctx.impl = impl
        return gather_sum(rows_rd, position_tk, weight_tk, impl=impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        rows_rd, weight_tk, position_tk, source_r, choice_r = ctx.saved_tensors
        drows_rd = dw_tk = None
        if ctx.needs_input_grad[0]:
            scale_r = gather_rows(weight_tk.reshape(-1, 1), choice_r, impl=ctx.impl).reshape(-1)
            drows_rd = gather_rows(dy_td, source_r, scale_r, impl=ctx.impl)
        if ctx.needs_input_grad[1]:
            dw_tk = gather_dot(rows_rd, position_tk, dy_td, impl=ctx.impl).to(weight_tk.dtype)
        return drows_rd, dw_tk, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
