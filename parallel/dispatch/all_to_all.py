"""All-to-all dispatch of routed tokens to the ranks that hold their experts, and back: the reference for all others.

Legend: T tokens of this rank, k choices, R = T * k rows, d hidden, V visible experts, E expert-parallel ranks.
A row is one (token, choice) pair. `dispatch` returns rows grouped by this rank's visible experts and an explicit
handle that `combine` takes; nothing is kept between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.kernels.rows.permute import combine as weighted_gather_sum
from moue_dist.kernels.rows.permute import permute
from moue_dist.parallel.dispatch.routes import RouteTable, RowOrder, inverse, order_rows, to_expert_order
from moue_dist.parallel.recording.timeline import OFF, Timeline


@dataclass(frozen=True)
class Handle:
    """What combine needs to undo a dispatch: row order on the source, row order on the owner, split sizes."""

    order: RowOrder
    to_source_r: Tensor | None = None  # for each row as received, its row in expert order (None: one owner)
    from_source_r: Tensor | None = None
    send: list[int] | None = None
    receive: list[int] | None = None


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
        order = order_rows(ids_tk, table)
        rows = permute(x_td, order.source_r, order.position_tk)
        if self.owners == 1:
            return rows, order.counts_ow[0], None, Handle(order)

        theirs_ow = torch.empty_like(order.counts_ow)
        with self.timeline.span("transfer"):
            dist.all_to_all_single(theirs_ow, order.counts_ow, group=self.group)
            both = torch.stack([order.counts_ow, theirs_ow]).cpu()  # the one wait for the device in a layer's forward
        send, receive = both[0].sum(1).tolist(), both[1].sum(1).tolist()
        rows = _AllToAll.apply(rows, send, receive, self.group, self.timeline)
        to_source_r = to_expert_order(theirs_ow, sum(receive))
        from_source_r = inverse(to_source_r)
        rows = permute(rows, from_source_r, to_source_r[:, None])
        counts = theirs_ow.sum(0)[: table.mine]
        handle = Handle(order, to_source_r, from_source_r, send, receive)
        return rows, counts, both[1].sum(0)[: table.mine].tolist(), handle

    def combine(self, rows_rd: Tensor, weight_tk: Tensor, handle: Handle) -> Tensor:
        """y[t] = sum_k weight[t, k] * row of (t, k): the experts' outputs, back on their tokens, [T, d]."""
        if handle.to_source_r is not None and handle.from_source_r is not None:
            rows_rd = permute(rows_rd, handle.to_source_r, handle.from_source_r[:, None])
            rows_rd = _AllToAll.apply(rows_rd, handle.receive, handle.send, self.group, self.timeline)
        order = handle.order
        return weighted_gather_sum(rows_rd, weight_tk, order.position_tk, order.source_r, order.choice_r)


class _AllToAll(torch.autograd.Function):
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
