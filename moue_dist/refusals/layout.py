"""Grids that do not fit the model, and numbers of processes that do not fit the grid."""

from __future__ import annotations

from moue_dist.config import Config, ConfigError, refuse
from moue_dist.measuring.measured_use import measured_use
from moue_dist.parallel.mesh import build_mesh, layers_of_rank, stage_layout
from moue_dist.parallel.placement.of_config import moe_window, place_pool


def check_parallel(config: Config) -> None:
    p, e = config.parallel, config.moe
    refuse(
        e.pool % p.expert_parallel != 0,
        f"moe.pool={e.pool} is not divisible by parallel.expert_parallel={p.expert_parallel}; change one",
    )
    refuse(
        p.virtual_stages > 1 and p.pipeline_parallel < 2,
        f"parallel.virtual_stages={p.virtual_stages} interleaves pipeline stages, so it needs "
        f"parallel.pipeline_parallel of at least 2; set virtual_stages=1",
    )
    try:
        layout = stage_layout(config.model.layers, p.pipeline_parallel, p.virtual_stages, p.stage_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    windows = config.topology().windows
    for stage in range(p.pipeline_parallel if p.placement == "replicate" else 0):
        held = {x for i in layers_of_rank(layout, p.pipeline_parallel, stage) for x in moe_window(config, windows, i)}
        empty = [ep for ep in range(p.expert_parallel) if not any(x % p.expert_parallel == ep for x in held)]
        refuse(
            bool(held and empty),
            f"pipeline stage {stage} sees {len(held)} experts, so with parallel.expert_parallel={p.expert_parallel} "
            f"{len(empty)} of its expert ranks would hold none; lower expert_parallel or widen the window",
        )


def check_world(config: Config, world: int) -> None:
    """`world` processes: do they make the grid, and does the global batch divide over it?"""
    p, t = config.parallel, config.train
    try:
        mesh = build_mesh(world, p)
        place_pool(config, mesh, measured_use(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    share = t.micro_batch_size * mesh.data
    refuse(
        t.global_batch_size % share != 0,
        f"train.global_batch_size={t.global_batch_size} is not divisible by train.micro_batch_size="
        f"{t.micro_batch_size} x {mesh.data} data-parallel ranks = {share} ({world} processes); change one",
    )
    microbatches = t.global_batch_size // share
    refuse(
        p.virtual_stages > 1 and microbatches % p.pipeline_parallel != 0,
        f"{microbatches} microbatches a step are not divisible by parallel.pipeline_parallel={p.pipeline_parallel}, "
        f"which the interleaved schedule (parallel.virtual_stages={p.virtual_stages}) needs; change "
        f"train.global_batch_size or train.micro_batch_size, or set virtual_stages=1",
    )
