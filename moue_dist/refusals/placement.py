"""Where the pool and its optimizer's state live: what is not proven, and what means nothing there."""

from __future__ import annotations

from moue_dist.config import Config, refuse


def check_placement(config: Config) -> None:
    """What experts at home cannot do, or what is not proven with them."""
    p, cells = config.parallel, config.parallel.pipeline_parallel * config.parallel.expert_parallel
    chosen, way_out = f"parallel.placement={p.placement}", "or use parallel.placement=replicate"
    refuse(
        p.pool_budget_gib > 0 and p.placement != "hybrid",
        f"parallel.pool_budget_gib={p.pool_budget_gib:g} is for parallel.placement=hybrid, not {p.placement}; set 0",
    )
    if p.placement == "replicate":
        for name, value in (("replace_interval", p.replace_interval), ("lag", p.lag)):
            refuse(value > 0, f"parallel.{name}={value} is only for parallel.placement=home or hybrid; leave it out")
        refuse(
            p.measured_use != "",
            f"parallel.measured_use={p.measured_use} is only for parallel.placement=home or hybrid: replicate follows "
            f"from the windows alone; leave it out",
        )
        return
    refuse(
        p.placement == "hybrid" and p.pool_budget_gib == 0,
        "parallel.placement=hybrid needs parallel.pool_budget_gib: the GiB that a GPU may spend on the pool "
        "(weights, gradients, optimizer state); `moue plan` prints what home and replicate take",
    )
    refuse(
        p.virtual_stages > 1,
        f"{chosen} runs in lock step, which interleaved stages (parallel.virtual_stages={p.virtual_stages}) do not; "
        f"set virtual_stages=1 {way_out}",
    )
    refuse(
        p.recompute == "selective",
        f"parallel.recompute=selective is not proven with {chosen}; use none or full {way_out}",
    )
    refuse(
        config.moe.pool < cells,
        f"{chosen} gives each of parallel.pipeline_parallel={p.pipeline_parallel} x parallel.expert_parallel="
        f"{p.expert_parallel} = {cells} cells a part of the pool, but moe.pool={config.moe.pool} is smaller; lower a "
        f"degree {way_out}",
    )


def check_pool_optimizer(config: Config) -> None:
    p, o = config.parallel, config.optim
    refuse(
        p.host_state != "fp32" and p.pool_optimizer != "host",
        f"parallel.host_state={p.host_state} is only for parallel.pool_optimizer=host; remove it or set fp32",
    )
    refuse(
        p.replace_interval > 0 and p.pool_optimizer == "host",
        f"parallel.replace_interval={p.replace_interval} is not proven with parallel.pool_optimizer=host; set 0 or "
        f"use parallel.pool_optimizer=device",
    )
    for name, beta in (("beta1", o.beta1), ("beta2", o.beta2)):
        # bf16 keeps 8 bits: rounding to nearest undoes a change of less than 1/256, such as a decay by beta > 0.996.
        refuse(
            p.host_state == "bf16" and beta > 0.99,
            f"optim.{name}={beta} changes Adam's moments by less than parallel.host_state=bf16 resolves; lower it to "
            f"at most 0.99 or set parallel.host_state=fp32",
        )
