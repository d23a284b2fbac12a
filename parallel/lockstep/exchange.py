"""Experts at home: all stages' ranks in one all-to-all, in lock step.

Where an expert lives on another stage than the layer that uses it, tokens travel there and back. Time is cut in slots;
in slot t stage s runs forward of microbatch t - s and backward of microbatch t - 2 (PP - 1) - lag + s, and a stage
without work still serves its experts. A *round* is one MoE layer of every stage at once: every rank of the grid runs
the same rounds in the same order, idle ones with no rows.

The clock says which round is due (`clock.py`), the owner computes what arrives (`owner.py`), the wire carries it
(`wire.py`); here is the source's side, and the rounds that join them. What a rank has for experts of its own never
enters a collective: its owner's side takes it from the tokens, and its results go back to them, from where they stand
(`meeting.py`). Under full recompute the source's re-run of a layer needs moe's place in the graph, not its value (a
layer ends in x + moe(norm(x))), so it sends nothing.

Legend: C = PP * EP cells, a cell's rows of the pool padded to n; T tokens of a source, k choices, R = T * k rows, A of
them for others; Q rows at an owner, V of them from others; d hidden. Rows of a source stand by bin, those that stay
first; rows at an owner by source (`meeting.py`) until they are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.rows.pair import gather_pair, gather_sum_pair
from moue_dist.kernels.rows.permute import gather_rows
from moue_dist.parallel.dispatch.routes import RouteTable, RowOrder, key_type, order_rows
from moue_dist.parallel.dispatch.sent import SentBytes
from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.clock import Clock
from moue_dist.parallel.lockstep.meeting import Counts, Meeting
from moue_dist.parallel.lockstep.message import open_message, pack
from moue_dist.parallel.lockstep.owner import Owner
from moue_dist.parallel.lockstep.schedule import LockstepError, Schedule
from moue_dist.parallel.lockstep.wire import Wire, on_host
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.recording.timeline import Timeline


@dataclass(frozen=True)
class _Chosen:
    """What a source remembers of a forward round until the re-run: the experts, and how many rows went to whom."""

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
            cell=cell,
            cells=self.cells,
            expert_parallel=p.expert_parallel,
            backend=backend,
            recompute=recompute,
        )
        self._chosen: dict[tuple[int, int], _Chosen] = {}
        none = torch.empty(0, dtype=torch.int64, device=device)
        self._no_tokens = self.owner.slab.weight.new_empty(0, self.owner.slab.hidden)
        self._no_rows = RowOrder(none, none, none.view(0, 1), none.new_zeros(self.cells, self.owner.width))

    @property
    def sent(self) -> SentBytes:
        return self.wire.sent

    def begin_step(self, timeline: Timeline) -> None:
        self.wire.timeline = timeline

    def make_room(self, group: Any) -> bool:
        return False  # sizes are known before anything is sent

    def layer(self, visible: Sequence[int], index: int) -> LockstepExperts:
        """Its bins: block * width + row in that cell; this cell is block 0, the others follow in their order."""
        p, width, me = self.placement, self.owner.width, self.owner.cell
        bin_p = torch.full((p.pool,), -1, dtype=key_type(self.cells * width))
        rows = {
            c: {e: i for i, e in enumerate(p.rows(c // p.expert_parallel, c % p.expert_parallel))}
            for c in range(self.cells)
        }
        for e in visible:
            c = p.server(e, self.clock.stage) * p.expert_parallel + p.columns[e]
            bin_p[e] = (0 if c == me else c + (c < me)) * width + rows[c][e]
        return LockstepExperts(self, RouteTable(bin_p.to(self.device), self.cells, width, self.owner.held), index)

    # The pipeline's side: a step, and what a stage serves beside its own layers.

    def begin_schedule(self, schedule: Schedule) -> None:
        """Forget a step that broke off, and take the schedule of the next."""
        self.clock.begin_step(schedule)
        self.owner.begin_step()
        self._chosen.clear()

    def serve(self, way: Way, down_to: int = 0) -> None:
        """Run rounds without rows of one's own: all that are due, in backward those of layers >= `down_to`."""
        tokens, order = self._no_tokens, self._no_rows
        no_weight = tokens.new_empty(0, 1, dtype=torch.float32)
        while (j := self.clock.next(way, down_to)) is not None:
            with self.wire.timeline.span("serve"):
                if way == "forward":
                    self.forward_round(j, tokens, no_weight, order)
                else:
                    self.backward_round(j, tokens, tokens, no_weight, order, [0] * (self.cells - 1))

    def end_schedule(self) -> None:
        if self.owner.waiting or self._chosen:
            raise LockstepError(
                f"{self.owner.waiting} kept and {len(self._chosen)} sent rounds never had their backward"
            )

    # The rounds.

    def forward_round(self, j: int, x_td: Tensor, weight_tk: Tensor, order: RowOrder) -> tuple[Tensor, list[int]]:
        """Tokens -> the weighted sums of their experts' outputs, [T, d], and how many rows went to each other cell."""
        clock, wire, counts_bn = self.clock, self.wire, order.counts_ow
        clock.enter("forward", j)
        with clock.turn(("forward", j, "counts")):
            theirs_bn = torch.cat([counts_bn[:1], wire.counts(counts_bn[1:])])
        sent_bn, host_bn = on_host(torch.stack([counts_bn, theirs_bn]))  # the one wait for the device in a round
        (stay, *send), counts = sent_bn.sum(1).tolist(), Counts(theirs_bn, host_bn)
        with clock.turn(("forward", j, "rows")):
            meeting = Meeting.of(counts, self.owner.held, self.owner.cell)
            received_vd = wire.rows("forward", gather_rows(x_td, order.source_r[stay:]), send, meeting.theirs)
            self.owner.keep(j, received_vd, counts)
            tokens_q = meeting.tokens(order.source_r, x_td.shape[0])
            out_qd = self.owner.forward(meeting, gather_pair(x_td, received_vd, tokens_q))
            back_vd = gather_rows(out_qd, meeting.to_expert_q[stay:])
            returned_ad = wire.rows("forward", back_vd, meeting.theirs, send)
        return gather_sum_pair(out_qd, returned_ad, meeting.results(order.position_tk, len(out_qd)), weight_tk), send

    def backward_round(
        self, j: int, x_td: Tensor, dy_td: Tensor, weight_tk: Tensor, order: RowOrder, send: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of a forward round's result -> those of its tokens [T, d], and of the routing weights [T, k] fp32.

        No sizes are exchanged: sources remember theirs, owners find them by the schedule.
        """
        clock, wire = self.clock, self.wire
        clock.enter("backward", j)
        with clock.turn(("backward", j, "rows")):
            returning = self.owner.take(j)
            meeting = Meeting.of(returning.counts, self.owner.held, self.owner.cell)
            stay, theirs, d = meeting.own, meeting.theirs, x_td.shape[1]
            weight_r = weight_tk.reshape(-1)[order.choice_r].float()
            tables = (dy_td, x_td) if self.recompute else (dy_td,)
            out = pack(tables, order.source_r[stay:], weight_r[stay:])
            (dy_vd, *again), weight_v = open_message(wire.rows("backward", out, send, theirs), d, len(tables))
            x_vd = again[0] if again else returning.rows_vd
            tokens_q = meeting.tokens(order.source_r, x_td.shape[0])
            dx_qd, dweight_q = self.owner.backward(
                meeting,
                gather_pair(x_td, x_vd, tokens_q),
                gather_pair(dy_td, dy_vd, tokens_q),
                torch.cat([weight_r[:stay], weight_v])[meeting.from_source_q],
            )
            dweight_s = dweight_q[meeting.to_expert_q]  # by source
            back = pack((dx_qd,), meeting.to_expert_q[stay:], dweight_s[stay:])
            (dx_ad,), dweight_a = open_message(wire.rows("backward", back, theirs, send), d, 1)
        dweight_tk = torch.cat([dweight_s[:stay], dweight_a])[order.position_tk]
        return gather_sum_pair(dx_qd, dx_ad, meeting.results(order.position_tk, len(dx_qd))), dweight_tk

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
        x_td = x_td.contiguous()
        ctx.layer, ctx.order = layer, order_rows(ids_tk, layer.table)
        ctx.save_for_backward(x_td, weight_tk)
        if again is not None:
            ctx.send = exchange.forget(again, j).send
            return torch.zeros_like(x_td)
        y_td, ctx.send = exchange.forward_round(j, x_td, weight_tk, ctx.order)
        exchange.remember(j, _Chosen(ids_tk, ctx.send))
        return y_td

    @staticmethod
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        x_td, weight_tk = ctx.saved_tensors
        dx_td, dweight_tk = ctx.layer.exchange.backward_round(
            ctx.layer.j, x_td, dy_td.contiguous(), weight_tk, ctx.order, ctx.send
        )
        return None, dx_td, dweight_tk.to(weight_tk.dtype), None, None, None
