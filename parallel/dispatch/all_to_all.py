"""All-to-all dispatch of routed tokens to the ranks that hold their experts, and back.

Legend: T tokens of this rank, k choices, R = T * k rows, d hidden, V visible experts, E expert-parallel ranks.
A row is one (token, choice) pair. `dispatch` returns rows grouped by this rank's visible experts and an explicit
handle that `combine` takes; nothing is kept between calls. Faster dispatchers share this interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.kernels.rows.permute import combine as weighted_gather_sum
from moue_dist.kernels.rows.permute import histogram, permute
from moue_dist.parallel.recording.timeline import OFF, Timeline


@dataclass(frozen=True)
class RouteTable:
    """Where one layer's visible experts live, fixed for the run.

    `slot_p[e]` = owner * width + position of expert e among the owner's visible experts; -1 if unseen.
    `width` is the largest number of visible experts on one owner, `mine` how many this rank has.
    """

    slot_p: Tensor
    owners: int
    width: int
    mine: int

    @classmethod
    def build(
        cls, columns: Sequence[int], visible: Sequence[int], owners: int, me: int, device: torch.device
    ) -> RouteTable:
        """`columns[e]` owns e. Columns (0, 1, 0, 1, 0), visible (0, 1, 2, 4), 2 owners -> slots 0, 3, 1, 2."""
        per_owner = [[e for e in visible if columns[e] == r] for r in range(owners)]
        width = max(len(ids) for ids in per_owner)
        slot = torch.full((len(columns),), -1, dtype=torch.int64)
        for r, ids in enumerate(per_owner):
            for i, e in enumerate(ids):
                slot[e] = r * width + i
        return cls(slot.to(device), owners, width, len(per_owner[me]))


@dataclass(frozen=True)
class Handle:
    """What combine needs to undo a dispatch: row order on the source, row order on the owner, split sizes."""

    position_tk: Tensor  # row of each (token, choice) in the source's sorted order
    source_r: Tensor  # token of each sorted row
    slot_r: Tensor  # flattened (token, choice) of each sorted row
    to_source_r: Tensor | None  # for each row as received, its row in expert order (None: one owner)
    from_source_r: Tensor | None
    send: list[int] | None
    receive: list[int] | None


class AllToAllDispatcher:
    """Uneven all-to-all over the expert-parallel group; with one owner the exchange falls away."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.timeline = OFF  # set for the steps that are recorded
        self.owners = group.size() if group is not None else 1

    def dispatch(
        self, x_td: Tensor, ids_tk: Tensor, table: RouteTable
    ) -> tuple[Tensor, Tensor, list[int] | None, Handle]:
        """Rows for this rank's visible experts.

        Returns (rows [R', d] sorted by expert, counts [mine] int64 on the device, the same counts on the host where
        they are known without a further wait, handle). Every rank of the group calls it, also with no tokens.
        """
        tokens, k = ids_tk.shape
        slot = table.slot_p[ids_tk.reshape(-1)]
        slot_r = torch.argsort(slot, stable=True)
        source_r = slot_r // k
        position = torch.empty_like(slot_r)
        position[slot_r] = torch.arange(slot_r.numel(), device=slot_r.device)
        position_tk = position.view(tokens, k)
        counts_ow = histogram(slot, table.owners * table.width).view(table.owners, table.width)
        rows = permute(x_td, source_r, position_tk)
        if self.owners == 1:
            counts = counts_ow[0]
            return rows, counts, None, Handle(position_tk, source_r, slot_r, None, None, None, None)

        theirs_ow = torch.empty_like(counts_ow)
        with self.timeline.span("transfer"):
            dist.all_to_all_single(theirs_ow, counts_ow, group=self.group)
            both = torch.stack([counts_ow, theirs_ow]).cpu()  # the one wait for the device in a layer's forward
        send, receive = both[0].sum(1).tolist(), both[1].sum(1).tolist()
        rows = _Exchange.apply(rows, send, receive, self.group, self.timeline)
        # Received rows are ordered by (source, expert); experts want (expert, source).
        expert_of_row = torch.arange(table.width, device=rows.device).repeat(table.owners)
        expert_of_row = expert_of_row.repeat_interleave(theirs_ow.reshape(-1), output_size=sum(receive))
        from_source_r = torch.argsort(expert_of_row, stable=True)
        to_source_r = torch.empty_like(from_source_r)
        to_source_r[from_source_r] = torch.arange(from_source_r.numel(), device=rows.device)
        rows = permute(rows, from_source_r, to_source_r[:, None])
        counts = theirs_ow.sum(0)[: table.mine]
        handle = Handle(position_tk, source_r, slot_r, to_source_r, from_source_r, send, receive)
        return rows, counts, both[1].sum(0)[: table.mine].tolist(), handle

    def combine(self, rows_rd: Tensor, weight_tk: Tensor, handle: Handle) -> Tensor:
        """y[t] = sum_k weight[t, k] * row of (t, k): the experts' outputs, back on their tokens, [T, d]."""
        if handle.to_source_r is not None and handle.from_source_r is not None:
            rows_rd = permute(rows_rd, handle.to_source_r, handle.from_source_r[:, None])
            rows_rd = _Exchange.apply(rows_rd, handle.receive, handle.send, self.group, self.timeline)
        return weighted_gather_sum(rows_rd, weight_tk, handle.position_tk, handle.source_r, handle.slot_r)


class _Exchange(torch.autograd.Function):
    """all_to_all_single of rows with uneven splits; its gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any, timeline: Timeline) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.timeline = send, receive, group, timeline
        with timeline.span("transfer"):
            return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        with ctx.timeline.span("transfer"):
            return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out
