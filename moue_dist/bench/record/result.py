"""What a benchmark leaves: a JSON file of runs with every raw number, and a short table.

The file is {"runs": [run, ...]}. A run has `command`, `commit`, `date`, `machine`, `versions`, `config`, `world`, and
a `parts` entry for each thing measured, `ours` and `baseline`: either its numbers or {"error": one line}. `ratio` is
ours / baseline in tokens per second and GPU (or CPU rank), null unless both were measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from moue_dist.bench.options import BenchOptions
from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import rank_word
from moue_dist.measuring.metrics import StepMeter
from moue_dist.planning.flops import flops_per_token

PARTS = ("ours", "baseline")
PLACEMENTS = ("replicate", "home", "hybrid")


def numbers(config: Config, world: int, device_name: str, step_ms: list[float], **more: Any) -> dict[str, Any]:
    """A part's entry: rates of the median step, by `config`'s own FLOPs, beside the raw numbers in `more`."""
    meter = StepMeter(
        flops_per_token=flops_per_token(config).total,
        tokens_per_step=config.train.global_batch_size * config.model.sequence_length,
        gpus=world,
        device_name=device_name,
        precision=config.train.precision,
    )
    rates = dataclasses.asdict(meter.rates(median(step_ms) / 1e3))
    rates.pop("step_seconds")
    return {
        "step_ms": median(step_ms),
        "step_ms_all": step_ms,
        **rates,
        "flops_per_token": meter.flops_per_token,
    } | more


def ratio(parts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Ours over the baseline, in tokens/s/GPU; None unless both were measured."""
    ours, theirs = (parts.get(name, {}).get("tokens_per_s_per_gpu") for name in PARTS)
    return ours / theirs if ours and theirs else None


def earlier_runs(path: Path, append: bool) -> list[Any]:
    """The runs to keep: those of an existing file when appending. Raises ConfigError for an unusable path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise _unwritable(path, "not a file, or in a folder that cannot be written")
    if not append or not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if isinstance(runs, list):
            return runs
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--append: {path} is no file of benchmark runs; choose another --output or leave --append out")


def _unwritable(path: Path, why: str | None) -> ConfigError:
    return ConfigError(f"--output {path}: {why}; choose a file that can be written")


def write(path: Path, runs: list[Any]) -> None:
    """Write the file at once or not at all. Raises ConfigError where the folder cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(_plain({"runs": runs}), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def _plain(value: Any) -> Any:
    """JSON without NaN or infinity: those become the words 'nan', 'inf', '-inf'."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def tell(run: Mapping[str, Any], options: BenchOptions) -> None:
    """Say how it went: the table and where the numbers are, or a line for one part of several."""
    console = Console(highlight=False)
    if options.part and options.asked:
        part = run["parts"][options.part]
        words = "failed" if "error" in part else f"{part['step_ms']:.1f} ms a step"
        console.print(f"{options.part}: {words}")
        return
    show(run, console)
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
