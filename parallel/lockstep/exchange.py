"""Experts at home: all stages' ranks in one all-to-all, in lock step.

Where an expert lives on another stage than the layer that uses it, tokens travel there and back. Time is cut in slots;
in slot t stage s runs forward of microbatch t - s and backward of microbatch t - 2 (PP - 1) - lag + s, and a stage
without work still serves its experts. A *round* is one MoE layer of every stage at once: every rank of the grid runs
the same rounds in the same order, idle ones with no rows.

The clock says which round is due (`clock.py`), the owner computes what arrives (`owner.py`), the wire carries it
(`wire.py`); here is the source's side, and the rounds that join them. Under full recompute the source's re-run of a
layer needs moe's place in the graph, not its value (a layer ends in x + moe(norm(x))), so it sends nothing.

Legend: C = PP * EP cells, a cell's rows of the pool padded to n; R rows of a source, Q rows at an owner; d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.rows.permute import gather_rows, gather_sum
from moue_dist.parallel.dispatch.routes import RouteTable, order_rows
from moue_dist.parallel.dispatch.sent import SentBytes
from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.clock import Clock
from moue_dist.parallel.lockstep.owner import Owner
from moue_dist.parallel.lockstep.schedule import LockstepError, Schedule
from moue_dist.parallel.lockstep.wire import Wire, on_host
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.recording.timeline import Timeline


@dataclass(frozen=True)
class _Chosen:
    """What a source remembers of a forward round until the re-run: the experts, and how many rows went where."""

    ids_tk: Tensor
    send: list[int]


class LockstepExchange:
    """One rank's rounds: `layer` for its own tokens, `serve` for everybody's experts. See `ExpertExchange`.

    `layers` are the MoE layers of each stage. Forward and backward have a communicator each, and may run side by side,
    each in a thread and on a stream of its own; what they share here is by direction, or a dictionary whose entries
    belong to one microbatch.
    """

    def __init__(
        self,
        pool: ExpertPool,
        stage: int,
        layers: tuple[int, ...],
        groups: dict[Way, Any],
        *,
        backend: ExpertBackend,
        recompute: bool,
        device: torch.device,
    ) -> None:
        p: Placement = pool.placement
        self.placement, self.ep_rank, self.device, self.recompute = p, pool.ep_rank, device, recompute
        self.cells = p.pipeline * p.expert_parallel
        cell = stage * p.expert_parallel + pool.ep_rank
        held = [len(p.rows(c // p.expert_parallel, c % p.expert_parallel)) for c in range(self.cells)]
        self.clock = Clock(stage, layers)
        self.wire = Wire(groups, cell, self.cells, p.expert_parallel)
        self.owner = Owner(
            self.clock,
            pool.slab(pool.ids),
            held=held[cell],
            width=max(held),
            cells=self.cells,
            expert_parallel=p.expert_parallel,
            backend=backend,
            recompute=recompute,
        )
        self._chosen: dict[tuple[int, int], _Chosen] = {}

    @property
    def sent(self) -> SentBytes:
        return self.wire.sent

    def begin_step(self, timeline: Timeline) -> None:
        self.wire.timeline = timeline

    def make_room(self, group: Any) -> bool:
        return False  # sizes are known before anything is sent

    def layer(self, visible: Sequence[int], index: int) -> LockstepExperts:
        """Its bins: cell * width + row in that cell."""
        p, width = self.placement, self.owner.width
        bin_p = torch.full((p.pool,), -1, dtype=torch.int64)
        rows = {
            c: {e: i for i, e in enumerate(p.rows(c // p.expert_parallel, c % p.expert_parallel))}
            for c in range(self.cells)
        }
        for e in visible:
            c = p.server(e, self.clock.stage) * p.expert_parallel + p.columns[e]
            bin_p[e] = c * width + rows[c][e]
        return LockstepExperts(self, RouteTable(bin_p.to(self.device), self.cells, width, self.owner.held), index)

    # The pipeline's side: a step, and what a stage serves beside its own layers.

    def begin_schedule(self, schedule: Schedule) -> None:
        """Forget a step that broke off, and take the schedule of the next."""
        self.clock.begin_step(schedule)
        self.owner.begin_step()
        self._chosen.clear()

    def serve(self, way: Way, down_to: int = 0) -> None:
        """Run rounds without rows of one's own: all that are due, in backward those of layers >= `down_to`."""
        while (j := self.clock.next(way, down_to)) is not None:
            nothing = self.owner.slab.weight.new_empty(0, self.owner.slab.hidden)
            with self.wire.timeline.span("serve"):
                if way == "forward":
                    no_rows = torch.zeros(self.cells, self.owner.width, dtype=torch.int64, device=self.device)
                    self.forward_round(j, nothing, no_rows)
                else:
                    no_weight = torch.empty(0, dtype=torch.float32, device=self.device)
                    self.backward_round(j, nothing, no_weight, nothing, [0] * self.cells)

    def end_schedule(self) -> None:
        if self.owner.waiting or self._chosen:
            raise LockstepError(
                f"{self.owner.waiting} kept and {len(self._chosen)} sent rounds never had their backward"
            )

    # The rounds.

    def forward_round(self, j: int, rows_rd: Tensor, counts_cn: Tensor) -> tuple[Tensor, list[int]]:
        """Rows sorted by bin -> experts' outputs in the same order, and the send sizes."""
        clock, wire = self.clock, self.wire
        clock.enter("forward", j)
        with clock.turn(("forward", j, "counts")):
            theirs_cn = wire.counts(counts_cn)
        send_cn, got_cn = on_host(torch.stack([counts_cn, theirs_cn]))  # the one wait for the device in a round
        send, receive = send_cn.sum(1).tolist(), got_cn.sum(1).tolist()
        with clock.turn(("forward", j, "rows")):
            received = wire.rows("forward", rows_rd, send, receive)
            out = self.owner.forward(j, received, theirs_cn, got_cn, receive)
            return wire.rows("forward", out, receive, send), send

    def backward_round(
        self, j: int, dy_rd: Tensor, weight_r: Tensor, rows_rd: Tensor, send: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted outputs -> (gradients of rows, of weights), in the source's order.

        No sizes are exchanged: sources remember theirs, owners find them by the schedule.
        """
        clock, wire = self.clock, self.wire
        clock.enter("backward", j)
        with clock.turn(("backward", j, "rows")):
            returning = self.owner.take(j)
            receive = returning.receive
            dy_qd = wire.rows("backward", dy_rd, send, receive)
            weight_q = wire.rows("backward", weight_r, send, receive)
            x_qd = wire.rows("backward", rows_rd, send, receive) if self.recompute else None
            dx_qd, dweight_q = self.owner.backward(returning, x_qd, dy_qd, weight_q)
            dx_rd = wire.rows("backward", dx_qd, receive, send)
            return dx_rd, wire.rows("backward", dweight_q, receive, send)

    # What a layer's re-run needs of its first run.

    def running_again(self, j: int) -> int | None:
        """The microbatch whose layer j is being run again for its backward, or None in a first run.

        Full recompute runs every layer first without a graph and again with one, so grad mode tells which it is; in
        which thread autograd re-runs a layer is autograd's affair.
        """
        if not self.recompute or not torch.is_grad_enabled():
            return None
        return self.clock.at("backward", self.clock.stage, j)

    def remember(self, j: int, chosen: _Chosen) -> None:
        """In a first run: keep its choice for the re-run."""
        if self.recompute and not self.clock.schedule.forward_only:
            m = self.clock.at("forward", self.clock.stage, j)
            assert m is not None
            self._chosen[m, j] = chosen

    def chosen(self, m: int, j: int) -> _Chosen:
        return self._chosen[m, j]

    def forget(self, m: int, j: int) -> _Chosen:
        return self._chosen.pop((m, j))


@dataclass(frozen=True, eq=False)
class LockstepExperts:
    """Stage-local MoE layer `j`'s experts, on whatever stage they live."""

    exchange: LockstepExchange
    table: RouteTable
    j: int

    def chosen_before(self) -> Tensor | None:
        """Under recompute: the expert ids that the first run chose, so that rounding cannot flip one in a re-run."""
        m = self.exchange.running_again(self.j)
        return None if m is None else self.exchange.chosen(m, self.j).ids_tk

    def begin(self, x_td: Tensor) -> None:
        """Rows follow from the choice."""

    def __call__(self, x_td: Tensor, ids_tk: Tensor, weight_tk: Tensor, begun: None = None) -> Tensor:
        # The anchor makes sure that backward runs, whatever else needs a gradient.
        anchor = torch.empty(0, device=x_td.device, requires_grad=True)
        y: Tensor = _Rounds.apply(anchor, x_td, weight_tk, ids_tk, self, self.exchange.running_again(self.j))
        return y


class _Rounds(torch.autograd.Function):
    """A forward round whose backward is a backward round; under recompute the re-run stays at home."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x_td: Tensor,
        weight_tk: Tensor,
        ids_tk: Tensor,
        layer: LockstepExperts,
        again: int | None,  # the microbatch that runs again
    ) -> Tensor:
        exchange, j = layer.exchange, layer.j
        order = order_rows(ids_tk, layer.table)
        ctx.layer = layer
        if again is not None:
            ctx.send = exchange.forget(again, j).send
            ctx.save_for_backward(x_td, weight_tk, order.position_tk, order.source_r, order.choice_r)
            return torch.zeros_like(x_td)
        rows, ctx.send = exchange.forward_round(j, gather_rows(x_td, order.source_r), order.counts_ow)
        exchange.remember(j, _Chosen(ids_tk, ctx.send))
        ctx.save_for_backward(None, weight_tk, order.position_tk, order.source_r, order.choice_r)
        return gather_sum(rows, order.position_tk, weight_tk)

    @staticmethod
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        x_td, weight_tk, position_tk, source_r, choice_r = ctx.saved_tensors
        dy_rd = gather_rows(dy_td.contiguous(), source_r)
        rows_rd = gather_rows(x_td, source_r) if x_td is not None else dy_rd
        weight_r = weight_tk.reshape(-1)[choice_r].float()
        exchange = ctx.layer.exchange
        dx_rd, dweight_r = exchange.backward_round(ctx.layer.j, dy_rd, weight_r, rows_rd, ctx.send)
        dweight_tk = dweight_r[position_tk].to(weight_tk.dtype)
        return None, gather_sum(dx_rd, position_tk), dweight_tk, None, None, None
