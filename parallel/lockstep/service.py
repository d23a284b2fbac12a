"""Experts at home: all stages' ranks in one all-to-all, in lock step.

Where an expert lives on another stage than the layer that uses it, tokens travel there and back. Time is cut in slots;
in slot t stage s runs forward of microbatch t - s and backward of microbatch t - 2 (PP - 1) - lag + s, and a stage
without work still serves its experts. A *round* is one MoE layer of every stage at once: every rank of the grid runs
the same rounds in the same order, idle ones with no rows.

Experts that met in one GEMM forward do not meet in backward, where stages are at other microbatches. So the owner
keeps what it received per (source cell, microbatch, round) and backward regroups it; with full recompute it keeps
nothing and the rows travel once more with their gradients, while the source's re-run needs only moe's place in the
graph, not its value (a layer ends in x + moe(norm(x))).

Legend: C = PP * EP cells, a cell's rows of the pool padded to n; R rows of a source, Q rows at an owner; d hidden.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.kernels.experts.mlp import ExpertSlab, expert_backward, expert_mlp
from moue_dist.kernels.rows.permute import gather_rows, gather_sum, histogram
from moue_dist.parallel.dispatch.all_to_all import RouteTable
from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.schedule import LockstepError, Schedule, Traffic
from moue_dist.parallel.lockstep.turns import Turn, Turns, side_by_side
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.recording.timeline import OFF, Timeline


@dataclass
class _Sent:
    """What a source remembers of a forward round until its backward."""

    ids_tk: Tensor
    send: list[int]


@dataclass
class _Kept:
    """What an owner remembers of one source's forward round: rows (None with recompute) and counts."""

    rows_qd: Tensor | None
    counts_n: list[int]


