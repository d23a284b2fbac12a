"""The pictures of one run's course over its steps: loss, balance, step time, learning rate and gradient norm.

Each function takes a `Run` and gives a `Picture`; where the run has nothing to draw, the picture is a plain sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from moue_dist.measuring.run_folder import Run, number
from moue_dist.report.html import Picture, count, show
from moue_dist.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    SOFT,
    legend,
    new_figure,
    recolour,
    smooth,
    style_axes,
    thin,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (5.4, 3.0)  # inches: two stand side by side on a wide page, and the text stays readable on a phone


def picture(title: str, caption: str, alternative: str, figure: Figure, kind: str = "") -> Picture:
    """A drawn picture, for light and for dark pages."""
    svg = to_svg(figure)
    return Picture(title, caption, alternative, svg, recolour(svg, "dark"), kind)


def loss(run: Run) -> Picture:
    """Training loss, raw and smoothed, and validation loss, in nats per token over steps."""
    title = "Loss"
    steps, raw = run.series("loss")
    valid = [(number(line, "step"), number(line, "loss")) for line in run.valid]
    valid = [point for point in valid if math.isfinite(point[1])]
    finite = [v for v in raw if math.isfinite(v)]
    if not finite and not valid:
        return Picture(title, "No finite loss was recorded." if run.train else "No finished step was recorded.")
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    words = []
    lost = len(raw) - len(finite)
    if finite:
        width = max(1, len(raw) // 40)
        smoothed = smooth(raw, width)
        label = "train"
        if width > 1:
            _line(axes, steps, raw, BLUE, alpha=0.45, linewidth=0.8, label="train, each step")
            label = "smoothed"
        _line(axes, steps, smoothed, BLUE, label=label, linewidth=1.8)
        words.append(f"training loss went from {show(finite[0])} to {show(_last_finite(smoothed))}")
    if valid:
        axes.plot(*zip(*valid, strict=True), color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="validation")
        words.append(f"validation loss ended at {show(valid[-1][1])}, lowest {show(min(v for _, v in valid))}")
    else:
        words.append("there was no validation")
    if lost:
        words.append(f"the loss of {count(lost, 'step')} was not finite, shown as gaps")
    style_axes(axes, "step", "nats per token")
    if lost and len(steps) > 1:  # also the steps without a loss belong to the run
        room = 0.04 * (steps[-1] - steps[0])
        axes.set_xlim(steps[0] - room, steps[-1] + room)
    legend(axes)
    caption = "Training and validation loss in nats per token, over optimizer steps."
    if lost:
        caption += f" Gaps: {count(lost, 'step')} whose loss was not finite."
    return picture(title, caption, _sentence("Loss over steps", words), figure)


def balance(run: Run) -> Picture:
    """Largest over mean load over steps: the worst single layer, and the pool as a whole. 1 is perfect."""
    title = "Balance over time"
    lines = {"worst layer": "load.layer_max_over_mean", "pool": "load.pool_max_over_mean"}
    drawn = {label: run.series(path) for label, path in lines.items()}
    drawn = {label: xy for label, xy in drawn.items() if any(map(math.isfinite, xy[1]))}
    if not drawn:
        return Picture(title, "No load was recorded.")
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    words = []
    highest = 1.0
    for label, colour in zip(lines, (ORANGE, BLUE), strict=True):
        if label not in drawn:
            continue
        steps, values = drawn[label]
        _line(axes, steps, values, colour, label=label, linewidth=1.4)
        highest = max(highest, *(v for v in values if math.isfinite(v)))
        words.append(f"{label} ended at {show(_last_finite(values))}")
    axes.axhline(1.0, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="perfect")
    style_axes(axes, "step", "largest / mean load")
    if highest > 12:
        log_scale(axes)
    legend(axes)
    caption = "Tokens of the busiest expert over the mean: in the worst layer, and over the whole pool. 1 is perfect."
    return picture(title, caption, _sentence("Largest over mean load", words), figure)


def step_time(run: Run) -> Picture:
    """Seconds per optimizer step, with the median of the steady steps."""
    title = "Step time"
    steps, seconds = run.series("step_seconds")
    if not any(map(math.isfinite, seconds)):
        return Picture(title, "No step time was recorded.")
    middle = run.steady_median("step_seconds")
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    _line(axes, steps, seconds, BLUE, linewidth=1.2)
    if math.isfinite(middle):
        axes.axhline(
            middle, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 3)), label=f"median {show(middle, 3, ' s')}"
        )
        legend(axes)
    style_axes(axes, "step", "seconds")
    finite = [s for s in seconds if math.isfinite(s)]
    usual = [s for s in (number(line, "step_seconds") for line in run.steady()) if math.isfinite(s)] or finite
    top = 1.2 * min(max(usual), 4 * median(usual))  # a slow first step must not flatten the rest
    above = sum(s > top for s in finite)
    if top > 0:
        axes.set_ylim(0, top)
    words = [f"median {show(middle)} seconds", f"shortest {show(min(finite))}", f"longest {show(max(finite))}"]
    caption = "Seconds per optimizer step. The median leaves out the first tenth of the steps, at least two."
    if above:
        caption += f" {count(above, 'step')} beyond the top; the longest took {show(max(finite), 3, ' s')}."
    return picture(title, caption, _sentence("Step time", words), figure)


def rate_and_norm(run: Run) -> Picture:
    """Learning rate above, gradient norm (before clipping) below, over the same steps."""
    title = "Learning rate and gradient norm"
    series = [("learning rate", GREEN, *run.series("lr")), ("gradient norm", BLUE, *run.series("grad_norm"))]
    series = [row for row in series if any(map(math.isfinite, row[3]))]
    if not series:
        return Picture(title, "Neither learning rate nor gradient norm was recorded.")
    figure = new_figure(SIZE[0], 4.4)
    words = []
    shared: Axes | None = None
    for i, (label, colour, steps, values) in enumerate(series):
        axes = figure.add_subplot(len(series), 1, i + 1, sharex=shared)
        shared = shared or axes
        _line(axes, steps, values, colour, linewidth=1.3)
        style_axes(axes, "step" if i == len(series) - 1 else "", label)
        if i < len(series) - 1:
            axes.tick_params(labelbottom=False)
        finite = [v for v in values if math.isfinite(v)]
        if label == "gradient norm" and min(finite) > 0 and max(finite) > 20 * median(finite):
            log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
        words.append(f"{label} between {show(min(finite))} and {show(max(finite))}, at the end {show(finite[-1])}")
    caption = "Learning rate of each step, and the norm of the gradient before clipping."
    return picture(title, caption, _sentence("Over the steps", words), figure)


def _line(axes: Axes, steps: Sequence[float], values: Sequence[float], colour: str, **options: Any) -> None:
    """A line over steps, thinned; a single point is a dot, since a line of one point cannot be seen."""
    clean = [v if math.isfinite(v) else math.nan for v in values]
    dot = "o" if sum(map(math.isfinite, clean)) == 1 else None
    axes.plot(*thin(steps, clean), color=colour, marker=dot, **options)


def log_scale(axes: Axes) -> None:
    """A logarithmic axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", labelcolor=SOFT)


def _last_finite(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _sentence(what: str, words: Sequence[str]) -> str:
    return f"{what}: {'; '.join(words)}."
