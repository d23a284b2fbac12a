"""A configuration cut down to one MoE layer, which has its window for a pool. Free of torch."""

from __future__ import annotations

from dataclasses import replace

from moue_dist.config import Config


def one_layer(config: Config, experts: int | None = None) -> Config:
    """The same widths, batch and router; `experts` in the pool, or as many as the widest window has.

    The layer is alone on a stage of its own, and experts live in its ranks: what is left of the parallel degrees is
    expert, tensor and data. Raises ConfigError where the topology does not fit.
    """
    experts = experts or max(len(window) for window in config.topology().windows)
    moe = replace(config.moe, topology="private", pool=experts, window=0, stride=0, group=1)
    parallel = replace(
        config.parallel,
        pipeline_parallel=1,
        virtual_stages=1,
        stage_layers=(),
        placement="replicate",
        pool_budget_gib=0.0,
        measured_use="",
        replace_interval=0,
        lag=-1,
        pool_optimizer="device",
        recompute="none" if config.parallel.recompute == "full" else config.parallel.recompute,
    )
    return replace(config, model=replace(config.model, layers=1, dense_layers=0), moe=moe, parallel=parallel)
