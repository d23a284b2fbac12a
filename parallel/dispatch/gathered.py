"""Experts in the ranks of one stage, a token once for each rank: gather tokens, sum what is here, scatter the sums.

Every rank of the expert-parallel group gets the tokens of all, with their choices and routing weights (all-gather);
computes the rows that meet its experts, sums them by token, weighted; and the ranks' partial sums are added where the
token came from (reduce-scatter). Up to E = k ranks that is no more than the rows of an all-to-all, each of which
travels for itself. The host learns nothing and waits for nothing: how many rows there are stays on the device.

Tokens travel while the router chooses, output gradients while the rows are fetched, and the inputs' gradients while
weight gradients are computed.

Buffers have room for `headroom` times an even share of the rows. Where a layer has more, the last ones are left out
and noted, and the step must be run again with more room (`make_room`): no token is dropped.

Legend: T tokens of this rank, E ranks, N = E T gathered tokens, k choices, C rows with room, d hidden, f expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.experts import weighted
from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.kernels.rows.order import order_local
from moue_dist.kernels.rows.permute import gather_rows, gather_sum
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.recording.timeline import OFF, Timeline

ROOM = 16  # rows: capacities are multiples of it
SPARE = 1.1  # of what a step wanted, the room that its second run has


class Products(Protocol):
    """What is computed with the rows that have come; `kernels.experts.weighted` has the contracts, and is the one."""

    def rows_of(
        self, slab: ExpertSlab, counts_n: Tensor, rows: int, *, backend: ExpertBackend, live: Tensor | None
    ) -> weighted.Rows: ...
    def forward(self, rows: weighted.Rows, x_nd: Tensor, source_c: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def backward(
        self, rows: weighted.Rows, x_cd: Tensor, z_c2f: Tensor | None, dy_nd: Tensor, source_c: Tensor, weight_c: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[], None]]: ...


class GatheredExchange:
    """See `exchange.ExpertExchange`. `recompute`: pre-activations are computed again in backward."""

    sent = None

    def __init__(
        self,
        pool: ExpertPool,
        group: Any,
        *,
        backend: ExpertBackend,
        recompute: bool,
        headroom: float,
        products: Products = weighted,
    ) -> None:
        self.pool, self.group, self.backend, self.recompute, self.headroom = pool, group, backend, recompute, headroom
        self.products = products
        self.ranks = group.size() if group is not None else 1
        self.timeline: Timeline = OFF
        # The largest share of its room that a layer wanted since `make_room` was asked last.
        self._wanted = torch.zeros(1, device=pool.buffer.weight.device)

    def begin_step(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def layer(self, visible: Sequence[int], index: int) -> GatheredExperts:
        placement, me = self.pool.placement, self.pool.ep_rank
        mine = [e for e in visible if placement.columns[e] == me]
        local_p = torch.full((placement.pool,), len(mine), dtype=torch.int16)
        local_p[mine] = torch.arange(len(mine), dtype=torch.int16)
        return GatheredExperts(self, local_p.to(self._wanted.device), self.pool.slab(visible))

    def capacity(self, rows: int) -> int:
        """Room for this rank's part of a layer's rows, where each rank brings `rows` of them."""
        if self.ranks == 1:
            return rows
        return min(math.ceil(rows * self.headroom / ROOM) * ROOM, rows * self.ranks)

    def note(self, wanted: Tensor, capacity: int) -> None:
        """A layer of this rank had `wanted` [1] rows for a room of `capacity`."""
        if self.ranks > 1:
            self._wanted = torch.maximum(self._wanted, wanted / capacity)

    def make_room(self, group: Any) -> bool:
        """Whether any rank of `group` had too little room; if so, all have more from now on (collective, waits)."""
        if self.ranks == 1:
            return False
        dist.all_reduce(self._wanted, dist.ReduceOp.MAX, group=group)
        share = float(self._wanted)
        self._wanted.zero_()
        if share <= 1.0:
            return False
        self.headroom *= share * SPARE
        return True


@dataclass(frozen=True, eq=False)
class GatheredExperts:
    """One layer's experts in the ranks of its stage. `local_p`: see `order.order_local`."""

    exchange: GatheredExchange
    local_p: Tensor
    slab: ExpertSlab

    @cached_property
    def experts(self) -> int:
        return self.slab.count

    def chosen_before(self) -> None:
        """Routers choose again: what leads to a choice is computed as in the first run."""

    def begin(self, x_td: Tensor) -> Arriving:
        return _gather(self.exchange, x_td.detach().contiguous())

    def __call__(self, x_td: Tensor, ids_tk: Tensor, weight_tk: Tensor, begun: Arriving) -> Tensor:
        # The anchor makes sure that backward runs, whatever else needs a gradient: it adds the weight gradients.
        anchor = torch.empty(0, device=x_td.device, requires_grad=True)
        y: Tensor = _Gathered.apply(anchor, x_td, weight_tk, ids_tk, begun, self)
        return y


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x_td: Tensor,  # for its gradient: its values have been sent
        weight_tk: Tensor,
        ids_tk: Tensor,
        begun: Arriving,
        layer: GatheredExperts,
    ) -> Tensor:
        exchange, slab = layer.exchange, layer.slab
        ids_nk, weight_nk = _gather_choices(exchange, ids_tk, weight_tk)
        capacity = exchange.capacity(ids_tk.numel())
        order = order_local(ids_nk, weight_nk, layer.local_p, layer.experts, capacity)
        exchange.note(order.wanted, capacity)
        rows = exchange.products.rows_of(
            slab, order.counts_n, capacity, backend=exchange.backend, live=order.live if exchange.ranks > 1 else None
        )
        x_nd = begun.wait()
        y_cd, z_c2f = exchange.products.forward(rows, x_nd, order.source_c)
        ctx.layer, ctx.rows, ctx.weight_dtype = layer, rows, weight_tk.dtype
        ctx.save_for_backward(
            x_nd, None if exchange.recompute else z_c2f, order.source_c, order.weight_c, order.position_tk
        )
        return _scatter_sum(exchange, gather_sum(y_cd, order.position_tk, weight_nk)).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        exchange, rows = ctx.layer.exchange, ctx.rows
        x_nd, z_c2f, source_c, weight_c, position_nk = ctx.saved_tensors
        dy_nd = _gather(exchange, dy_td.contiguous())
        x_cd = rows.fetch(x_nd, source_c)
        dx_cd, dweight_c, add = exchange.products.backward(rows, x_cd, z_c2f, dy_nd.wait(), source_c, weight_c)
        dweight_nk = gather_rows(dweight_c[:, None], position_nk.reshape(-1)).view(position_nk.shape)
        dweight_tk = _scatter_sum(exchange, dweight_nk)
        dx_td = _scatter_sum(exchange, gather_sum(dx_cd, position_nk))
        add()
        return None, dx_td.wait(), dweight_tk.wait().to(ctx.weight_dtype), None, None, None


