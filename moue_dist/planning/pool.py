"""The pool's part of a dry run: what its placement sends in a step, and how the other placements would do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from moue_dist.config import Config, ConfigError
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import Floats, Traffic, cell_bytes, row_wire_bytes, stage_use, step_traffic
from moue_dist.parallel.placement.of_config import expert_bytes, place_pool, stages_of_moe_layers
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.placement.planner import Kind
from moue_dist.planning.memory.in_flight import lock_step_lag
from moue_dist.planning.memory.sizes import GIB
from moue_dist.refusals.fp8 import check_fp8
from moue_dist.refusals.machine import Resolved
from moue_dist.refusals.placement import check_placement


@dataclass(frozen=True)
class Choice:
    """One placement of the comparison. `pool_bytes` are the fullest rank's, `across_bytes` all ranks' in a step."""

    placement: str
    budget_gib: float
    pool_bytes: int
    across_bytes: int
    refused: bool  # with the rest of this configuration


@dataclass(frozen=True)
class PoolPlan:
    """The chosen placement's traffic in one step of all `world` ranks, and the comparison."""

    placement: str
    world: int
    replica_groups: int  # distinct sets of stages that hold the same experts
    traffic: Traffic
    choices: tuple[Choice, ...]


def build_pool_plan(
    config: Config, mesh: Mesh, placement: Placement, resolved: Resolved, use: Floats | None = None
) -> PoolPlan:
    """`placement` is the configuration's own; `use` [L, P] are measured tokens, None an even spread."""
    return PoolPlan(
        placement=config.parallel.placement,
        world=mesh.world,
        replica_groups=len(placement.stage_sets()),
        traffic=expected_traffic(config, mesh, placement, use),
        choices=tuple(_choices(config, mesh, resolved, use)) if mesh.pipeline > 1 else (),
    )


def expected_traffic(config: Config, mesh: Mesh, placement: Placement, use: Floats | None = None) -> Traffic:
    """Bytes of one training step, with the layers' tokens spread like `use` [L, P], or evenly over each window."""
    p, t, topology = config.parallel, config.train, config.topology()
    stages = stages_of_moe_layers(config, mesh)
    layers = Counter(stages)
    lock_step, recompute = lock_step_lag(config) is not None, p.recompute == "full"
    each = expert_bytes(config)
    return step_traffic(
        placement,
        stage_use(topology.windows, stages, placement.pool, mesh.pipeline, use),
        rows=t.global_batch_size * config.model.sequence_length * config.moe.top_k,
        row_bytes=row_wire_bytes(config.model.hidden_size, each.weight, lock_step=lock_step, recompute=recompute),
        layers=[layers[s] for s in range(mesh.pipeline)],
        microbatches=t.global_batch_size // (t.micro_batch_size * mesh.data),
        each=each,
        expert_data=mesh.expert_data,
        lock_step=lock_step,
        recompute=recompute,
        window=topology.window,
    )


def pool_bytes(config: Config, mesh: Mesh, placement: Placement) -> int:
    """Weights, gradients and optimizer state of the pool on the fullest rank."""
    parts = cell_bytes(placement, expert_bytes(config), mesh.expert_data)
    return int((parts["weights"] + parts["gradients"] + parts["optimizer"]).max())


def with_placement(config: Config, placement: Kind, budget_gib: float = 0.0) -> Config:
    """The configuration with another placement and without the options that only some placements have."""
    parallel = dataclasses.replace(config.parallel, placement=placement, pool_budget_gib=budget_gib)
    if placement == "replicate":
        parallel = dataclasses.replace(parallel, lag=-1, replace_interval=0, measured_use="")
    return dataclasses.replace(config, parallel=parallel)


def _choices(config: Config, mesh: Mesh, resolved: Resolved, use: Floats | None) -> list[Choice]:
    """The three placements; hybrid with the configuration's budget, else halfway between the two others."""
    found: list[Choice] = []
    kinds: tuple[Kind, ...] = ("replicate", "home", "hybrid")
    for kind in kinds:
        budget = config.parallel.pool_budget_gib if kind == "hybrid" else 0.0
        if kind == "hybrid" and budget == 0:
            low, high = (min(c.pool_bytes for c in found), max(c.pool_bytes for c in found))
            budget = (low + high) / 2 / GIB
        variant = with_placement(config, kind, budget)
        try:
            check_placement(variant)
            check_fp8(variant, resolved.fp8_recipe, resolved.experts)
            refused = False
        except ConfigError:
            refused = True
        try:
            placement = place_pool(variant, mesh, use)
        except ValueError:
            continue
        traffic = expected_traffic(variant, mesh, placement, use)
        size = pool_bytes(variant, mesh, placement)
        found.append(Choice(kind, budget, size, traffic.across + traffic.sync_across, refused))
    return found
