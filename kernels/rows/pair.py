"""Rows that stand in two tensors, moved as if they stood in one: the plain-PyTorch reference and its dispatcher.

Where a rank's own rows meet the rows of others, nobody need copy them together first: an index tells for each row in
which of the two it stands. The Triton kernels with the same contracts stand in `pair_triton.py`. No gradients.

Legend: A rows of the first tensor, B of the second, r row of the result, t token, k choice, d hidden. An index below A
means a row of the first, one from A on the second's row index - A, and -1 nobody. Rows of the inputs may lie apart in
memory, as those of a part of a wider tensor do; the d numbers of a row may not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl
from moue_dist.kernels.rows import permute


def gather_pair(
    first_ad: Tensor,
    second_bd: Tensor,
    index_r: Tensor,
    *,
    room: int = 0,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y[r] = row index[r] of the two; a row of zeros where index[r] is -1. Returns [max(R, room), d].

    From row R on nothing is written, and the result holds anything. `out` [R, d] is written to instead, if given; its
    rows may lie apart, too. Example: first [[1], [2]], second [[3]], index [2, 0, -1] -> [[3], [1], [0]].
    """
    rows, d = index_r.shape[0], first_ad.shape[1]
    if out is None:
        out = first_ad.new_empty(max(rows, room), d)
    if (impl or default_impl(first_ad.device)) == "triton":
        from moue_dist.kernels.rows import pair_triton

        pair_triton.gather_pair(first_ad, second_bd, index_r, out)
        return out
    out[:rows] = permute.gather_rows(torch.cat([first_ad, second_bd]), index_r, impl="torch")
    return out


def gather_sum_pair(
    first_ad: Tensor, second_bd: Tensor, index_tk: Tensor, weight_tk: Tensor | None = None, impl: Impl | None = None
) -> Tensor:
    """y[t] = sum_k weight[t, k] * row index[t, k] of the two; -1 adds nothing. Returns [T, d] in the rows' dtype.

    Summed in fp32 (fp64 for fp64), choice after choice, as `permute.gather_sum` does.
    Example: first [[1]], second [[10]], index [[0, 1], [1, -1]], weight [[1, .5], [2, 9]] -> [[6], [20]].
    """
    if (impl or default_impl(first_ad.device)) == "triton":
        from moue_dist.kernels.rows import pair_triton

        return pair_triton.gather_sum_pair(first_ad, second_bd, index_tk, weight_tk)
    return permute.gather_sum(torch.cat([first_ad, second_bd]), index_tk, weight_tk, impl="torch")
