"""The dry run: everything that follows from a configuration and a number of processes, and whether it fits.

Arithmetic only: nothing here imports torch or touches a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import Device
from moue_dist.measuring.measured_use import measured_use
from moue_dist.parallel.mesh import build_mesh, layers_of_rank, stage_layout
from moue_dist.parallel.placement.costs import served, stage_use
from moue_dist.parallel.placement.of_config import moe_window, place_pool, stages_of_moe_layers
from moue_dist.planning.answers import Plan, StagePlan
from moue_dist.planning.flops import flops_per_token, parameters
from moue_dist.planning.memory.in_flight import chunks_in_flight, lock_step_lag
from moue_dist.planning.memory.peak import RESERVE, rank_bytes
from moue_dist.planning.memory.sizes import GIB, Share
from moue_dist.planning.memory.weights import dense_parameters, host_bytes
from moue_dist.planning.pool import build_pool_plan
from moue_dist.planning.remedy import cheapest_change
from moue_dist.refusals.validate import validate


def build_plan(config: Config, world: int, device: Device, memory_gib: float | None = None) -> Plan:
    """The plan of `world` processes on `device`s (or on CPU where the configuration says so).

    Assumes that Transformer Engine is installed unless the configuration switches it off. Raises ConfigError for a
    configuration that cannot run; one that needs too much memory comes back with `misfit`, which names a way out.
    """
    plan = _plan(config, world, device, memory_gib)
    lack = _misfit(plan)
    if lack is None:
        return plan

    def plan_of(changed: Config, processes: int) -> Plan | None:
        try:
            other = _plan(changed, processes, device, memory_gib)
        except ConfigError:
            return None
        return dataclasses.replace(other, misfit=_misfit(other))

    return dataclasses.replace(plan, misfit=f"{lack}; {cheapest_change(config, world, device, plan, plan_of)}")


def _plan(config: Config, world: int, device: Device, memory_gib: float | None) -> Plan:
    """The plan without `misfit`."""
    resolved = validate(config, world, cuda=True, device=device, transformer_engine=True)
    mesh = build_mesh(world, config.parallel)
    t, m = config.train, config.model
    microbatches = t.global_batch_size // (t.micro_batch_size * mesh.data)
    use = measured_use(config)
    placement, topology = place_pool(config, mesh, use), config.topology()
    layout = stage_layout(m.layers, mesh.pipeline, mesh.virtual, config.parallel.stage_layers)
    holders = placement.holders
    stage_of = stages_of_moe_layers(config, mesh)
    load = served(placement, stage_use(topology.windows, stage_of, placement.pool, mesh.pipeline, use))

    stages = []
    for stage in range(mesh.pipeline):
        chunks = layout[stage :: mesh.pipeline]
        held = [e for e in range(config.moe.pool) if stage in holders[e]]
        rows = [len(placement.rows(stage, ep)) for ep in range(mesh.expert)]
        # The rank that needs most holds the most experts, or has the most tokens come to them.
        needs = {
            ep: rank_bytes(config, mesh, placement, Share(stage, chunks, ep), microbatches, resolved, use)
            for ep in {rows.index(max(rows)), int(load[stage].argmax())}
        }
        share = Share(stage, chunks, max(needs, key=lambda ep: (sum(needs[ep].values()), -ep)))
        ranks = mesh.ranks_of_stage(stage)
        stages.append(
            StagePlan(
                stage=stage,
                first_rank=ranks[0],
                last_rank=ranks[-1],
                chunks=chunks,
                windows=tuple(
                    ranges(moe_window(config, topology.windows, layer))
                    for layer in layers_of_rank(layout, mesh.pipeline, stage)
                ),
                experts=len(held),
                shared_experts=sum(len(holders[e]) > 1 for e in held),
                experts_per_rank=max(rows),
                parameters_per_rank=dense_parameters(config, mesh, share),
                microbatches_in_flight=len(chunks_in_flight(mesh, stage, microbatches, lock_step_lag(config))),
                memory_bytes=needs[share.expert_rank],
                host_bytes=host_bytes(config, mesh, placement, share),
            )
        )

    counts, flops = parameters(config), flops_per_token(config)
    tokens = t.global_batch_size * m.sequence_length
    exposure = topology.exposure
    return Plan(
        name=config.name,
        grid={
            "world": world,
            "pipeline": mesh.pipeline,
            "virtual stages": mesh.virtual,
            "tensor": mesh.tensor,
            "data": mesh.data,
            "expert": mesh.expert,
            "expert-data": mesh.expert_data,
        },
        derived={
            "device": resolved.device,
            "precision": t.precision + (f" ({resolved.fp8_recipe})" if resolved.fp8_recipe else ""),
            "transformer engine": "on" if resolved.transformer_engine else "off",
            "expert GEMMs": resolved.experts,
            "head width": m.head_width,
            "key-value heads": m.groups,
            "MoE layers": config.moe_layers,
            "window": topology.window,
            "layers that see an expert": f"{min(exposure)} to {max(exposure)}",
            "use of the experts": f"as in {config.parallel.measured_use}" if config.parallel.measured_use else "even",
            "microbatches per step": microbatches,
            "pipeline bubble": round((mesh.pipeline - 1) / (mesh.virtual * microbatches + mesh.pipeline - 1), 4),
            "tokens per microbatch": t.micro_batch_size * m.sequence_length,
            "rows per layer and expert rank": t.micro_batch_size * m.sequence_length // mesh.tensor * config.moe.top_k,
            "tokens per step": tokens,
            "steps": t.steps,
            "tokens in the run": tokens * t.steps,
            "training FLOPs of the run": float(tokens * t.steps * flops.total),
        },
        parameters=counts,
        flops=flops,
        stages=tuple(stages),
        pool=build_pool_plan(config, mesh, placement, resolved, use),
        device=device.name,
        memory_gib=device.memory_gib if memory_gib is None else memory_gib,
        misfit=None,
    )


def _misfit(plan: Plan) -> str | None:
    worst = plan.worst
    if worst.total_bytes + RESERVE <= plan.memory_gib * GIB:
        return None
    largest = max(worst.memory_bytes.items(), key=lambda item: item[1])
    return (
        f"stage {worst.stage} needs {worst.total_bytes / GIB:.1f} GiB and {RESERVE / GIB:.0f} GiB of reserve, "
        f"more than the {plan.memory_gib:.1f} GiB of {plan.device}; the largest part is {largest[0]} "
        f"({largest[1] / GIB:.1f} GiB)"
    )


def ranges(ids: Sequence[int]) -> str:
    """Ascending ids as ranges: (0, 1, 2, 6, 7) -> '0-2 6-7'."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
