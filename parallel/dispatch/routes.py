"""Where a layer's experts live, and the order that brings tokens to them: shared by all exchanges.

Legend: T tokens, k choices, R = T * k rows, a row being one (token, choice) pair; V visible experts; O owners. A *bin*
is a visible expert at its owner: owner * width + position among the owner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.rows.permute import histogram


@dataclass(frozen=True)
class RouteTable:
    """Where one layer's visible experts live, fixed while the pool's placement is.

    `bin_p[e]` = owner * width + position of expert e among the owner's experts, in the type of `key_type`; -1 if
    unseen. `width` is the largest number of experts of one owner, `mine` how many this rank has.
    """

    bin_p: Tensor
    owners: int
    width: int
    mine: int

    @classmethod
    def build(
        cls, columns: Sequence[int], visible: Sequence[int], owners: int, me: int, device: torch.device
    ) -> RouteTable:
        """`columns[e]` owns e. Columns (0, 1, 0, 1, 0), visible (0, 1, 2, 4), 2 owners -> bins 0, 3, 1, 2."""
        per_owner = [[e for e in visible if columns[e] == r] for r in range(owners)]
        width = max(len(ids) for ids in per_owner)
        bin_p = torch.full((len(columns),), -1, dtype=key_type(owners * width))
        for r, ids in enumerate(per_owner):
            for i, e in enumerate(ids):
                bin_p[e] = r * width + i
        return cls(bin_p.to(device), owners, width, len(per_owner[me]))


def key_type(bins: int) -> torch.dtype:
    """The narrowest type that holds the bins: sorting takes a pass for every byte of a key."""
    return torch.int16 if bins <= 2**15 else torch.int32


class RowOrder(NamedTuple):
    """Rows sorted by bin. Example, ids [[1, 0], [0, 2]] with bin e for expert e: choice_r 1, 2, 0, 3."""

    choice_r: Tensor  # flattened (token, choice) of each row
    source_r: Tensor  # its token
    position_tk: Tensor  # row of each (token, choice): the inverse of choice_r
    counts_ow: Tensor  # rows of each bin, [owners, width]


def order_rows(ids_tk: Tensor, table: RouteTable) -> RowOrder:
    """The order of a layer's rows by owner and expert; among equals by token and choice."""
    bin_r = table.bin_p[ids_tk.reshape(-1)]
    choice_r = torch.argsort(bin_r, stable=True)
    counts_ow = histogram(bin_r.long(), table.owners * table.width).view(table.owners, table.width)
    return RowOrder(choice_r, choice_r // ids_tk.shape[1], inverse(choice_r).view(ids_tk.shape), counts_ow)


def to_expert_order(counts_ow: Tensor, rows: int, first: int = 0) -> Tensor:
    """Where each row goes from (source, expert) order to expert order.

    Among equals sources stay in their order, but that the first one comes behind `first` others. `counts_ow[o, w]` rows
    came from source o for expert w, `rows` in all. Both orders are sorted, so no sort is needed: the rows of a (source,
    expert) move together. Example: counts [[1, 1], [1, 0]] -> 0, 2, 1, and 1, 2, 0 with `first` 1.
    """
    by_expert = _starts(_insert(counts_ow[1:], counts_ow[:1], first).t()).t()
    if first:
        by_expert = torch.cat([by_expert[first : first + 1], by_expert[:first], by_expert[first + 1 :]])
    moved = by_expert - _starts(counts_ow)
    here = torch.arange(rows, device=counts_ow.device)
    return here + moved.reshape(-1).repeat_interleave(counts_ow.reshape(-1), output_size=rows)


def _insert(rows: Tensor, row: Tensor, at: int) -> Tensor:
    return torch.cat([rows[:at], row, rows[at:]])


def _starts(counts: Tensor) -> Tensor:
    """How many rows stand before those of each entry, entries taken row by row."""
    flat = counts.reshape(-1)
    return (flat.cumsum(0) - flat).view(counts.shape)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`. Example: 1, 2, 0 -> 2, 0, 1."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back
