"""Several runs -> one table of scaling efficiency, its plot, an HTML page and a CSV file.

Weak scaling: a run's efficiency is its tokens/s/GPU over that of the baseline, the run on the fewest GPUs (of several
such runs the fastest, so that nothing is flattered). Speed-up is the ratio of total tokens/s, whose ideal is the ratio
of GPUs. All rates are medians over steady steps: without the first tenth of a run's steps, at least two. Where a run
was on a CPU, the page counts in ranks; names in files stay.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from moue_dist.config import ConfigError
from moue_dist.config.devices import rank_word
from moue_dist.measuring.run_folder import Run, read_run
from moue_dist.report import figures, html
from moue_dist.report.html import Picture, share, show
from moue_dist.report.run_report import grid, on_cpu, peak_memory, write_text
from moue_dist.report.style import BLUE, ORANGE, SOFT, legend, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CPU = "CPU"  # as a row's device
WORDS = 2  # leading columns that are words


@dataclass(frozen=True)
class Row:
    """One run's numbers; NaN where a run does not have one. The field names are the CSV file's columns."""

    name: str
    grid: str
    gpus: int
    tokens_per_s_per_gpu: float
    tokens_per_s: float
    efficiency: float  # tokens/s/GPU over the baseline's
    speedup: float  # total tokens/s over the baseline's
    tflops_per_gpu: float
    mfu: float
    peak_memory_gib: float
    layer_max_over_mean: float
    pool_max_over_mean: float
    joules_per_token: float
    steady_steps: int
    folder: str
    device: str

    def cells(self) -> list[str]:
        """The row as shown, in the order of `header`."""
        return [
            self.name, self.grid, str(self.gpus), show(self.tokens_per_s_per_gpu, 4), share(self.efficiency),
            show(self.speedup, 3, "×"), show(self.tflops_per_gpu), share(self.mfu), show(self.peak_memory_gib),
            f"{show(self.layer_max_over_mean)} / {show(self.pool_max_over_mean)}", show(self.joules_per_token),
        ]  # fmt: skip


def word_of(rows: Sequence[Row]) -> str:
    """What these runs' ranks are called: 'GPU', or 'rank' where one of the runs was on a CPU."""
    return rank_word("cpu" if any(row.device == CPU for row in rows) else "cuda")


def header(per: str) -> tuple[str, ...]:
    """The table's columns, where one rank is called `per`."""
    return (
        "Run", "Grid", f"{per[0].upper()}{per[1:]}s", f"Tokens/s/{per}", "Efficiency", "Speed-up", f"TFLOP/s/{per}",
        "MFU", "Peak GiB", "Imbalance layer / pool", "J/token",
    )  # fmt: skip


def measure(runs: Sequence[Run]) -> list[Row]:
    """The rows of the table, fewest GPUs first. Raises ConfigError where a run has no rate or no number of GPUs."""
    rates = [run.steady_median("tokens_per_s_per_gpu") for run in runs]
    for run, rate in zip(runs, rates, strict=True):
        if not run.train:
            raise ConfigError(f"{run.folder} has no finished step; let the run train a few steps, or leave it out")
        if not rate > 0:
            raise ConfigError(f"{run.folder} recorded no tokens/s; leave it out")
        if run.world_size is None:
            raise ConfigError(f"{run.folder}/run.json does not say world_size, the number of ranks; leave it out")
    sizes = [run.world_size or 0 for run in runs]
    order = sorted(range(len(runs)), key=lambda i: (sizes[i], -rates[i]))
    base = order[0]
    rows = []
    for i in order:
        run, total = runs[i], rates[i] * sizes[i]
        rows.append(
            Row(
                name=run.name,
                grid=grid(run),
                gpus=sizes[i],
                tokens_per_s_per_gpu=rates[i],
                tokens_per_s=total,
                efficiency=rates[i] / rates[base],
                speedup=total / (rates[base] * sizes[base]),
                tflops_per_gpu=run.steady_median("tflops_per_gpu"),
                mfu=run.steady_median("mfu"),
                peak_memory_gib=peak_memory(run),
                layer_max_over_mean=run.steady_median("load.layer_max_over_mean"),
                pool_max_over_mean=run.steady_median("load.pool_max_over_mean"),
                joules_per_token=run.steady_median("joules_per_token"),
                steady_steps=len(run.steady()),
                folder=str(run.folder),
                device=CPU if on_cpu(run) else run.device,
            )
        )
    return rows


def differences(runs: Sequence[Run]) -> list[str]:
    """Why these runs may not be comparable, each in a sentence; empty where only their size differs."""
    found = []
    for section in ("model", "moe"):
        keys = {key for run in runs for key in (run.config.get(section) or {})}
        for key in sorted(keys):
            told = _differing(runs, f"{section}.{key}")
            if told:
                found.append(f"Different models: {section}.{key} is {told}.")
    for path, what in (("train.precision", "precisions"), ("train.micro_batch_size", "microbatch sizes")):
        told = _differing(runs, path)
        if told:
            found.append(f"Different {what}: {path} is {told}.")
    if len({run.device for run in runs}) > 1:
        found.append("Different devices: " + _told([(run.device, run.name) for run in runs]) + ".")
    batches = [run.option("train.global_batch_size") / (run.world_size or 1) for run in runs]
    if len(set(batches)) > 1:
        per = rank_word("cpu" if any(map(on_cpu, runs)) else "cuda")
        told = _told([(f"{batch:g}", run.name) for batch, run in zip(batches, runs, strict=True)])
        found.append(f"Not weak scaling: sequences per {per} and step are {told}.")
    return found


