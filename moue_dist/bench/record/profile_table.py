"""A profiled step on the terminal: what took longest, and where the host waited. All of it is in the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = 12  # rows


def show_profile(part: str, profile: Mapping[str, Any], console: Console) -> None:
    """Rank 0's longest kernels, names cut to the terminal's width, and the waits of rank 0 and the slowest rank."""
    first, kernels = profile["ranks"][0], profile["of"] == "kernels"
    counted = f"{first['kernels']:,} kernels, {first['copies']:,} copies" if kernels else "CPU operators, own time"
    title = f"{part}: one more step, profiled, on rank 0; {counted}"
    table = Table(title=title, title_justify="left", header_style="bold", expand=True)
    for name in ("ms", "count", "us each"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernel" if kernels else "operator", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in first["table"][:SHOWN]:
        each = row["ms"] / row["count"] * 1e3
        table.add_row(f"{row['ms']:.2f}", f"{row['count']:,}", f"{each:.1f}", row["name"])
    console.print(table)
    for rank in profile["ranks"]:
        name = f"rank {rank['rank']}" + (", the slowest" if rank["rank"] == profile["slowest"] else "")
        console.print(
            f"{name}: span {rank['span_ms']:.1f} ms, busy {rank['busy_ms']:.1f}, without exchanges "
            f"{rank['busy_without_exchange_ms']:.1f}; the host waits: {_waits(rank['waits'])}"
        )


def _waits(waits: Mapping[str, Mapping[str, float]]) -> str:
    told = [f"{name} {wait['count']:,} x, {wait['ms']:.1f} ms" for name, wait in waits.items() if wait["count"]]
    return "; ".join(told) or "never"
