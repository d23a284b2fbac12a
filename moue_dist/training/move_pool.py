"""Takes the pool of a running system to another placement, between two steps. The planning stands in `planner.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moue_dist.config import Config
from moue_dist.model.build import build_exchange, shared_optimizer
from moue_dist.model.system import System
from moue_dist.parallel.device import settle
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement import moving
from moue_dist.parallel.placement.costs import Floats, stage_use
from moue_dist.parallel.placement.of_config import place_pool, stages_of_moe_layers
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.pool.synced import check_replicas

GIB = 2**30


@dataclass(frozen=True)
class Moved:
    """What a move took: experts whose cells changed, bytes that this rank sent to others and all ranks together."""

    experts: int
    bytes_sent: int
    bytes: int
    seconds: float


def move_by_use(system: System, step: int, counts_lp: torch.Tensor) -> str:
    """Plan from `counts_lp` [L, P], the tokens of each layer and expert, equal on all ranks, and move; collective.

    `step` is the number of finished steps. Returns words for the log.
    """
    config, mesh, old = system.config, system.mesh, system.context.pool.placement
    counts = counts_lp.double().numpy()
    try:
        new = place_pool(config, mesh, counts)
    except ValueError as error:
        return f"kept the placement of the pool: {error}"
    use = _use(config, mesh, counts)
    before, after = (moving.rows_across(p, use) for p in (old, new))
    moved = move_pool(system, new, step)
    return (
        f"placed the pool anew by use: {moved.experts} of {new.pool} experts moved, {moved.bytes / GIB:.3g} GiB "
        f"between ranks, {moved.seconds:.2f} s; rows that another stage computes {before:.1%} -> {after:.1%}"
    )


def _use(config: Config, mesh: Mesh, counts: Floats) -> Floats:
    stages = stages_of_moe_layers(config, mesh)
    return stage_use(config.topology().windows, stages, config.moe.pool, mesh.pipeline, counts)


@torch.no_grad()
def move_pool(system: System, placement: Placement, step: int) -> Moved:
    """Take the system's pool to `placement`: weights, masters, moments; nothing else changes. Collective.

    `step` is the number of finished steps. For experts in lock step with the optimizer's state on the device. The old
    pool is gone afterwards. Raises MoveError where ranks disagree.
    """
    began = time.perf_counter()
    context, mesh, rank, world = system.context, system.mesh, system.rank, system.groups.world
    old, shared = context.pool, system.shared
    assert system.dense.lockstep is not None
    moving.check_same_plan(placement, world, system.device)
    if placement == old.placement:
        return Moved(0, 0, 0, time.perf_counter() - began)

    shared.finish()
    settle()
    timeout = timedelta(seconds=system.config.train.timeout_seconds)
    groups, unused = moving.regroup(system.groups, mesh, rank, old.placement, placement, timeout)
    move = moving.plan_move(old.placement, placement, mesh, old.buffer.row)
    states = [shared.states(i) for i in range(len(shared.buffers))]
    staged = moving.put_aside(move, rank, old.buffer, states[0])
    dtype = old.buffer.weight.dtype
    gone = [tensor for shares in states[0].values() for tensor in shares]
    moving.release([old.buffer.weight, old.buffer.grad, *gone, *(old.fp8.tensors() if old.fp8 else [])])

    pool = ExpertPool(
        placement,
        mesh,
        rank,
        groups,
        hidden=old.hidden,
        width=old.width,
        dtype=dtype,
        device=system.device,
        merge_wgrad=old.sums.layers,
        fp8=old.fp8 is not None,
    )
    shared = shared_optimizer(system.config, [pool.buffer, *shared.buffers[1:]])
    for i, kept in enumerate(states[1:], start=1):
        for name, shares in shared.states(i).items():
            for new, known in zip(shares, kept[name], strict=True):
                new.copy_(known)
    sent = moving.send(move, rank, world, staged, pool.buffer, shared.states(0))
    shared.set_steps(step)
    shared.publish()
    check_replicas(shared.buffers, world)
    dist.barrier(group=world)  # before a group goes, its last messages have arrived
    for group in unused:
        dist.destroy_process_group(group)

    exchange = build_exchange(system.config, mesh, system.coord, pool, groups, system.resolved, system.device)
    system.take_pool(pool, exchange, groups, shared)
    return Moved(move.experts, sent, move.bytes, time.perf_counter() - began)
