"""Where a configuration's experts live: its layers, stages and bytes handed to the planner. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh, stage_layout
from moue_dist.parallel.placement.costs import ExpertBytes, Floats
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.placement.planner import plan_placement


def place_pool(config: Config, mesh: Mesh, use: Sequence[Sequence[float]] | Floats | None = None) -> Placement:
    """Which stages and expert ranks hold which experts in this run.

    `use[l][e]` are the tokens that MoE layer l routed to expert e, where they were measured. Pure and deterministic:
    every rank finds the same. Raises ValueError where the budget is too small or `use` does not fit the topology.
    """
    p = config.parallel
    return plan_placement(
        p.placement,
        config.topology().windows,
        stages_of_moe_layers(config, mesh),
        config.moe.pool,
        mesh.pipeline,
        mesh.expert,
        use=use,
        expert_bytes=expert_bytes(config),
        budget_bytes=round(p.pool_budget_gib * 2**30),
        expert_data=mesh.expert_data,
    )


def stages_of_moe_layers(config: Config, mesh: Mesh) -> tuple[int, ...]:
    """The pipeline rank of each MoE layer."""
    layout = stage_layout(config.model.layers, mesh.pipeline, mesh.virtual, config.parallel.stage_layers)
    stage_of = {layer: i % mesh.pipeline for i, stage in enumerate(layout) for layer in stage}
    return tuple(stage_of[i] for i in range(config.model.dense_layers, config.model.layers))


def expert_bytes(config: Config) -> ExpertBytes:
    """Bytes of one expert on GPUs: two fp32 moments and, unless the weight is fp32 itself, an fp32 master copy."""
    fp32 = config.train.precision == "fp32"
    on_device = config.parallel.pool_optimizer == "device"
    return ExpertBytes(
        row=3 * config.model.hidden_size * config.moe.expert_width,
        weight=4 if fp32 else 2,
        gradient=4,
        optimizer=(8 if fp32 else 12) if on_device else 0,
    )


def moe_window(config: Config, windows: tuple[tuple[int, ...], ...], layer: int) -> tuple[int, ...]:
    """The experts that 0-based layer `layer` of the whole model sees; () for a dense layer."""
    index = layer - config.model.dense_layers
    return windows[index] if index >= 0 else ()