@dataclass
class ExpertService:
    """Both sides of the rounds on one rank: `exchange` for its own tokens, the rounds for everybody's experts.

    `layers` are the MoE layers of each stage; `slab` is the cell's whole part of the pool. Forward and backward have a
    communicator each. One collective order on all ranks follows from `due`, which is asserted.

    A slot's two directions may run side by side (`begin_together`), each in a thread and on a stream of its own; what
    they share here is by direction, or a dictionary whose entries belong to one microbatch.
    """

    placement: Placement
    stage: int
    ep_rank: int
    layers: tuple[int, ...]
    slab: ExpertSlab
    groups: dict[Way, Any]
    backend: str
    recompute: bool
    device: torch.device
    timeline: Timeline = OFF

    def __post_init__(self) -> None:
        p = self.placement
        self.cells = p.pipeline * p.expert_parallel
        self.cell = self.stage * p.expert_parallel + self.ep_rank
        self.held = [len(p.rows(c // p.expert_parallel, c % p.expert_parallel)) for c in range(self.cells)]
        self.width = max(self.held)
        self.schedule = Schedule(p.pipeline, 1)
        self.slot = 0
        self.due: dict[Way, list[int]] = {"forward": [], "backward": []}
        self._sent_bytes: dict[Way, Traffic] = {"forward": Traffic(), "backward": Traffic()}
        self._turns: Turns | None = None
        self._forward_thread: int | None = None  # where the two directions run side by side
        self._sent: dict[tuple[int, int], _Sent] = {}
        self._kept: dict[tuple[int, int, int], _Kept] = {}
        self.rows_kept_peak = 0

    def table(self, visible: Sequence[int]) -> RouteTable:
        """Slots of a layer's visible experts: cell * width + row in that cell."""
        p = self.placement
        slot = torch.full((p.pool,), -1, dtype=torch.int64)
        rows = {
            c: {e: i for i, e in enumerate(p.rows(c // p.expert_parallel, c % p.expert_parallel))}
            for c in range(self.cells)
        }
        for e in visible:
            c = p.server(e, self.stage) * p.expert_parallel + p.columns[e]
            slot[e] = c * self.width + rows[c][e]
        return RouteTable(slot.to(self.device), self.cells, self.width, self.held[self.cell])

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent."""
        there, back = self._sent_bytes["forward"], self._sent_bytes["backward"]
        return Traffic(
            there.same_cell + back.same_cell, there.same_stage + back.same_stage, there.other_stage + back.other_stage
        )

    # ---------------------------------------------------------------- the clock

    def begin_step(self, schedule: Schedule) -> None:
        """Forget a step that broke off, and take the schedule of the next."""
        self.schedule = schedule
        self._sent.clear()
        self._kept.clear()
        self.due = {"forward": [], "backward": []}
        self._turns = self._forward_thread = None
        self.rows_kept_peak = 0

    def begin(self, way: Way, slot: int) -> None:
        """Open a sub-slot: list the rounds that are due in it, the same on every rank."""
        rounds = range(max(self.layers))
        self.slot = slot
        self.due[way] = list(rounds if way == "forward" else reversed(rounds))

    def begin_together(self) -> Turns:
        """Both sub-slots of the coming slot run side by side: forward in this thread, backward in another."""
        self._turns, self._forward_thread = Turns(side_by_side(max(self.layers))), threading.get_ident()
        return self._turns

    def end_together(self) -> None:
        self._turns = self._forward_thread = None

    def serve(self, way: Way, down_to: int = 0) -> None:
        """Run rounds without rows of one's own: all that are due, in backward those of layers >= `down_to`."""
        while self.due[way] and (way == "forward" or self.due[way][0] >= down_to):
            j = self.due[way][0]
            nothing = self.slab.weight.new_empty(0, self.slab.hidden)
            with self.timeline.span("serve"):
                if way == "forward":
                    no_rows = torch.zeros(self.cells, self.width, dtype=torch.int64, device=self.device)
                    self._forward_round(j, nothing, no_rows)
                else:
                    no_weight = torch.empty(0, dtype=torch.float32, device=self.device)
                    self._backward_round(j, nothing, no_weight, nothing, [0] * self.cells)

    def finish(self, way: Way) -> None:
        """Close a sub-slot."""
        if self.due[way]:
            raise LockstepError(f"slot {self.slot}, stage {self.stage}: {way} rounds {self.due[way]} were left out")

    def end_step(self) -> None:
        if self._kept or self._sent:
            raise LockstepError(f"{len(self._kept)} kept and {len(self._sent)} sent rounds never had their backward")

    def _enter(self, way: Way, j: int) -> None:
        if self.due[way][:1] != [j]:
            due = " and ".join(f"{w} of layer {rounds[0]}" for w, rounds in self.due.items() if rounds) or "nothing"
            raise LockstepError(f"slot {self.slot}, stage {self.stage}: {way} of layer {j} entered, but {due} is due")
        self.due[way].pop(0)

    def _turn(self, turn: Turn) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.take(turn)

    def _at(self, way: Way, stage: int, j: int) -> int | None:
        """The microbatch that `stage` is at in this sub-slot's round j, or None."""
        return self.schedule.microbatch(way, self.slot, stage) if j < self.layers[stage] else None

    # ---------------------------------------------------------------- the source's side

    def replayed(self, j: int) -> Tensor | None:
        """Under recompute: the expert ids that the first run chose, so that a re-run cannot flip one."""
        m = self._replaying(j)
        return None if m is None else self._sent[m, j].ids_tk

    def _replaying(self, j: int) -> int | None:
        """The microbatch whose layer j is being run again for its backward, or None in a first run."""
        if not self.recompute or self.due["backward"][:1] != [j] or self._forward_thread == threading.get_ident():
            return None
        return self.schedule.microbatch("backward", self.slot, self.stage)

    def exchange(self, x_td: Tensor, ids_tk: Tensor, weight_tk: Tensor, table: RouteTable, j: int) -> Tensor:
        """y[t] = sum_k weight[t, k] * expert(x[t]) for stage-local MoE layer j, wherever the experts live; [T, d]."""
        anchor = torch.empty(0, device=x_td.device, requires_grad=True)
        y: Tensor = _Exchange.apply(anchor, x_td, weight_tk, ids_tk, table, j, self)
        return y

    def _forward_round(self, j: int, rows_rd: Tensor, counts_cn: Tensor) -> tuple[Tensor, list[int]]:
        """Rows sorted by slot -> experts' outputs in the same order, and the send sizes."""
        self._enter("forward", j)
        theirs_cn = torch.empty_like(counts_cn)
        with self._turn(("forward", j, "counts")), self.timeline.span("transfer"):
            dist.all_to_all_single(theirs_cn, counts_cn, group=self.groups["forward"])
        self._count("forward", [self.width * counts_cn.element_size()] * self.cells)
        send_cn, got_cn = _on_host(torch.stack([counts_cn, theirs_cn]))  # the one wait for the device in a round
        send, receive = send_cn.sum(1).tolist(), got_cn.sum(1).tolist()
        with self._turn(("forward", j, "rows")):
            return self._serve_forward(j, rows_rd, theirs_cn, got_cn, send, receive), send

    def _serve_forward(
        self, j: int, rows_rd: Tensor, theirs_cn: Tensor, got_cn: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        """A forward round from when the sizes are known: rows in, outputs back."""
        received = self._all_to_all(rows_rd, send, receive, "forward")
        self._keep(j, received, got_cn, receive)
        order = _expert_order(theirs_cn, sum(receive))
        mine = self.held[self.cell]
        counts = got_cn.sum(0)[:mine].tolist()
        with torch.no_grad():
            out = expert_mlp(
                gather_rows(received, order),
                theirs_cn.sum(0)[:mine],
                self.slab,
                backend=self.backend,  # type: ignore[arg-type]
                counts_host=counts,
            )
        return self._all_to_all(gather_rows(out, _inverse(order)), receive, send, "forward")

    def _keep(self, j: int, received: Tensor, got_cn: Tensor, receive: list[int]) -> None:
        if self.schedule.forward_only:
            return
        for cell, part in enumerate(received.split(receive)):
            m = self._at("forward", cell // self.placement.expert_parallel, j)
            if m is None:
                if part.shape[0]:
                    raise LockstepError(
                        f"slot {self.slot}: cell {cell} sent rows of layer {j}, but is idle by schedule"
                    )
                continue
            # A copy of its own: sources free theirs at different slots, and a view would pin the whole buffer.
            rows = None if self.recompute else part.clone()
            self._kept[cell, m, j] = _Kept(rows, got_cn[cell].tolist())
        self.rows_kept_peak = max(
            self.rows_kept_peak, sum(k.rows_qd.shape[0] for k in self._kept.values() if k.rows_qd is not None)
        )

    def _backward_round(
        self, j: int, dy_rd: Tensor, weight_r: Tensor, rows_rd: Tensor, send: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted outputs -> (gradients of rows, of weights), in the source's order.

        No sizes are exchanged: sources remember theirs, owners find them by the schedule.
        """
        self._enter("backward", j)
        with self._turn(("backward", j, "rows")):
            return self._serve_backward(j, dy_rd, weight_r, rows_rd, send)

    def _serve_backward(
        self, j: int, dy_rd: Tensor, weight_r: Tensor, rows_rd: Tensor, send: list[int]
    ) -> tuple[Tensor, Tensor]:
        """A backward round: gradients in, their gradients back."""
        counts, kept = [], []
        for cell in range(self.cells):
            m = self._at("backward", cell // self.placement.expert_parallel, j)
            found = self._kept.pop((cell, m, j)) if m is not None else _Kept(None, [0] * self.width)
            counts.append(found.counts_n)
            kept.append(found.rows_qd)
        receive = [sum(c) for c in counts]
        dy_qd = self._all_to_all(dy_rd, send, receive, "backward")
        weight_q = self._all_to_all(weight_r, send, receive, "backward")
        if self.recompute:
            x_qd = self._all_to_all(rows_rd, send, receive, "backward")
        else:
            x_qd = torch.cat([dy_rd.new_empty(0, self.slab.hidden), *(k for k in kept if k is not None)])
        counts_cn = torch.tensor(counts, dtype=torch.int64)
        mine = self.held[self.cell]
        on_device = counts_cn.to(self.device, non_blocking=True)
        order = _expert_order(on_device, sum(receive))
        dx_qd, dweight_q = expert_backward(
            gather_rows(x_qd, order),
            gather_rows(dy_qd, order),
            weight_q[order],
            on_device.sum(0)[:mine],
            self.slab,
            backend=self.backend,  # type: ignore[arg-type]
            counts_host=counts_cn.sum(0)[:mine].tolist(),
        )
        back = _inverse(order)
        dx_rd = self._all_to_all(gather_rows(dx_qd, back), receive, send, "backward")
        return dx_rd, self._all_to_all(dweight_q[back], receive, send, "backward")

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int], way: Way) -> Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        with self.timeline.span("transfer"):
            dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.groups[way])
        size = math.prod(rows.shape[1:]) * rows.element_size()
        self._count(way, [n * size for n in send])
        return out

    def _count(self, way: Way, send_bytes: list[int]) -> None:
        self._sent_bytes[way].add(send_bytes, self.stage, self.cell, self.placement.expert_parallel)


def _on_host(numbers: Tensor) -> Tensor:
    """A copy on the host. Waits for the current stream alone: another one may have work issued meanwhile."""
    if numbers.device.type != "cuda":
        return numbers
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return there


def _expert_order(counts_cn: Tensor, rows: int) -> Tensor:
    """(source, expert) order -> expert order. Counts [[1, 1], [1, 0]] -> rows 0, 2 (expert 0), 1 (expert 1)."""
    cells, width = counts_cn.shape
    expert = torch.arange(width, device=counts_cn.device).repeat(cells)
    return torch.argsort(expert.repeat_interleave(counts_cn.reshape(-1), output_size=rows), stable=True)


def _inverse(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back


class _Exchange(torch.autograd.Function):
    """A forward round whose backward is a backward round; under recompute the re-run stays at home."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,  # makes sure that backward runs, whatever else needs a gradient
        x_td: Tensor,
        weight_tk: Tensor,
        ids_tk: Tensor,
        table: RouteTable,
        j: int,
        service: ExpertService,
    ) -> Tensor:
        tokens, k = ids_tk.shape
        slot = table.slot_p[ids_tk.reshape(-1)]
        slot_r = torch.argsort(slot, stable=True)
        source_r = slot_r // k
        position_tk = _inverse(slot_r).view(tokens, k)
        ctx.service, ctx.j, ctx.send = service, j, None
        m = service._replaying(j)
        if m is not None:
            ctx.send = service._sent.pop((m, j)).send
            ctx.save_for_backward(x_td, weight_tk, position_tk, source_r, slot_r)
            return torch.zeros_like(x_td)
        counts_cn = histogram(slot, table.owners * table.width).view(table.owners, table.width)
        rows, ctx.send = service._forward_round(j, gather_rows(x_td, source_r), counts_cn)
        if service.recompute and not service.schedule.forward_only:
            at = service.schedule.microbatch("forward", service.slot, service.stage)
            assert at is not None
            service._sent[at, j] = _Sent(ids_tk, ctx.send)
        ctx.save_for_backward(None, weight_tk, position_tk, source_r, slot_r)
        return gather_sum(rows, position_tk, weight_tk)

    @staticmethod
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        x_td, weight_tk, position_tk, source_r, slot_r = ctx.saved_tensors
        dy_td = dy_td.contiguous()
        dy_rd = gather_rows(dy_td, source_r)
        rows_rd = gather_rows(x_td, source_r) if x_td is not None else dy_rd
        weight_r = weight_tk.reshape(-1)[slot_r].float()
        dx_rd, dweight_r = ctx.service._backward_round(ctx.j, dy_rd, weight_r, rows_rd, ctx.send)
        dweight_tk = dweight_r[position_tk].to(weight_tk.dtype)
        return None, gather_sum(dx_rd, position_tk), dweight_tk, None, None, None, None
