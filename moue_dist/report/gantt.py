"""The picture of time: what every pipeline stage did in a recorded step, above the same step without any waiting."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from moue_dist.config import ConfigError
from moue_dist.measuring.run_folder import Run, read_run
from moue_dist.measuring.slots import (
    WORK,
    Lane,
    Shares,
    Step,
    bubble,
    ideal,
    ideal_bubble,
    mean_times,
    read_steps,
    shares,
)
from moue_dist.parallel.recording.spans import Span
from moue_dist.report.html import Picture, count, share, show
from moue_dist.report.style import (
    BLUE,
    GOLD,
    GREEN,
    INK,
    PINK,
    SOFT,
    legend,
    new_figure,
    recolour,
    style_axes,
    to_svg,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"forward": BLUE, "backward": GREEN, "serve": PINK, "transfer": GOLD, "optimizer": SOFT}
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "serve": "experts for other stages",
    "transfer": "transfer, with its wait",
    "optimizer": "reduction and optimizer",
}
IDLE = (SOFT, 0.25)  # lets the page through, so that it stays apart from the optimizer's on any page
ON_FILL, ON_FILL_DARK = "#fffffe", "#0f1318"  # numbers in the boxes; dark pages have lighter boxes
MOST_LANES, FEW_RANKS = 24, 8
WIDTH = 10.8  # inches: a wide picture
FINEST = 1500  # marks nearer to each other than this part of the picture's width are drawn as one
Band = Literal["whole", "upper", "lower"]
BANDS: dict[Band, tuple[float, float]] = {"whole": (-0.4, 0.8), "upper": (-0.4, 0.4), "lower": (0.0, 0.4)}
STRIP = 0.2  # height of what is drawn on top of a forward or backward; a lane is 1 high, its box 0.8


def picture_of_time(run: Run) -> Picture | None:
    """The last recorded step of a run as a Gantt chart beside its ideal; None where the run recorded none."""
    title, steps = "The pipeline over time", read_steps(run.folder)
    if steps is None:
        return None
    if not steps:
        return Picture(title, "timeline.json holds no step that can be read.", kind="wide")
    step = steps[-1]
    svg = to_svg(draw_time(step))
    dark = recolour(svg, "dark").replace(ON_FILL, ON_FILL_DARK)
    return Picture(title, _caption(steps), describe_time(step), svg, dark, "wide")


def write_picture_of_time(run_dir: Path, path: Path) -> Path:
    """Draw a run's last recorded step into `path`, a .png or .svg file. Raises ConfigError where there is none."""
    steps = read_steps(read_run(run_dir).folder)
    if not steps:
        why = "recorded no slots: train it with train.record_slots=true"
        if steps is not None:
            why = "has a timeline.json without a step that can be read"
        raise ConfigError(f"--timeline: {run_dir} {why}")
    return write_figure(path, draw_time(steps[-1]), "--timeline")


def draw_time(step: Step) -> Figure:
    """Two charts to one scale: the measured lanes, one per stage or rank, and the ideal, one per stage."""
    lanes = shown(step)
    forward, backward = mean_times(step)
    best = ideal(step, forward, backward)[:MOST_LANES]
    zero = step.start
    measured_end = max(step.end, *(s.end for lane in lanes for s in lane.spans)) - zero
    best_end = max(s.end for lane in best for s in lane.spans)
    unit, scale = _unit(max(measured_end, best_end))
    figure = new_figure(WIDTH, 1.5 + 0.36 * (len(lanes) + len(best)))
    grid = figure.add_gridspec(2, 1, height_ratios=[len(lanes) + 0.6, len(best) + 0.6])
    above = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=above)
    width = 1.02 * max(measured_end, best_end)
    for axes, rows, start, end in ((above, lanes, zero, step.end - zero), (below, best, 0.0, best_end)):
        for y, lane in enumerate(rows):
            axes.broken_barh([(0, end * scale)], (y - 0.4, 0.8), facecolors=IDLE, linewidth=0)
            _draw_lane(axes, lane, y, start, scale, width)
        style_axes(axes)
        axes.grid(False)
        axes.set_xlim(0, width * scale)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), _lane_names(rows), color=INK)
        axes.spines["left"].set_visible(False)
    below.set_xlabel(unit, color=SOFT)
    above.tick_params(labelbottom=False)
    words = f"ideal: forward {_time(forward)}, backward {_time(backward)}, nothing else"
    below.set_title(words, loc="left", fontsize=9, color=SOFT)
    _legend(above, lanes)
    return figure


