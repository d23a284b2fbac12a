"""Where the experts of the pool live: who holds which rows, in what order, and shared with whom. Free of torch.

An expert lives in one column (expert-parallel coordinate) and there on one or more pipeline stages, its *holders*.
Each holds a copy, and the copies are extra data-parallel replicas whose gradients are summed. `planner.py` chooses
holders and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segment:
    """A run of rows `[start, stop)` of one cell whose experts have the same holders.

    All holders have the same rows in the same order there, so a segment is one buffer to reduce and gather.
    """

    start: int
    stop: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Who holds every expert. A *cell* is a (stage, EP rank) pair and holds the same rows on all of its data ranks."""

    pipeline: int
    expert_parallel: int
    holders: tuple[tuple[int, ...], ...]  # expert -> sorted pipeline stages that hold a copy
    columns: tuple[int, ...]  # expert -> EP rank of all its copies

    @property
    def pool(self) -> int:
        return len(self.holders)

    @cached_property
    def _ids(self) -> tuple[tuple[int, ...], ...]:
        """Expert ids of each column, ascending."""
        ids: list[list[int]] = [[] for _ in range(self.expert_parallel)]
        for e, column in enumerate(self.columns):
            ids[column].append(e)
        return tuple(map(tuple, ids))

    def rows(self, stage: int, ep_rank: int) -> tuple[int, ...]:
        """Expert ids held by a cell, ascending: row i of the cell's part of the pool is expert rows[i]."""
        return tuple(e for e in self._ids[ep_rank] if stage in self.holders[e])

    def server(self, expert: int, stage: int) -> int:
        """The stage that computes `expert` for tokens of `stage`: itself if it holds a copy, else the nearest."""
        return min(self.holders[expert], key=lambda s: (abs(s - stage), s))

    @cached_property
    def _runs(self) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
        out = []
        for ids in self._ids:
            lengths: list[int] = []
            sets: list[tuple[int, ...]] = []
            newest = [-1] * self.pipeline  # the run in which a stage's newest row stands
            for e in ids:
                stages = self.holders[e]
                run = newest[stages[0]] if stages else -1
                if run >= 0 and sets[run] == stages and all(newest[s] == run for s in stages):
                    lengths[run] += 1
                    continue
                for s in stages:
                    newest[s] = len(sets)
                lengths.append(1)
                sets.append(stages)
            out.append(tuple(zip(lengths, sets, strict=True)))
        return tuple(out)

    def column_runs(self, ep_rank: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(rows, holders) of every segment in one column, each named once and not once a holder."""
        return self._runs[ep_rank]

    def segments(self, stage: int, ep_rank: int) -> tuple[Segment, ...]:
        """The cell's rows as segments. Holders (0,), (0, 1), (1,), (0, 1) -> on stage 1: [0, 1), [1, 2), [2, 3).

        A row joins the segment before it where the holders are the same and none of them has another row in between:
        so all holders find the same segments. Holders (0,), (1,), (0,) -> on stage 0: [0, 2).
        """
        out, row = [], 0
        for length, stages in self._runs[ep_rank]:
            if stage in stages:
                out.append(Segment(row, row + length, stages))
                row += length
        return tuple(out)

    def stage_sets(self) -> tuple[tuple[int, ...], ...]:
        """Every distinct set of holders, sorted: one process group for each, made in this order on all ranks."""
        return tuple(sorted(set(self.holders)))


def common_pieces(segment_rows: Iterable[tuple[int, int]], row: int) -> int:
    """How many pieces a row of `row` numbers is cut in so that every replica of every segment can get a share.

    `segment_rows` are (rows, replicas) of all segments of all ranks: with at least as many rows as replicas, whole
    rows (1 piece); otherwise the next power of two that gives each replica a piece, as far as it divides the row.
    """
    need = max((math.ceil(replicas / rows) for rows, replicas in segment_rows if rows), default=1)
    pieces = 1
    while pieces < need and row % (pieces * 2) == 0:
        pieces *= 2
    return pieces


def pieces_of_a_row(placement: Placement, expert_data: int, row: int) -> int:
    """The pieces of a row of `row` numbers, from all segments of all cells: every rank finds the same number.

    `expert_data` are the ranks that hold the same cell.
    """
    runs = {
        (rows, len(stages) * expert_data)
        for ep in range(placement.expert_parallel)
        for rows, stages in placement.column_runs(ep)
        if stages
    }
    return common_pieces(runs, row)


def replicate(
    windows: Sequence[Sequence[int]], stage_of_layer: Sequence[int], pool: int, pipeline: int, expert_parallel: int
) -> Placement:
    """Every stage holds what its MoE layers see.

    `windows[l]` are the ids that MoE layer l sees, `stage_of_layer[l]` its pipeline stage.
    Raises ValueError if the pool does not divide over EP ranks or an expert is seen by no layer.
    """
    if pool % expert_parallel:
        raise ValueError(f"moe.pool={pool} is not divisible by parallel.expert_parallel={expert_parallel}")
    seen: list[set[int]] = [set() for _ in range(pipeline)]
    for window, stage in zip(windows, stage_of_layer, strict=True):
        seen[stage].update(window)
    holders: list[list[int]] = [[] for _ in range(pool)]
    for stage, ids in enumerate(seen):
        for e in ids:
            holders[e].append(stage)
    unseen = [e for e, stages in enumerate(holders) if not stages]
    if unseen and windows:
        raise ValueError(
            f"{len(unseen)} experts of moe.pool={pool} (first: {unseen[0]}) are seen by no layer: "
            "enlarge moe.window or moe.stride, or shrink moe.pool"
        )
    columns = tuple(e % expert_parallel for e in range(pool))
    return Placement(pipeline, expert_parallel, tuple(map(tuple, holders)), columns)


def spans(ids: Sequence[int], visible: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where `visible` stands in `ids`, as ranges; both ascend. Ids 0, 2, 4, 6, visible 0, 4, 6 -> (0, 1), (2, 4)."""
    at = {e: i for i, e in enumerate(ids)}
    out: list[list[int]] = []
    for e in visible:
        i = at[e]
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return tuple((a, b) for a, b in out)
