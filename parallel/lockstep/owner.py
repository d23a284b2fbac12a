"""The owner's side of the rounds: this cell's experts, computed for whoever sent rows.

Rows that met in one GEMM forward do not meet in backward, where stages are at other microbatches. So the owner keeps
what it received per (source cell, microbatch, round) and backward regroups it; with full recompute it keeps counts
alone, and the rows travel once more with their gradients.

Legend: C cells, n a cell's rows of the pool, padded to the largest; Q rows at this owner; d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_backward, expert_mlp
from moue_dist.kernels.rows.permute import gather_rows
from moue_dist.parallel.dispatch.routes import inverse, order_by_expert
from moue_dist.parallel.lockstep.clock import Clock
from moue_dist.parallel.lockstep.schedule import LockstepError


@dataclass(frozen=True)
class _Kept:
    """What an owner remembers of one source's forward round: rows (None with recompute) and counts."""

    rows_qd: Tensor | None
    counts_n: list[int]


class Returning(NamedTuple):
    """A backward round's rows, by source cell: how many of each expert, and the rows that were kept."""

    counts_cn: list[list[int]]
    kept: list[Tensor]

    @property
    def receive(self) -> list[int]:
        return [sum(counts_n) for counts_n in self.counts_cn]


class Owner:
    """`slab` is the cell's whole part of the pool, `held` its number of experts, `width` the largest of any cell."""

    def __init__(
        self,
        clock: Clock,
        slab: ExpertSlab,
        *,
        held: int,
        width: int,
        cells: int,
        expert_parallel: int,
        backend: ExpertBackend,
        recompute: bool,
    ) -> None:
        self.clock, self.slab, self.held, self.width = clock, slab, held, width
        self._cells, self._expert_parallel, self.backend, self.recompute = cells, expert_parallel, backend, recompute
        self._kept: dict[tuple[int, int, int], _Kept] = {}
        self.rows_kept_peak = 0

    def begin_step(self) -> None:
        self._kept.clear()
        self.rows_kept_peak = 0

    @property
    def waiting(self) -> int:
        """Rounds whose backward has not come."""
        return len(self._kept)

    def forward(self, j: int, received: Tensor, theirs_cn: Tensor, got_cn: Tensor, receive: list[int]) -> Tensor:
        """Outputs of `received` [Q, d], ordered by source as these are; `got_cn` is `theirs_cn` on the host."""
        self.keep(j, received, got_cn, receive)
        order = order_by_expert(theirs_cn, sum(receive))
        with torch.no_grad():
            out = expert_mlp(
                gather_rows(received, order),
                theirs_cn.sum(0)[: self.held],
                self.slab,
                backend=self.backend,
                counts_host=got_cn.sum(0)[: self.held].tolist(),
            )
        return gather_rows(out, inverse(order))

    def keep(self, j: int, received: Tensor, got_cn: Tensor, receive: list[int]) -> None:
        """Remember what came for layer j until its backward."""
        if self.clock.schedule.forward_only:
            return
        for cell, part in enumerate(received.split(receive)):
            m = self._at("forward", cell, j)
            if m is None:
                if part.shape[0]:
                    raise LockstepError(
                        f"slot {self.clock.slot}: cell {cell} sent rows of layer {j}, but is idle by schedule"
                    )
                continue
            # A copy of its own: sources free theirs at different slots, and a view would pin the whole buffer.
            rows = None if self.recompute else part.clone()
            self._kept[cell, m, j] = _Kept(rows, got_cn[cell].tolist())
        kept = sum(k.rows_qd.shape[0] for k in self._kept.values() if k.rows_qd is not None)
        self.rows_kept_peak = max(self.rows_kept_peak, kept)

    def take(self, j: int) -> Returning:
        """What was kept of the rows whose backward is due in layer j. Sizes follow from the schedule alone."""
        counts, kept = [], []
        for cell in range(self._cells):
            m = self._at("backward", cell, j)
            found = self._kept.pop((cell, m, j)) if m is not None else _Kept(None, [0] * self.width)
            counts.append(found.counts_n)
            kept += [] if found.rows_qd is None else [found.rows_qd]
        return Returning(counts, kept)

    def backward(
        self, returning: Returning, x_qd: Tensor | None, dy_qd: Tensor, weight_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of rows [Q, d] and of routing weights [Q], ordered by source. `x_qd`: the rows, where not kept."""
        if x_qd is None:
            x_qd = torch.cat([dy_qd.new_empty(0, self.slab.hidden), *returning.kept])
        counts_cn = torch.tensor(returning.counts_cn, dtype=torch.int64)
        on_device = counts_cn.to(dy_qd.device, non_blocking=True)
        order = order_by_expert(on_device, dy_qd.shape[0])
        dx_qd, dweight_q = expert_backward(
            gather_rows(x_qd, order),
            gather_rows(dy_qd, order),
            weight_q[order],
            on_device.sum(0)[: self.held],
            self.slab,
            backend=self.backend,
            counts_host=counts_cn.sum(0)[: self.held].tolist(),
        )
        back = inverse(order)
        return gather_rows(dx_qd, back), dweight_q[back]

    def _at(self, way: str, cell: int, j: int) -> int | None:
        return self.clock.at(way, cell // self._expert_parallel, j)  # type: ignore[arg-type]