def describe_time(step: Step) -> str:
    """The picture in words, for those who cannot see it."""
    start, end = step.start, step.end
    forward, backward = mean_times(step)
    microbatches = f"{step.microbatches:,} microbatch" + ("es" if step.microbatches > 1 else "")
    text = f"Step {step.step}, {step.schedule}, {count(step.pipeline, 'stage')}, {microbatches}: "
    text += f"{_time(end - start)} from the first forward to the last backward; "
    text += f"mean forward {_time(forward)}, mean backward {_time(backward)}, without the transfers inside. "
    text += f"{_bubbles(step)} "
    rows = []
    lanes = shown(step)
    for lane, name in zip(lanes, _lane_names(lanes), strict=True):
        rows.append(f"{name}: {_shares_in_words(shares(lane, start, end))}")
    return text + "; ".join(rows) + "."


def shown(step: Step) -> list[Lane]:
    """The lanes to draw: all ranks where they are few, else the first of each stage."""
    if len(step.lanes) <= FEW_RANKS:
        return list(step.lanes)
    first: dict[int, Lane] = {}
    for lane in step.lanes:
        first.setdefault(lane.stage, lane)
    return [first[stage] for stage in sorted(first)][:MOST_LANES]


def _draw_lane(axes: Axes, lane: Lane, y: float, zero: float, scale: float, width: float) -> None:
    """Boxes of one lane. Forward and backward take half the height each where they overlap, on two streams."""
    finest = width / FINEST
    bands = _bands(lane, finest)
    work = [s for s in lane.spans if s.kind in WORK]
    for kind in WORK:
        mine = [s for s in work if s.kind == kind]
        low, height = BANDS[bands[kind]]
        boxes = [(s.start - zero, s.end - zero) for s in mine]
        # A hair between neighbours tells microbatches apart, where they are wide enough to lose one.
        boxes = [(a, b - 2 * finest if b - a > 12 * finest else b) for a, b in boxes]
        _boxes(axes, boxes, y + low, height, COLOURS[kind], scale, finest)
        for s in mine:
            label = "" if s.microbatch is None else str(s.microbatch)
            if label and s.end - s.start > (0.006 + 0.006 * len(label)) * width:
                axes.text(
                    (s.start + s.end - 2 * zero) / 2 * scale, y + low + height / 2, label, ha="center", va="center",
                    size=7, color=ON_FILL, zorder=4, clip_on=True,
                )  # fmt: skip
    transfers = [(t.start - zero, t.end - zero) for t in lane.spans if t.kind == "transfer"]
    grounds = [_sorted(s for s in work if s.kind == kind) for kind in WORK]
    for kind in ("optimizer", "serve", "transfer"):
        inside: list[tuple[float, float]] = []
        outside: list[tuple[float, float]] = []
        for s in lane.spans:
            if s.kind == kind:
                (inside if any(_is_inside(s, ground) for ground in grounds) else outside).append(
                    (s.start - zero, s.end - zero)
                )
        strip = -0.4 if kind == "serve" else 0.4 - STRIP
        _boxes(axes, inside, y + strip, STRIP, COLOURS[kind], scale, finest, 3)
        # A wait is no work: where nothing else goes on it is a strip on the idle ground.
        low, height = (strip, STRIP) if kind == "transfer" else (-0.4, 0.8)
        if kind == "serve":
            outside = without(outside, transfers)
        _boxes(axes, outside, y + low, height, COLOURS[kind], scale, finest, 3 if kind == "transfer" else 2)


