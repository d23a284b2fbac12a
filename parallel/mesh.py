"""Degrees -> ranks: the grid of a run as plain arithmetic, without a process group and without torch.

The order is megatron-core's `tp-cp-ep-dp-pp` (parallel_state.py, RankGenerator): tensor fastest, pipeline slowest. One
stage is a plane of `world / pipeline` neighbouring ranks, and the plane is cut in two ways:

    dense grid   rank = tp + TP * (dp + DP * pp)        attention, dense FFN, embedding, head
    expert grid  rank = ep + EP * (edp + EDP * pp)      the pool; expert-tensor parallelism is 1

Example, world 8, pipeline 2, expert 2, tensor 2: rank 6 is (tp 0, dp 1, pp 1) and (ep 0, edp 1, pp 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Degrees(Protocol):
    """What `build_mesh` reads of `ParallelConfig`."""

    @property
    def pipeline_parallel(self) -> int: ...
    @property
    def virtual_stages(self) -> int: ...
    @property
    def expert_parallel(self) -> int: ...
    @property
    def tensor_parallel(self) -> int: ...


@dataclass(frozen=True)
class Coord:
    """One rank's place in both grids."""

    tp: int
    ep: int
    edp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Mesh:
    """The grid of a run. Ranks are global, 0 .. world-1."""

    world: int
    pipeline: int = 1
    expert: int = 1
    tensor: int = 1
    virtual: int = 1  # model chunks per pipeline rank (interleaved schedule)

    @property
    def plane(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel degree of the dense grid: ranks that see different sequences and hold equal dense weights."""
        return self.plane // self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks of one stage that hold the same experts."""
        return self.plane // self.expert

    def coords(self, rank: int) -> Coord:
        """Both grids' coordinates of a rank."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside 0..{self.world - 1}")
        pp, in_plane = divmod(rank, self.plane)
        dp, tp = divmod(in_plane, self.tensor)
        edp, ep = divmod(in_plane, self.expert)
        return Coord(tp=tp, ep=ep, edp=edp, dp=dp, pp=pp)

    def expert_coord(self, rank: int) -> tuple[int, int, int]:
        """(ep, edp, pp) of a rank."""
        c = self.coords(rank)
        return c.ep, c.edp, c.pp

    def dense_rank(self, tp: int, dp: int, pp: int) -> int:
        """The rank at a place of the dense grid."""
        return tp + self.tensor * (dp + self.data * pp)

    def expert_rank(self, ep: int, edp: int, pp: int) -> int:
        """The rank at a place of the expert grid."""
        return ep + self.expert * (edp + self.expert_data * pp)

    def ranks_of_stage(self, pp: int) -> tuple[int, ...]:
        """All ranks of pipeline stage `pp`."""
        return tuple(range(pp * self.plane, (pp + 1) * self.plane))

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that split one dense weight."""
        return [
            [self.dense_rank(t, d, p) for t in range(self.tensor)]
            for p in range(self.pipeline)
            for d in range(self.data)
        ]

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold equal dense weights."""
        return [
            [self.dense_rank(t, d, p) for d in range(self.data)]
            for p in range(self.pipeline)
            for t in range(self.tensor)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that pass activations to each other, stage by stage."""
        return [
            [self.dense_rank(t, d, p) for p in range(self.pipeline)]
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def expert_groups(self) -> list[list[int]]:
        """Ranks of one stage over which its experts are spread: the all-to-all's groups."""
        return [
            [self.expert_rank(e, d, p) for e in range(self.expert)]
            for p in range(self.pipeline)
            for d in range(self.expert_data)
        ]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks of one stage that hold the same experts."""
        return [
            [self.expert_rank(e, d, p) for d in range(self.expert_data)]
            for p in range(self.pipeline)
            for e in range(self.expert)
        ]

    def expert_cells(self, stages: Sequence[int], ep: int) -> list[int]:
        """Ranks that hold the experts which exactly these stages reach, in EP column `ep`: one gradient group."""
        return [self.expert_rank(ep, d, p) for p in sorted(stages) for d in range(self.expert_data)]

    @property
    def first_of_last_stage(self) -> int:
        """The lowest rank that knows the loss."""
        return (self.pipeline - 1) * self.plane


def build_mesh(world: int, parallel: Degrees) -> Mesh:
    """The grid of `world` ranks; raises ValueError, naming the options, where the degrees do not fit."""
    pp, ep, tp = parallel.pipeline_parallel, parallel.expert_parallel, parallel.tensor_parallel
    for name, degree in (("pipeline", pp), ("expert", ep), ("tensor", tp)):
        if degree < 1:
            raise ValueError(f"parallel.{name}_parallel={degree} must be at least 1")
    if parallel.virtual_stages < 1:
        raise ValueError(f"parallel.virtual_stages={parallel.virtual_stages} must be at least 1")
    if world < pp * tp:
        raise ValueError(
            f"too few processes: parallel.pipeline_parallel={pp} x parallel.tensor_parallel={tp} needs at least "
            f"{pp * tp}, but there are {world}; start more or lower a degree"
        )
    if world % (pp * tp):
        raise ValueError(
            f"{world} processes are not a multiple of parallel.pipeline_parallel={pp} x parallel.tensor_parallel={tp} "
            f"= {pp * tp}; start a multiple of that or change a degree"
        )
    plane = world // pp
    if plane < ep:
        raise ValueError(
            f"too few processes: parallel.expert_parallel={ep} needs {ep} ranks in each of the {pp} pipeline stages "
            f"({ep * pp} processes), but there are {plane} a stage ({world} processes); start more or lower it"
        )
    if plane % ep:
        raise ValueError(
            f"parallel.expert_parallel={ep} does not divide the {plane} ranks of a pipeline stage ({world} processes, "
            f"parallel.pipeline_parallel={pp}); choose a divisor of {plane}"
        )
    return Mesh(world=world, pipeline=pp, expert=ep, tensor=tp, virtual=parallel.virtual_stages)


def stage_layout(
    layers: int, pipeline: int, virtual: int = 1, stage_layers: Sequence[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """The 0-based layers of each virtual stage, in model order; virtual stage `v * pipeline + p` is chunk v of rank p.

    `stage_layers` gives the number of layers of each virtual stage; empty means even. Example: 5 layers, pipeline 2,
    stage_layers (3, 2) -> ((0, 1, 2), (3, 4)). Raises ValueError, naming the options, where the numbers do not fit.
    """
    stages = pipeline * virtual
    what = f"parallel.pipeline_parallel={pipeline}" + (f" x parallel.virtual_stages={virtual}" if virtual > 1 else "")
    if layers < stages:
        raise ValueError(
            f"{what} makes {stages} stages, more than model.layers={layers}; every stage needs a layer: "
            f"lower the degrees or add layers"
        )
    counts = tuple(stage_layers)
    if not counts:
        if layers % stages:
            raise ValueError(
                f"model.layers={layers} do not split evenly over {stages} stages ({what}); "
                f"name the layers of each stage in parallel.stage_layers"
            )
        counts = (layers // stages,) * stages
    if len(counts) != stages:
        raise ValueError(
            f"parallel.stage_layers={list(counts)} names {len(counts)} stages, but {what} makes {stages}; "
            f"give one number for each"
        )
    if min(counts) < 1:
        raise ValueError(f"parallel.stage_layers={list(counts)}: every stage needs at least one layer")
    if sum(counts) != layers:
        raise ValueError(
            f"parallel.stage_layers={list(counts)} sums to {sum(counts)}, but model.layers={layers}; make them equal"
        )
    starts = [sum(counts[:i]) for i in range(stages)]
    return tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))


def layers_of_rank(layout: Sequence[Sequence[int]], pipeline: int, pp: int) -> tuple[int, ...]:
    """The 0-based layers that pipeline rank `pp` holds: the union over its chunks, ascending."""
    return tuple(sorted(layer for stage in layout[pp::pipeline] for layer in stage))


def smallest_world(parallel: Degrees) -> int:
    """The fewest processes that a grid fits on: pipeline x lcm(tensor, expert)."""
    return parallel.pipeline_parallel * math.lcm(parallel.tensor_parallel, parallel.expert_parallel)
