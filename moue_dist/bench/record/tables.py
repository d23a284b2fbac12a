"""A run as tables on the terminal: a row for each part, and where the numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from moue_dist.bench.options import BenchOptions
from moue_dist.bench.record.contest_table import show_contests
from moue_dist.bench.record.numbers import PARTS, PLACEMENTS
from moue_dist.bench.record.profile_table import show_profile
from moue_dist.config.devices import rank_word


def tell(run: Mapping[str, Any], options: BenchOptions) -> None:
    """Say how it went: the table and where the numbers are, or a line for one part of several."""
    console = Console(highlight=False)
    if options.part and options.asked:
        part = run["parts"][options.part]
        words = "failed" if "error" in part else f"{part['step_ms']:.1f} ms a step"
        console.print(f"{options.part}: {words}")
        return
    (show if run.get("what", "step") in ("step", "rank") else show_contests)(run, console)
    if options.output:
        print(f"written: {options.output}", flush=True)


def show(run: Mapping[str, Any], console: Console) -> None:
    """The run as a table, a row for each part; what its columns are stands below it."""
    parts, per = run["parts"], rank_word("cuda" if "gpu" in run["machine"] else "cpu")
    alone = f"rank {run['rank']} of {run['world']}, alone on" if "rank" in run else f"{run['world']} x"
    title = f"{run['config']['name']}: {alone} {run['machine'].get('gpu', 'CPU rank')}"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("run", no_wrap=True, min_width=max(map(len, parts)))
    for name in ("ms/step", "tokens/s", "TFLOP/s", "MFU", "GiB", "plan", "load", "loss"):
        table.add_column(name, justify="right")
    for name in sorted(parts, key=(*PARTS, *PLACEMENTS).index):
        part = parts[name]
        if "error" in part:
            table.add_row(name, "failed")
            continue
        table.add_row(
            name,
            f"{part['step_ms']:.1f}",
            f"{part['tokens_per_s_per_gpu']:,.0f}",
            f"{part['tflops_per_gpu']:.3g}",
            _number(part["mfu"], ".1%"),
            _number(part["memory_gib"], ".2f"),
            _number(part["planned_gib"], ".2f"),
            _number(part["load"]["layer_max_over_mean"], ".2f"),
            f"{part['losses'][-1]:.4f}",
        )
    console.print(table)
    console.print(f"per {per}; GiB: allocated on the fullest rank, and planned; load: max/mean, worst layer")
    if any(name in parts for name in PLACEMENTS):
        _show_pool({name: parts[name] for name in PLACEMENTS if "step_ms" in parts.get(name, {})}, console)
    if run["ratio"] is not None:
        console.print(f"ours / baseline: [bold]{run['ratio']:.3f}[/bold] in tokens/s/{per}")
    for name, part in parts.items():
        if "profile" in part:
            show_profile(name, part["profile"], console)


def _show_pool(parts: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The placements side by side: the pool's bytes, what crosses stages, the bubble, time against the first."""
    table = Table(header_style="bold")
    table.add_column("placement", no_wrap=True, min_width=len("placement"))
    for name in ("pool GiB", "across GiB", "expected", "copies GiB", "bubble", "ideal", "time"):
        table.add_column(name, justify="right", overflow="fold")
    for name, part in parts.items():
        sent, expected = part["sent_gib"] or {"across": None}, part["sent_gib_expected"]
        table.add_row(
            name,
            f"{part['pool_gib']:.2f}",
            _number(sent["across"], ".3f"),
            f"{expected['across']:.3f}",
            f"{part['copies_gib_expected']['across']:.3f}",
            _number(part["bubble"], ".1%"),
            f"{part['bubble_ideal']:.1%}",
            f"{part['step_ms'] / next(iter(parts.values()))['step_ms']:.3f}",
        )
    console.print(table)
    console.print(
        "a step, mean of a rank; pool: weights, gradients, optimizer state; across: rows sent to other stages, counted "
        "and expected under balance; copies: their gradients and weights, expected; time against the first"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
