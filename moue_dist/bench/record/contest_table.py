"""Several ways of one thing on the terminal: a row for each way that is held against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

CPU = "CPU rank"


def show_contests(run: Mapping[str, Any], console: Console) -> None:
    """Milliseconds with half the distance between the quartiles, ratios, differences; and what the columns are."""
    parts, device = run["parts"], run["machine"].get("gpu", CPU)
    first = next((part["first"] for part in parts.values() if "first" in part), "first")
    title = f"{run['what']}, {run['config']['name']}: {run['world']} x {device}"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    table.add_column(f"{first}, ms", justify="right", no_wrap=True)
    table.add_column("against", overflow="fold")
    for name in ("ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("apart", justify="right", overflow="fold")
    for name, part in parts.items():
        if "error" in part:
            table.add_row(name, "failed", "", "", "", part["error"])
            continue
        mine = part["ways"][first]
        for other, way in part["ways"].items():
            if "error" in way:
                table.add_row(name, _ms(mine), other, "failed", "", way["error"])
            elif other != first:
                far = _difference(way["difference"], part["tolerance"])
                table.add_row(name, _ms(mine), other, _ms(way), f"{way['ratio']:.3f}", far)
    console.print(table)
    if sizes := run.get("sizes"):
        console.print(_sizes(sizes, run["dtype"]) + ("; a CPU: the references, small sizes" if device == CPU else ""))
    for name, part in run["parts"].items():
        if sent := part.get("gb_out_of_a_gpu"):
            told = ", ".join(f"{way} {gb:.3f}" for way, gb in sent.items())
            console.print(f"{name}: GB out of a GPU, forward and backward, mean of the ranks: {told}")
    console.print(
        "ms: median of the samples, taken in turns, and half the distance of their quartiles; ratio: the other's ms "
        f"over those of {first}; apart: relative difference of what they compute"
    )


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median. Example: 1, 2, 3, 4, 5 -> 1.5 / 3."""
    if len(samples) < 2:
        return 0.0
    low, _, high = quantiles(samples, n=4)
    return (high - low) / 2 / median(samples)


def _sizes(sizes: Mapping[str, Any], dtype: str) -> str:
    here = f"{sizes['window'] // sizes['expert_ranks']} of the {sizes['window']} experts that a layer sees"
    widths = f"hidden {sizes['hidden']}, expert width {sizes['width']}"
    return f"{sizes['tokens']:,} tokens, top {sizes['top_k']}, {widths}, {here}; {dtype}"


def _ms(way: Mapping[str, Any]) -> str:
    return f"{way['ms']:.4g} ±{spread(way['ms_all']):.1%}"


def _difference(value: float | None, tolerance: float | None) -> str:
    if value is None or tolerance is None:
        return "-"
    return f"{value:.1e}" if value <= tolerance else f"[bold red]{value:.1e}, more than {tolerance:.0e}[/]"
