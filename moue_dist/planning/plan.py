"""The dry run: everything that follows from a configuration and a number of processes, and whether it fits.

`build_plan` is arithmetic; `render` prints it. Neither imports torch or touches a device.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import Device
from moue_dist.measuring.measured_use import measured_use
from moue_dist.parallel.mesh import build_mesh, layers_of_rank, stage_layout
from moue_dist.parallel.placement.costs import served, stage_use
from moue_dist.parallel.placement.of_config import moe_window, place_pool, stages_of_moe_layers
from moue_dist.planning import memory
from moue_dist.planning.flops import Flops, Parameters, flops_per_token, parameters
from moue_dist.planning.memory import GIB, RESERVE, Share
from moue_dist.planning.pool import PoolPlan, build_pool_plan, render_pool_plan
from moue_dist.planning.remedy import cheapest_change
from moue_dist.refusals.validate import validate

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: its layers (0-based), what they see, and the fullest of its ranks."""

    stage: int
    first_rank: int
    last_rank: int
    chunks: tuple[tuple[int, ...], ...]  # layers of each model chunk
    windows: tuple[str, ...]  # experts that each layer sees, as ranges; '' for a dense layer
    experts: int  # held by the stage: the union of its layers' windows
    shared_experts: int  # of these, also held by another stage
    experts_per_rank: int  # on the rank that holds most
    parameters_per_rank: int  # without the pool
    microbatches_in_flight: int  # of chunks
    memory_bytes: dict[str, int]  # by component, on the rank that holds most
    host_bytes: int  # of host memory, on that rank

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())


@dataclass(frozen=True)
class Plan:
    """A dry run's answers. Bytes are per GPU; FLOPs per token, forward and backward."""

    name: str
    grid: dict[str, int]
    derived: dict[str, Any]
    parameters: Parameters
    flops: Flops
    stages: tuple[StagePlan, ...]
    pool: PoolPlan
    device: str
    memory_gib: float
    misfit: str | None  # why it does not fit

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda s: s.total_bytes)

    @property
    def fits(self) -> bool:
        return self.misfit is None

    def as_json(self) -> str:
        """The plan with its totals, as JSON."""
        plain = dataclasses.asdict(self)
        plain["parameters"] |= {"total": self.parameters.total, "dense": self.parameters.dense}
        plain["flops"]["total"] = self.flops.total
        for stage, written in zip(self.stages, plain["stages"], strict=True):
            written["total_bytes"] = stage.total_bytes
        return json.dumps({**plain, "fits": self.fits, "worst_stage": self.worst.stage}, indent=2)


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
            ep: memory.rank_bytes(config, mesh, placement, Share(stage, chunks, ep), microbatches, resolved, use)
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
                parameters_per_rank=memory.dense_parameters(config, mesh, share),
                microbatches_in_flight=len(
                    memory.chunks_in_flight(mesh, stage, microbatches, memory.lock_step_lag(config))
                ),
                memory_bytes=needs[share.expert_rank],
                host_bytes=memory.host_bytes(config, mesh, placement, share),
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
            "head width": m.hidden_size // m.heads,
            "key-value heads": m.kv_heads or m.heads,
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
        pool=build_pool_plan(config, mesh, placement, use),
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


def draw(config: Config, world: int, path: Path) -> None:
    """Draw the ring of the pool with windows, stages and copies; raises ConfigError where that cannot be written."""
    from moue_dist.report.ring import write_ring_picture

    mesh = build_mesh(world, config.parallel)
    placement = place_pool(config, mesh, measured_use(config))
    write_ring_picture(path, config.topology(), stages_of_moe_layers(config, mesh), placement)


def ranges(ids: Sequence[int]) -> str:
    """Ascending ids as ranges: (0, 1, 2, 6, 7) -> '0-2 6-7'."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def render(plan: Plan, console: Console) -> None:
    """Print the plan as tables."""
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        console.print(f"\n[bold]{title}[/bold]")
        made = Table(header_style="bold")
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i == 0 or column == "window" else "right")
        return made

    grid = table(f"{plan.name}: rank grid", *plan.grid)
    grid.add_row(*map(str, plan.grid.values()))
    console.print(grid)

    derived = table("derived", "number", "value")
    for name, value in plan.derived.items():
        derived.add_row(name, f"{value:.3e}" if isinstance(value, float) and value > 1e6 else _grouped(value))
    console.print(derived)

    counts = table("parameters", "part", "count")
    for name, value in dataclasses.asdict(plan.parameters).items():
        if name not in ("activated", "router_shared"):
            counts.add_row(name.replace("_", " "), _grouped(value))
    counts.add_section()
    counts.add_row("total", _grouped(plan.parameters.total))
    counts.add_row("activated per token", _grouped(plan.parameters.activated))
    console.print(counts)

    work = table("model FLOPs per token (forward and backward, executed layers, no recompute)", "part", "FLOPs")
    for name, value in dataclasses.asdict(plan.flops).items():
        work.add_row(name, f"{value:.4g}")
    work.add_section()
    work.add_row("total", f"{plan.flops.total:.4g}")
    console.print(work)

    stages = table("stages (layers from 1)", "stage", "ranks", "layer", "window", "experts", "shared", "a rank")
    for s in plan.stages:
        order = sorted(layer for chunk in s.chunks for layer in chunk)
        for i, (layer, window) in enumerate(zip(order, s.windows, strict=True)):
            head = (str(s.stage), f"{s.first_rank}-{s.last_rank}") if i == 0 else ("", "")
            tail = (str(s.experts), str(s.shared_experts), str(s.experts_per_rank)) if i == 0 else ("", "", "")
            stages.add_row(*head, str(layer + 1), window or "dense", *tail)
        stages.add_section()
    console.print(stages)

    worst = plan.worst
    needs = table(f"memory of a rank of stage {worst.stage}, the fullest, at the peak of a step", "component", "GiB")
    for name, value in worst.memory_bytes.items():
        needs.add_row(name, f"{value / GIB:.3f}")
    needs.add_section()
    needs.add_row("allocated", f"{worst.total_bytes / GIB:.3f}")
    needs.add_row("reserve (context, NCCL, fragmentation)", f"{RESERVE / GIB:.3f}")
    needs.add_row(f"{plan.device} has", f"{plan.memory_gib:.3f}")
    console.print(needs)

    shown = {  # in two lines, so that the table fits into 80 columns
        "pool\nweights": "pool weights",
        "pool\ngrads": "pool gradients",
        "pool\noptim.": "pool optimizer",
        "activ-\nations": "activations",
        "rows\nkept": "rows kept for other ranks",
    }
    by_stage = table("GiB of a GPU by stage (its fullest rank)", "stage", "in\nflight", *shown, "all", "on\nhost")
    for s in plan.stages:
        sizes = [*(s.memory_bytes[part] for part in shown.values()), s.total_bytes, s.host_bytes]
        gib = [size / GIB for size in sizes]
        by_stage.add_row(str(s.stage), str(s.microbatches_in_flight), *(f"{x:.{2 if x >= 10 else 3}f}" for x in gib))
    console.print(by_stage)
    render_pool_plan(plan.pool, console)
    console.print("[green]fits[/green]" if plan.fits else f"[red]does not fit[/red]: {plan.misfit}")


def _grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
