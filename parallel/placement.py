"""Where the experts of the pool live: a pure function of windows, stages and degrees, printable before a run.

An expert lives on one expert-parallel coordinate, `e % EP`, so that any window of consecutive ids spreads evenly, and
there on one or more pipeline stages, its *holders*. Under `replicate` the holders of an expert are the stages whose
layers see it: each holds a copy, and the copies are extra data-parallel replicas whose gradients are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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

    def rows(self, stage: int, ep_rank: int) -> tuple[int, ...]:
        """Expert ids held by a cell, ascending: row i of the cell's part of the pool is expert rows[i]."""
        return tuple(
            e for e in range(self.pool) if self.columns[e] == ep_rank and stage in self.holders[e]
        )

    def server(self, expert: int, stage: int) -> int:
        """The stage that computes `expert` for tokens of `stage`: itself if it holds a copy, else the nearest holder."""
        return min(self.holders[expert], key=lambda s: (abs(s - stage), s))

    def segments(self, stage: int, ep_rank: int) -> tuple[Segment, ...]:
        """The cell's rows as segments. Holders (0,), (0, 1), (1,), (0, 1) -> on stage 1: [0, 1), [1, 2), [2, 3).

        Cut where the holders change along the whole EP column, not along the cell's own rows: all holders must find
        the same segments, and a stage that lacks what lies between two of them must not join them.
        """
        out: list[Segment] = []
        row, previous = 0, None
        for e in (e for e in range(self.pool) if self.columns[e] == ep_rank):
            stages = self.holders[e]
            if stage in stages:
                if stages == previous:
                    out[-1] = Segment(out[-1].start, row + 1, stages)
                else:
                    out.append(Segment(row, row + 1, stages))
                row += 1
            previous = stages
        return tuple(out)

    def stage_sets(self) -> tuple[tuple[int, ...], ...]:
        """Every distinct set of holders, sorted: one process group for each, made in this order on all ranks."""
        return tuple(sorted(set(self.holders)))


def replicate(
    windows: Sequence[Sequence[int]], stage_of_layer: Sequence[int], pool: int, pipeline: int, expert_parallel: int
) -> Placement:
    """Every stage holds what its MoE layers see.

    `windows[l]` are the ids that MoE layer l sees, `stage_of_layer[l]` its pipeline stage.
    Raises ValueError if the pool does not divide over EP ranks or an expert is seen by no layer.
    """
    if pool % expert_parallel:
        raise ValueError(f"moe.pool={pool} is not divisible by parallel.expert_parallel={expert_parallel}")
    holders: list[set[int]] = [set() for _ in range(pool)]
    for window, stage in zip(windows, stage_of_layer, strict=True):
        for e in window:
            holders[e].add(stage)
    unseen = [e for e, stages in enumerate(holders) if not stages]
    if unseen and windows:
        raise ValueError(
            f"{len(unseen)} experts of moe.pool={pool} (first: {unseen[0]}) are seen by no layer: "
            "enlarge moe.window or moe.stride, or shrink moe.pool"
        )
    columns = tuple(e % expert_parallel for e in range(pool))
    return Placement(pipeline, expert_parallel, tuple(tuple(sorted(stages)) for stages in holders), columns)


def spans(ids: Sequence[int], visible: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where `visible` (ascending) stands in `ids` (ascending), as ranges: ids (0, 2, 4, 6), visible (0, 4, 6) -> ((0, 1), (2, 4))."""
    at = {e: i for i, e in enumerate(ids)}
    out: list[list[int]] = []
    for e in visible:
        i = at[e]
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return tuple((a, b) for a, b in out)