def without(boxes: Sequence[tuple[float, float]], holes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What is left of boxes (start, end) outside the holes. [(0, 9)] without [(2, 4)] is [(0, 2), (4, 9)]."""
    left = []
    for start, end in boxes:
        for a, b in sorted(hole for hole in holes if hole[1] > start and hole[0] < end):
            if a > start:
                left.append((start, a))
            start = max(start, b)
        if end > start:
            left.append((start, end))
    return left


def _boxes(
    axes: Axes,
    boxes: Sequence[tuple[float, float]],
    low: float,
    height: float,
    colour: str,
    scale: float,
    finest: float,
    zorder: int = 2,
) -> None:
    """Filled boxes of (start, end); those too near to each other to be told apart become one."""
    merged: list[list[float]] = []
    for a, b in sorted(boxes):
        if merged and a - merged[-1][1] < 0.5 * finest and (b - a < 4 * finest or a < merged[-1][1]):
            merged[-1][1] = max(merged[-1][1], b)
        else:
            merged.append([a, b])
    if merged:
        bars = [(a * scale, max(b - a, 0.5 * finest) * scale) for a, b in merged]
        axes.broken_barh(bars, (low, height), facecolors=colour, linewidth=0, zorder=zorder)


def _bands(lane: Lane, finest: float) -> dict[str, Band]:
    forward, backward = (_sorted(s for s in lane.spans if s.kind == kind) for kind in WORK)
    overlap = any(_overlap(b, forward) > finest for b in backward) or any(
        _overlap(f, backward) > finest for f in forward
    )
    return {"forward": "upper", "backward": "lower"} if overlap else {"forward": "whole", "backward": "whole"}


def _sorted(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda s: s.start)


def _last_before(span: Span, ground: Sequence[Span]) -> Span | None:
    """The last of `ground` (by start, not overlapping each other) that starts no later than `span`."""
    i = bisect_right(ground, span.start, key=lambda g: g.start)
    return ground[i - 1] if i else None


def _is_inside(span: Span, ground: Sequence[Span]) -> bool:
    """Whether the span lies inside one of `ground`."""
    found = _last_before(span, ground)
    return found is not None and span.end <= found.end


def _overlap(span: Span, ground: Sequence[Span]) -> float:
    """Seconds that the span shares with the one of `ground` under way at its start."""
    found = _last_before(span, ground)
    return 0.0 if found is None else min(span.end, found.end) - span.start


def _legend(axes: Axes, lanes: Sequence[Lane]) -> None:
    from matplotlib.patches import Patch

    used = {s.kind for lane in lanes for s in lane.spans}
    handles = [Patch(color=colour, label=NAMES[kind]) for kind, colour in COLOURS.items() if kind in used]
    legend(axes, handles=[*handles, Patch(color=IDLE, linewidth=0, label="idle")], ncols=6)


def _lane_names(lanes: Sequence[Lane]) -> list[str]:
    several = len({lane.stage for lane in lanes}) < len(lanes)
    return [f"stage {lane.stage}" + (f", rank {lane.rank}" if several else "") for lane in lanes]


def _unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds >= 2 else ("milliseconds", 1e3)


def _time(seconds: float) -> str:
    return show(seconds, 3, " s") if seconds >= 2 else show(1e3 * seconds, 3, " ms")


def _bubbles(step: Step) -> str:
    """The measured bubble against the formula's."""
    v, m, ramp = step.virtual, step.microbatches, step.pipeline - 1
    formula = "(PP-1)/(M+PP-1)" if v == 1 else "(PP-1)/(V·M+PP-1)"
    best = share(ideal_bubble(step.pipeline, m, v))
    return f"Bubble measured {share(bubble(step))}, ideal {formula} = {ramp}/{v * m + ramp} = {best}."


def _shares_in_words(s: Shares) -> str:
    names = ("forward", "backward", "serve", "exchange", "waiting", "idle")
    words = ("forward", "backward", "experts for other stages", "transfers inside", "waiting for a transfer", "idle")
    told = [(word, getattr(s, name) / s.total) for name, word in zip(names, words, strict=True)]
    return ", ".join(f"{word} {share(value)}" for word, value in told if value >= 5e-4)


def _caption(steps: Sequence[Step]) -> str:
    step = steps[-1]
    text = f"Step {step.step}, {step.schedule}. {_bubbles(step)} "
    text += "The bubble is the share of the time between the first forward and the last backward in which a stage has "
    text += "no microbatch of its own and serves no other, waits between stages included, mean over the ranks"
    layout = (step.schedule, step.pipeline, step.microbatches)
    same = [s for s in steps if (s.schedule, s.pipeline, s.microbatches) == layout]
    if len(same) > 1:
        text += f"; median of {len(same)} recorded steps {share(median(map(bubble, same)))}"
    text += ". Numbers are microbatches. Strips on a forward or backward are time inside it. "
    if len(shown(step)) < len(step.lanes):
        text += "Drawn is the first rank of each stage. "
    return text + "Ranks share their zero by a barrier before the step."
