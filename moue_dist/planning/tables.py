"""A plan as tables on the terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from moue_dist.planning.answers import Plan
from moue_dist.planning.memory.peak import RESERVE
from moue_dist.planning.memory.sizes import GIB
from moue_dist.planning.pool import PoolPlan


def render(plan: Plan, console: Console) -> None:
    """Print the plan as tables."""

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
    limit = f"{plan.device} has" if plan.per == "GPU" else f"held against one {plan.device}"
    needs.add_row(limit, f"{plan.memory_gib:.3f}")
    console.print(needs)

    shown = {  # in two lines, so that the table fits into 80 columns
        "pool\nweights": "pool weights",
        "pool\ngrads": "pool gradients",
        "pool\noptim.": "pool optimizer",
        "activ-\nations": "activations",
        "rows\nkept": "rows kept for other ranks",
    }
    title = f"GiB of a {plan.per} by stage (its fullest rank)"
    by_stage = table(title, "stage", "in\nflight", *shown, "all", "on\nhost")
    for s in plan.stages:
        sizes = [*(s.memory_bytes[part] for part in shown.values()), s.total_bytes, s.host_bytes]
        gib = [size / GIB for size in sizes]
        by_stage.add_row(str(s.stage), str(s.microbatches_in_flight), *(f"{x:.{2 if x >= 10 else 3}f}" for x in gib))
    console.print(by_stage)
    _render_pool(plan.pool, console, plan.per)
    console.print("[green]fits[/green]" if plan.fits else f"[red]does not fit[/red]: {plan.misfit}")


def _grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _render_pool(plan: PoolPlan, console: Console, per: str) -> None:
    """Print the traffic table and the comparison. per: what one rank is called."""
    console.print(f"\n[bold]pool traffic of a step, placement {plan.placement}[/bold]")
    table = Table(header_style="bold")
    table.add_column("what")
    table.add_column(f"all {per}s, GiB", justify="right")
    table.add_column(f"a {per}, GiB", justify="right")
    t = plan.traffic
    for name, value in (
        ("dispatch across stages", t.across),
        ("dispatch within stages", t.within),
        ("gradients and weights of copies across stages", t.sync_across),
        ("gradients and weights of copies within stages", t.sync_within),
    ):
        table.add_row(name, f"{value / GIB:,.3f}", f"{value / GIB / plan.world:,.3f}")
    console.print(table)
    console.print(
        f"stage-local: {t.local_experts:.1%} of the experts, {t.local_tokens:.1%} of the routed rows; "
        f"busiest cell {t.busiest:.2f} x the mean; {plan.replica_groups} set(s) of holders"
    )
    if plan.choices:
        console.print(f"placements (GiB of pool a {per}, GiB across stages a step): {_choices(plan)}")


def _choices(plan: PoolPlan) -> str:
    """The comparison in one line."""
    words = []
    for c in plan.choices:
        name = f"hybrid of {c.budget_gib:.3g}" if c.placement == "hybrid" else c.placement
        words.append(f"{name}{'*' if c.refused else ''} {c.pool_bytes / GIB:,.4g}, {c.across_bytes / GIB:,.0f}")
    refused = "; * not with this configuration" if any(c.refused for c in plan.choices) else ""
    return " | ".join(words) + refused