def _differing(runs: Sequence[Run], path: str) -> str:
    values = []
    for run in runs:
        try:
            values.append((str(run.option(path)), run.name))
        except AttributeError:  # an option of another version of this program
            section, key = path.split(".")
            values.append((str((run.config.get(section) or {}).get(key, "not set")), run.name))
    return _told(values) if len({value for value, _ in values}) > 1 else ""


def _told(values: Sequence[tuple[str, str]]) -> str:
    """ "8 in a and b, 16 in c"."""
    names: dict[str, list[str]] = {}
    for value, name in values:
        names.setdefault(value, []).append(name)
    return ", ".join(f"{value} in {' and '.join(who)}" for value, who in names.items())


def plot(rows: Sequence[Row]) -> list[Picture]:
    """Efficiency and total throughput against GPUs, each with its ideal line."""
    best = {row.gpus: row for row in sorted(rows, key=lambda row: row.tokens_per_s_per_gpu)}
    line = [best[gpus] for gpus in sorted(best)]
    gpus, base, per = [row.gpus for row in rows], line[0], word_of(rows)
    figure = new_figure(*figures.SIZE)
    axes = figure.add_subplot()
    axes.axhline(100, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label="ideal")
    axes.plot([row.gpus for row in line], [100 * row.efficiency for row in line], color=BLUE, linewidth=1.6)
    axes.plot(gpus, [100 * row.efficiency for row in rows], color=BLUE, marker="o", linestyle="none", label="runs")
    _rank_axis(axes, gpus, f"{per}s", "efficiency, per cent")
    axes.set_ylim(0, max(110.0, 105 * max(row.efficiency for row in rows)))
    told = ", ".join(f"{row.name} on {row.gpus}: {share(row.efficiency)}" for row in rows)
    efficiency = figures.picture(
        "Efficiency",
        f"Tokens/s/{per} over that of {base.name} on {html.count(base.gpus, per)}. Ideal is 100%.",
        f"Scaling efficiency against {per}s: {told}.",
        figure,
    )
    figure = new_figure(*figures.SIZE)
    axes = figure.add_subplot()
    ideal = [base.tokens_per_s_per_gpu * n for n in (line[0].gpus, line[-1].gpus)]
    axes.plot([line[0].gpus, line[-1].gpus], ideal, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label="ideal")
    axes.plot([row.gpus for row in line], [row.tokens_per_s for row in line], color=ORANGE, linewidth=1.6)
    axes.plot(gpus, [row.tokens_per_s for row in rows], color=ORANGE, marker="o", linestyle="none", label="runs")
    _rank_axis(axes, gpus, f"{per}s", "tokens/s in all")
    if min(row.tokens_per_s for row in rows) > 0:
        figures.log_scale(axes)
    told = ", ".join(f"{row.name} on {row.gpus}: {show(row.tokens_per_s)} tokens/s" for row in rows)
    caption = (
        f"Tokens per second of all {per}s together. The dashed line is the smallest run times its number of {per}s."
    )
    throughput = figures.picture("Throughput", caption, f"Throughput against {per}s: {told}.", figure)
    return [efficiency, throughput]


def _rank_axis(axes: Axes, gpus: Sequence[int], xlabel: str, ylabel: str) -> None:
    """GPUs or ranks in powers of two: a log axis with each run's number on it."""
    style_axes(axes, xlabel, ylabel)
    axes.set_xscale("log", base=2)
    ticks = sorted(set(gpus))
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    legend(axes)


def render_scaling(rows: Sequence[Row], warnings: Sequence[str]) -> str:
    """The page, as HTML text."""
    base, per = rows[0], word_of(rows)
    caption = (
        f"Efficiency: tokens/s/{per} over that of {base.name}. Speed-up: total tokens/s over that of {base.name}. "
        "Rates are medians over steady steps (without the first tenth, at least two). Imbalance: largest over mean "
        "load of the worst layer and of the pool."
    )
    best = max(rows, key=lambda row: (row.gpus, row.efficiency))
    lead = f"{len(rows)} runs on {rows[0].gpus} to {rows[-1].gpus} {per}s, measured against {base.name}"
    cards = [
        ("Runs", str(len(rows)), ""),
        ("Efficiency", share(best.efficiency), f"{best.name}, {html.count(best.gpus, per)}"),
        ("Speed-up", show(best.speedup, 3, "×"), f"ideal {show(best.gpus / base.gpus, 3, '×')}"),
        ("Tokens/s in all", show(best.tokens_per_s), f"{best.name}"),
    ]
    body = [
        html.headline(cards),
        html.notes(warnings, "These runs differ in more than their size"),
        "<h2>Runs</h2>",
        html.runs_table(caption, header(per), [row.cells() for row in rows], WORDS),
        "<h2>Plots</h2>",
        f'<div class="pictures">{"".join(picture.html() for picture in plot(rows))}</div>',
    ]
    return html.page("Scaling efficiency", lead, body)


def as_csv(rows: Sequence[Row]) -> str:
    """The table with full precision; a number that a run does not have is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in rows:
        writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in astuple(row))
    return buffer.getvalue()


def write_scaling_report(run_dirs: Sequence[Path], output: Path) -> tuple[list[Row], list[str]]:
    """Write the page to `output` and the table beside it as .csv; gives the rows and the warnings.

    Raises ConfigError for a folder that is no run, or a run without a finished step.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    rows, warnings = measure(runs), differences(runs)
    write_text(output, render_scaling(rows, warnings))
    write_text(output.with_suffix(".csv"), as_csv(rows))
    return rows, warnings
