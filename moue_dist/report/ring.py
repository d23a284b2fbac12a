"""The picture of the pool: a ring of experts, one arc per MoE layer over the experts that this layer sees, and around
them, where a placement is given, the stages that hold each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moue_dist.config.topology import Topology, build_topology
from moue_dist.parallel.placement.placement import Placement
from moue_dist.report.style import GRID, INK, SOFT, new_figure, stage_colours, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTER, INNER = 1.0, 0.42  # radii of the ring of experts and of the innermost arc
COPY, MOST_COPIES = 0.055, 6  # width of one copy's band outside of the ring, and how many are drawn


def arcs(window: Sequence[int], pool: int) -> list[tuple[int, int]]:
    """The window as runs (first expert, length) of neighbours on the ring. Example: [0, 1, 7] of 8 -> [(7, 3)]."""
    seen = set(window)
    if len(seen) == pool:
        return [(0, pool)]
    runs = []
    for first in sorted(e for e in seen if (e - 1) % pool not in seen):
        length = 1
        while (first + length) % pool in seen:
            length += 1
        runs.append((first, length))
    return runs


def reached_by(topology: Topology, layer_to_stage: Sequence[int]) -> list[set[int]]:
    """The pipeline stages whose layers see each expert."""
    stages: list[set[int]] = [set() for _ in range(topology.pool)]
    for window, stage in zip(topology.windows, layer_to_stage, strict=True):
        for e in window:
            stages[e].add(stage)
    return stages


def draw_ring(topology: Topology, layer_to_stage: Sequence[int], placement: Placement | None = None) -> Figure:
    """The ring of `topology.pool` experts, clockwise from the top, with each layer's window as an arc inside it.

    `layer_to_stage[l]` is the pipeline stage (0-based) of MoE layer `l`; it colours the arc. The first layer's arc is
    the outermost. An expert has the colour of the one stage that reaches it, or is dark where several stages share it.
    Outside of the ring every copy of an expert is a mark in the colour of the stage that holds it: a colour that none
    of the windows under it has means that tokens travel.
    Raises ValueError where `layer_to_stage` has another length than the topology.
    """
    copies = min(MOST_COPIES, max(map(len, placement.holders), default=0)) if placement else 0
    figure = new_figure(5.0 + 0.3 * copies, 5.0 + 0.3 * copies)
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.set_axis_off()
    colours = stage_colours(max(placement.pipeline if placement else 1, max(layer_to_stage, default=0) + 1))
    stages = reached_by(topology, layer_to_stage)
    _draw_experts(axes, stages, colours)
    step = min(0.09, (OUTER - 0.1 - INNER) / max(1, topology.layers - 1))
    for layer, (window, stage) in enumerate(zip(topology.windows, layer_to_stage, strict=True)):
        radius, runs = OUTER - 0.1 - layer * step, arcs(window, topology.pool)
        _draw_window(axes, runs, topology.pool, radius, min(0.6 * step, 0.05), colours[stage])
        if topology.layers <= 24:
            first, length = runs[0]
            x, y = _point(first - 0.5, topology.pool, radius, back=0.0 if length == topology.pool else 0.035)
            axes.text(x, y, str(layer + 1), ha="center", va="center", size=8 if topology.layers <= 10 else 6, color=INK)
    if placement:
        _draw_copies(axes, placement, colours)
    used = set(layer_to_stage) | ({s for at in placement.holders for s in at} if placement else set())
    _label(axes, topology, stages, colours, used=sorted(used))
    edge = OUTER + 0.12 + COPY * copies
    axes.set_xlim(-edge, edge)
    axes.set_ylim(-edge, edge)
    return figure


def describe_ring(topology: Topology, layer_to_stage: Sequence[int], placement: Placement | None = None) -> str:
    """The picture in words, for those who cannot see it."""
    stages = reached_by(topology, layer_to_stage)
    shared, unseen = sum(len(s) > 1 for s in stages), sum(not s for s in stages)
    count = len(set(layer_to_stage))
    text = f"A ring of {topology.pool} experts; {topology.layers} MoE layers each see a window of {topology.window}."
    if count > 1:
        text += f" {shared} of the experts are shared by several of the {count} pipeline stages."
    if unseen:
        text += f" {unseen} experts are in no layer's window."
    if placement:
        held = [len(at) for at in placement.holders]
        travel = sum(not reached <= set(at) for reached, at in zip(stages, placement.holders, strict=True))
        text += (
            f" The outer marks show which stage holds each expert: {sum(held)} copies in all, at most {max(held)} of "
            f"one; tokens travel to {travel} experts on other stages."
        )
    return text


def write_ring_picture(
    path: Path, topology: Topology, layer_to_stage: Sequence[int], placement: Placement | None = None
) -> Path:
    """Draw the ring into `path`, a .png or .svg file; raises ConfigError where that is not possible."""
    return write_figure(path, draw_ring(topology, layer_to_stage, placement), "--picture")


def write_pool_picture(path: Path) -> Path:
    """Write the picture of the documentation: 64 experts, 8 layers on 4 stages, windows of 16 that move on by 8."""
    topology = build_topology("rotational", 8, 64, window=16, stride=8)
    return write_ring_picture(path, topology, [layer // 2 for layer in range(8)])


def _angle(position: float, pool: int) -> float:
    """Degrees, anticlockwise from the right as matplotlib counts, of a position on the ring; 0 is the top."""
    return 90.0 - 360.0 * position / pool


def _point(position: float, pool: int, radius: float, back: float = 0.0) -> tuple[float, float]:
    """A point on the ring, moved `back` (units of the axes) anticlockwise along it."""
    angle = math.radians(_angle(position, pool)) + back / radius
    return radius * math.cos(angle), radius * math.sin(angle)


def _draw_experts(axes: Axes, stages: Sequence[set[int]], colours: Sequence[str]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle, Wedge

    pool = len(stages)
    fills = [GRID if not s else INK if len(s) > 1 else colours[next(iter(s))] for s in stages]
    shapes: list[Circle | Wedge] = []
    if pool <= 96:
        size = min(0.04, 0.42 * 2 * math.pi * OUTER / pool)
        shapes += [Circle(_point(e, pool, OUTER), size) for e in range(pool)]
    else:  # too many for dots: a band, one piece per run of experts of one colour
        starts = [e for e in range(pool) if e == 0 or fills[e] != fills[e - 1]]
        for first, end in zip(starts, [*starts[1:], pool], strict=True):
            angles = _angle(end - 0.5, pool), _angle(first - 0.5, pool)
            shapes.append(Wedge((0, 0), OUTER + 0.03, *angles, width=0.06))
        fills = [fills[first] for first in starts]
    axes.add_collection(PatchCollection(shapes, facecolors=fills, edgecolors="none"))


def _draw_copies(axes: Axes, placement: Placement, colours: Sequence[str]) -> None:
    """Marks outside of the ring: the i-th holder of an expert in the i-th band."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Wedge

    pool, shapes, fills = placement.pool, [], []
    for band in range(MOST_COPIES):
        holder = [at[band] if len(at) > band else None for at in placement.holders]
        starts = [e for e in range(pool) if e == 0 or holder[e] != holder[e - 1] or pool <= 96]
        for first, end in zip(starts, [*starts[1:], pool], strict=True):
            stage = holder[first]
            if stage is not None:
                gap = 0.12 if pool <= 96 else 0.0  # single experts stand apart
                angles = _angle(end - 0.5 - gap, pool), _angle(first - 0.5 + gap, pool)
                shapes.append(Wedge((0, 0), OUTER + 0.06 + COPY * (band + 0.8), *angles, width=0.8 * COPY))
                fills.append(colours[stage])
    axes.add_collection(PatchCollection(shapes, facecolors=fills, edgecolors="none"))