@dataclass(frozen=True, eq=False)
class Arriving:
    """A tensor that a collective fills, and what to wait for; the wait is the stream's, not the host's."""

    tensor: Tensor
    work: Any = None
    timeline: Timeline = OFF

    def wait(self) -> Tensor:
        if self.work is not None:
            with self.timeline.span("transfer"):  # as much of it as is waited for
                self.work.wait()
        return self.tensor


def _gather(exchange: GatheredExchange, mine: Tensor) -> Arriving:
    """Every rank's part, one behind the other."""
    if exchange.ranks == 1:
        return Arriving(mine)
    everyone = mine.new_empty(exchange.ranks * mine.shape[0], *mine.shape[1:])
    work = dist.all_gather_into_tensor(everyone, mine, group=exchange.group, async_op=True)
    return Arriving(everyone, work, exchange.timeline)


def _gather_choices(exchange: GatheredExchange, ids_tk: Tensor, weight_tk: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' ids and fp32 weights, in one message: a weight's bits beside its id."""
    if exchange.ranks == 1:
        return ids_tk, weight_tk
    bits_tk = weight_tk.float().contiguous().view(torch.int32)
    both = _gather(exchange, torch.cat([ids_tk.int(), bits_tk], dim=1)).wait()
    ids, bits = both.split(ids_tk.shape[1], dim=1)
    return ids, bits.contiguous().view(torch.float32)


def _scatter_sum(exchange: GatheredExchange, part_nd: Tensor) -> Arriving:
    """Add the ranks' parts; each gets the sum for its own tokens."""
    if exchange.ranks == 1:
        return Arriving(part_nd)
    mine = part_nd.new_empty(part_nd.shape[0] // exchange.ranks, *part_nd.shape[1:])
    work = dist.reduce_scatter_tensor(mine, part_nd, group=exchange.group, async_op=True)
    return Arriving(mine, work, exchange.timeline)
