"""The process groups that megatron-core does not make: the whole world (kept off WORLD) and the pool's replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from moue_dist.parallel.mesh import Mesh

Way = Literal["forward", "backward"]


@dataclass(frozen=True)
class ReplicaGroup:
    """The ranks that hold the same rows: `group` is None for a single rank."""

    group: Any
    size: int
    rank: int


@dataclass(frozen=True)
class Groups:
    """Groups of this rank. `pool` maps a set of holder stages to the replicas of this rank's EP column in them."""

    world: Any
    everyone: ReplicaGroup
    pool: dict[tuple[int, ...], ReplicaGroup]
    grid: dict[
        Way, Any
    ]  # all cells of this rank's replica of the pool, one communicator a direction; empty if not asked


def build_groups(
    mesh: Mesh, rank: int, stage_sets: Sequence[tuple[int, ...]], timeout: timedelta, *, lockstep: bool = False
) -> Groups:
    """Collective: every rank makes every group, in the same order. `new_group` does not inherit the default timeout.

    `lockstep` asks for the grid groups: the cells of all stages, ordered stage by stage, for each expert-data rank.
    """
    world = dist.new_group(list(range(mesh.world)), timeout=timeout)
    me = mesh.coords(rank)
    pool: dict[tuple[int, ...], ReplicaGroup] = {}
    for stages in stage_sets:
        for ep in range(mesh.expert):
            ranks = mesh.expert_cells(stages, ep)
            group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                assert ep == me.ep
                pool[tuple(stages)] = ReplicaGroup(group, len(ranks), ranks.index(rank))
    everyone = ReplicaGroup(world if mesh.world > 1 else None, mesh.world, rank)
    grid: dict[Way, Any] = {}
    ways: tuple[Way, ...] = ("forward", "backward") if lockstep else ()
    for way in ways:
        for edp in range(mesh.expert_data):
            ranks = [mesh.expert_rank(ep, edp, pp) for pp in range(mesh.pipeline) for ep in range(mesh.expert)]
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                grid[way] = group
    return Groups(world, everyone, pool, grid)