def _draw_window(
    axes: Axes, runs: Sequence[tuple[int, int]], pool: int, radius: float, width: float, colour: str
) -> None:
    from matplotlib.patches import Wedge

    for first, length in runs:
        start, end = first - 0.5, first + length - 0.5
        if length == pool:  # leave room for the layer's number
            gap = 0.05 / radius / (2 * math.pi) * pool
            start, end = start + gap, end - gap
        shape = Wedge(
            (0, 0), radius + width / 2, _angle(end, pool) + 0.6, _angle(start, pool) - 0.6, width=width, linewidth=0
        )
        shape.set_facecolor(colour)
        axes.add_patch(shape)


def _label(axes: Axes, topology: Topology, stages: Sequence[set[int]], colours: Sequence[str], used: list[int]) -> None:
    from matplotlib.lines import Line2D

    lines = (f"{topology.pool} experts", f"{topology.layers} MoE layers", f"see {topology.window} each")
    for line, y, size, colour in zip(lines, (0.09, -0.03, -0.12), (11, 8.5, 8.5), (INK, SOFT, SOFT), strict=True):
        axes.text(0, y, line, ha="center", va="center", size=size, color=colour)
    marks = [(colours[s], f"stage {s}") for s in used] if len(used) <= 8 else []
    if any(len(s) > 1 for s in stages):
        marks.append((INK, "shared by stages"))
    if any(not s for s in stages):
        marks.append((GRID, "in no window"))
    handles = [Line2D([], [], color=c, marker="o", linestyle="none", markersize=6, label=text) for c, text in marks]
    if len(used) > 1 or len(marks) > 1:
        axes.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5, frameon=False, labelcolor=INK,
            fontsize=8.5, handletextpad=0.2, columnspacing=1.2, borderaxespad=0.0,
        )  # fmt: skip
