"""The owner's side of the rounds: this cell's experts, computed for whoever brought rows.

Rows that met in one GEMM forward do not meet in backward, where stages are at other microbatches. So the owner keeps
what it received per (source, microbatch, round) and backward regroups it. A source here is this rank itself, of whose
rows the tokens are still there and only counts are kept, or the other cells of one stage, which all are at the same
microbatch. With full recompute only counts are kept of those, too: the rows travel once more with their gradients.

Legend: C cells, B = C blocks of rows (`meeting.py`), n a cell's rows of the pool, padded to the largest; Q rows at this
owner, V of them from others; T tokens of this rank; d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_backward, expert_mlp
from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.clock import Clock
from moue_dist.parallel.lockstep.meeting import Counts, Meeting
from moue_dist.parallel.lockstep.schedule import LockstepError


class _Source(NamedTuple):
    """Blocks of rows that come and return together: those of one stage."""

    stage: int
    first: int
    end: int


@dataclass(frozen=True)
class _Kept:
    """What an owner remembers of one source's forward round: rows [_, d] (None: they are not kept here) and counts."""

    rows: Tensor | None
    counts: Counts


class Returning(NamedTuple):
    """A backward round's rows: how many of each expert, and those kept, [V, d] (none if they travel again)."""

    counts: Counts
    rows_vd: Tensor


class Owner:
    """`slab` is the cell's whole part of the pool, `held` its number of experts, `width` the largest of any cell."""

    def __init__(
        self,
        clock: Clock,
        slab: ExpertSlab,
        *,
        held: int,
        width: int,
        cell: int,
        cells: int,
        expert_parallel: int,
        backend: ExpertBackend,
        recompute: bool,
    ) -> None:
        self.clock, self.slab, self.held, self.width = clock, slab, held, width
        self.cell, self.backend, self.recompute = cell, backend, recompute
        self._sources = _sources(cell, cells, expert_parallel)
        zeros = torch.zeros(cells, width, dtype=torch.int64)
        self._none = Counts(zeros.to(slab.weight.device), zeros)
        self._kept: dict[tuple[_Source, int, int], _Kept] = {}
        self.rows_kept_peak = 0

    def begin_step(self) -> None:
        self._kept.clear()
        self.rows_kept_peak = 0

    @property
    def waiting(self) -> int:
        """Rounds whose backward has not come."""
        return len(self._kept)

    def forward(self, meeting: Meeting, x_qd: Tensor) -> Tensor:
        """Outputs [Q, d] of the rows of a round by expert, in the same order."""
        with torch.no_grad():
            return expert_mlp(x_qd, meeting.counts_n, self.slab, backend=self.backend, counts_host=meeting.counts_host)

    def backward(self, meeting: Meeting, x_qd: Tensor, dy_qd: Tensor, weight_q: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of rows [Q, d] and of routing weights [Q], all by expert."""
        return expert_backward(
            x_qd,
            dy_qd,
            weight_q,
            meeting.counts_n,
            self.slab,
            backend=self.backend,
            counts_host=meeting.counts_host,
        )

    def keep(self, j: int, received_vd: Tensor, counts: Counts) -> None:
        """Remember what came for layer j until its backward."""
        if self.clock.schedule.forward_only:
            return
        rows, at = counts.rows, 0
        for source in self._sources:
            m = self._microbatch("forward", source, j)
            mine = sum(rows[source.first : source.end])
            if m is None and mine:
                block = next(b for b in range(source.first, source.end) if rows[b])
                cell = self._cell_of(block)
                raise LockstepError(
                    f"slot {self.clock.slot}: cell {cell} sent rows of layer {j}, but is idle by schedule"
                )
            if m is not None:
                part = None
                if source.first and not self.recompute:
                    part = received_vd[at : at + mine]
                    if mine < received_vd.shape[0]:  # sources free theirs at different slots: a view would pin it all
                        part = part.clone()
                self._kept[source, m, j] = _Kept(part, counts.blocks(source.first, source.end))
            at += mine if source.first else 0
        kept = sum(k.rows.shape[0] for k in self._kept.values() if k.rows is not None)
        self.rows_kept_peak = max(self.rows_kept_peak, kept)

    def take(self, j: int) -> Returning:
        """What was kept of the rows whose backward is due in layer j. Sizes follow from the schedule alone."""
        counts, rows = [], []
        for source in self._sources:
            m = self._microbatch("backward", source, j)
            nothing = _Kept(None, self._none.blocks(source.first, source.end))
            found = nothing if m is None else self._kept.pop((source, m, j))
            counts.append(found.counts)
            rows += [] if found.rows is None else [found.rows]
        empty = self.slab.weight.new_empty(0, self.slab.hidden)
        return Returning(Counts.join(counts), rows[0] if len(rows) == 1 else torch.cat([empty, *rows]))

    def _microbatch(self, way: Way, source: _Source, j: int) -> int | None:
        return self.clock.at(way, source.stage, j)

    def _cell_of(self, block: int) -> int:
        return self.cell if block == 0 else block - 1 if block <= self.cell else block


def _sources(cell: int, cells: int, expert_parallel: int) -> list[_Source]:
    """This cell alone, then the other cells, stage by stage. Example, cell 1 of 4, two a stage: (0, 0, 1), (0, 1, 2),
    (1, 2, 4)."""
    found, block = [_Source(cell // expert_parallel, 0, 1)], 1
    for stage in range(cells // expert_parallel):
        end = block + expert_parallel - (stage == cell // expert_parallel)
        if end > block:
            found.append(_Source(stage, block, end))
        block = end
    return found
