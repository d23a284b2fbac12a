"""The order that brings gathered tokens to one rank's experts, found on the device: the reference and its dispatcher.

Every rank of a group has the tokens of all. Each finds the rows, (token, choice) pairs, that meet its own experts, and
their order by expert, without asking the host how many there are: buffers have room for `capacity` rows, and the number
in use stays on the device. The Triton kernel with the same contract stands in `order_triton.py`.

Legend: N gathered tokens, k choices, P pool experts, n experts of this rank that the layer sees, C capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl


class LocalOrder(NamedTuple):
    """Rows of this rank, sorted by expert, among equals by token and choice. Beyond `live` rows nothing is valid."""

    source_c: Tensor  # [C] int32, the token of each row; -1 beyond the live ones
    weight_c: Tensor  # [C] fp32, its routing weight; 0 beyond the live ones
    position_tk: Tensor  # [N, k] int32, the row of each (token, choice); -1 where it is another rank's
    counts_n: Tensor  # [n] int64, rows of each expert
    wanted: Tensor  # [1] int32, rows that there are: more than C where the room was too small
    live: Tensor  # [1] int32, the same, at most C


def order_local(
    ids_tk: Tensor, weight_tk: Tensor, local_p: Tensor, experts: int, capacity: int, impl: Impl | None = None
) -> LocalOrder:
    """The rows of this rank among the choices `ids_tk` of all.

    `local_p` [P] int16: the position of each expert among this rank's `experts`; `experts` for those of others. There
    is never more room than there are choices. Where there are more rows than `capacity`, the last ones are left out,
    and `wanted` says so.
    Example: ids [[0, 1], [1, 2]], local [2, 0, 1], 2 experts, capacity 4 -> source [0, 1, 1, -1],
    position [[-1, 0], [1, 2]], counts [2, 1], live 3.
    """
    capacity = min(capacity, ids_tk.numel())
    key_r = local_p[ids_tk.reshape(-1)]
    sorted_r, choice_r = torch.sort(key_r, stable=True)
    edges = torch.arange(experts, dtype=key_r.dtype, device=key_r.device)
    ends_n = torch.searchsorted(sorted_r, edges, right=True, out_int32=True)
    wanted = ends_n[-1:] if experts else ends_n.new_zeros(1)
    ends_n = ends_n.clamp(max=capacity)
    counts_n = ends_n.diff(prepend=ends_n.new_zeros(1)).long()
    live = ends_n[-1:] if experts else wanted
    if (impl or default_impl(ids_tk.device)) == "triton":
        from moue_dist.kernels.rows import order_triton

        source_c, weight_c, position_tk = order_triton.place(choice_r, weight_tk, live, capacity)
    else:
        source_c, weight_c, position_tk = _place(choice_r, weight_tk, live, capacity)
    return LocalOrder(source_c, weight_c, position_tk, counts_n, wanted, live)


def _place(choice_r: Tensor, weight_tk: Tensor, live: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source_c, weight_c, position_tk) from the order; see `LocalOrder`."""
    k = weight_tk.shape[1]
    row = torch.arange(choice_r.shape[0], dtype=torch.int32, device=choice_r.device)
    position_r = torch.empty_like(row)
    position_r[choice_r] = torch.where(row < live, row, -1)
    first_c = choice_r[:capacity]
    inside = row[:capacity] < live
    source_c = torch.where(inside, (first_c // k).int(), -1)
    weight_c = torch.where(inside, weight_tk.reshape(-1)[first_c].float(), 0.0)
    return source_c, weight_c, position_r.view(weight_tk.shape)
