"""The pictures of who used which expert: a heat map over layers and pool, and the pool sorted by use.

Both read the latest `usage` line: tokens routed to each expert in each MoE layer since the line before. Whether a
layer could see an expert comes from the configuration's topology, so that 'not in this layer's window' and 'seen but
never chosen' are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moue_dist.measuring.run_folder import Run
from moue_dist.report.figures import SIZE, picture
from moue_dist.report.html import Picture, count, show
from moue_dist.report.style import BLUE, GRID, INK, ORANGE, SOFT, legend, new_figure, stage_colours, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING = "No expert use was recorded."


@dataclass(frozen=True)
class Usage:
    """One usage line. Shapes: counts_lp and visible_lp [L, P]; layers are the model's layer numbers, from 1."""

    step: int
    layers: list[int]
    counts_lp: np.ndarray
    visible_lp: np.ndarray  # bool
    known: bool  # whether visible_lp comes from the configuration; else: whoever got a token was visible

    @property
    def pool_p(self) -> np.ndarray:
        """Tokens per expert over all layers, [P]."""
        return self.counts_lp.sum(axis=0)

    @property
    def dead(self) -> int:
        """Experts without a token in any layer; those that no layer sees are not counted, where that is known."""
        idle_p = self.pool_p == 0
        return int((idle_p & self.visible_lp.any(axis=0) if self.known else idle_p).sum())

    @property
    def strays(self) -> int:
        """Cells with tokens outside the layer's window: always 0 unless configuration and metrics disagree."""
        return int(((self.counts_lp > 0) & ~self.visible_lp).sum())


def latest_usage(run: Run) -> Usage | None:
    """The run's last usage line, or None."""
    if not run.usage:
        return None
    line = run.usage[-1]
    counts_lp = np.asarray(line["counts"], dtype=np.float64)
    topology = run.topology()
    known = topology is not None and (topology.layers, topology.pool) == counts_lp.shape
    visible_lp = counts_lp > 0
    if topology is not None and known:
        visible_lp = np.zeros(counts_lp.shape, dtype=bool)
        for row, window in zip(visible_lp, topology.windows, strict=True):
            row[list(window)] = True
    return Usage(int(line["step"]), [int(n) for n in line["layers"]], counts_lp, visible_lp, known)


def relative_load(usage: Usage) -> np.ndarray:
    """Use over an even share of the layer's tokens, [L, P]: 1 is balanced, 0 unused, NaN not in the layer's window."""
    total_l = usage.counts_lp.sum(axis=1, keepdims=True)
    window_l = usage.visible_lp.sum(axis=1, keepdims=True)
    even_l = np.maximum(total_l, 1e-9) / np.maximum(window_l, 1)
    return np.where(usage.visible_lp | (usage.counts_lp > 0), usage.counts_lp / even_l, np.nan)


def heat_map(run: Run, usage: Usage | None) -> Picture:
    """Expert use per layer, MoE layers down and pool experts across."""
    title = "Expert use per layer"
    if usage is None or usage.counts_lp.sum() == 0:
        return Picture(title, NOTHING, kind="wide")
    load_lp = relative_load(usage)
    seen = np.isfinite(load_lp)
    unused = int((load_lp == 0).sum())
    layers, pool = load_lp.shape
    figure = _draw_heat_map(usage, load_lp, run.layer_to_stage())
    caption = (
        f"Tokens that each layer sent to each expert before step {usage.step}, as a multiple of an even share of that "
        f"layer's window."
    )
    if not seen.all():
        caption += " Hatched: not in the layer's window."
    if unused:
        caption += f" Orange: in the window but unused ({unused} of {int(seen.sum())} cells)."
    if not usage.known:
        caption += " The windows are not known, so cells without a token count as not seen."
    if usage.known and usage.strays:
        caption += (
            f" {usage.strays} cells outside the configured windows have tokens: configuration and metrics differ."
        )
    worst = int(np.nanargmax(np.where(seen, load_lp, -1.0).max(axis=1)))
    alternative = (
        f"Heat map of {layers} MoE layers by {pool} experts. Each layer uses "
        f"{int(seen.sum(axis=1).min())} to {int(seen.sum(axis=1).max())} experts of the pool. The most uneven layer is "
        f"layer {usage.layers[worst]}, whose busiest expert has {show(float(np.nanmax(load_lp[worst])))} times an even "
        f"share. {unused} visible cells are unused."
    )
    return picture(title, caption, alternative, figure, "wide")


def pool_use(usage: Usage | None) -> Picture:
    """Use of each expert over all layers, busiest first."""
    title = "Use of the whole pool"
    if usage is None or usage.pool_p.sum() == 0:
        return Picture(title, NOTHING)
    load = np.sort(usage.pool_p / usage.pool_p.mean())[::-1]
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    axes.stairs(load, np.arange(len(load) + 1), fill=True, color=BLUE, linewidth=0)
    axes.axhline(1.0, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 3)), label="mean")
    axes.text(
        0.98, 0.93, f"largest / mean {show(float(load[0]))}\ndead experts {usage.dead} of {len(load)}",
        transform=axes.transAxes, ha="right", va="top", color=INK, size=9.5, linespacing=1.5,
    )  # fmt: skip
    style_axes(axes, "experts, busiest first", "tokens / mean")
    axes.set_xlim(0, len(load))
    axes.set_ylim(0, float(load[0]) * 1.35)
    legend(axes)
    half = int(np.searchsorted(np.cumsum(load), load.sum() / 2) + 1)
    caption = (
        f"Tokens per expert over all layers before step {usage.step}, busiest first, as a multiple of the mean. "
        + (f"{count(usage.dead, 'expert')} got no token." if usage.dead else "Every expert got tokens.")
    )
    alternative = (
        f"Use of {len(load)} experts, sorted: the busiest has {show(float(load[0]))} times the mean, the least used "
        f"{show(float(load[-1]))}; {half} experts do half of the work; {usage.dead} are dead."
    )
    return picture(title, caption, alternative, figure)


def _draw_heat_map(usage: Usage, load_lp: np.ndarray, stages: list[int]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    layers, pool = load_lp.shape
    height = min(7.5, 1.5 + 0.26 * max(6, layers))
    figure = new_figure(9.0, height)
    axes = figure.add_subplot()
    # A few very busy cells must not darken all others: the scale ends at the 99th percentile, and says so.
    top = max(2.0, float(np.nanpercentile(load_lp, 99)))
    norm, colours = Normalize(0.0, top), colormaps["cividis"]
    pixels = colours(norm(np.nan_to_num(load_lp)))
    pixels[load_lp == 0] = to_rgba(ORANGE)
    pixels[~np.isfinite(load_lp)] = (0.0, 0.0, 0.0, 0.0)
    style_axes(axes, "expert of the pool", "layer")
    axes.grid(False)
    axes.patch.set(hatch="//////", edgecolor=GRID, facecolor="none", linewidth=0)
    axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(-0.5, pool - 0.5, layers - 0.5, -0.5))
    if pool % 8 == 0:  # the strides of pools are round in powers of two
        axes.set_xticks(range(0, pool + 1, pool // 8))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.set_xlim(-0.5, pool - 0.5)
    every = max(1, layers // 16)
    axes.set_yticks(range(0, layers, every), [str(n) for n in usage.layers[::every]])
    if layers <= 40:
        for y in range(1, layers):
            axes.axhline(y - 0.5, color=GRID, linewidth=0.5)
    if len(stages) == layers and len(set(stages)) > 1:
        _mark_stages(axes, stages)
    over = bool(np.nanmax(load_lp) > top)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        pad=0.01,
        fraction=0.03,
        aspect=8 * height,
        extend="max" if over else "neither",
    )
    bar.set_label("times an even share", color=SOFT)
    bar.ax.tick_params(colors=SOFT, length=0, labelsize=8.5)
    bar.outline.set_visible(False)
    handles = []
    if not np.isfinite(load_lp).all():
        handles.append(
            Patch(facecolor="none", edgecolor=SOFT, hatch="//////", linewidth=0.5, label="not in the window")
        )
    if (load_lp == 0).any():
        handles.append(Patch(facecolor=ORANGE, label="in the window, unused"))
    if handles:
        legend(axes, handles=handles)
    return figure


def _mark_stages(axes: Axes, stages: list[int]) -> None:
    """A strip of the stages' colours along the left edge, the same colours as in the picture of the ring."""
    from matplotlib.patches import Rectangle

    colours = stage_colours(max(stages) + 1)
    for layer, stage in enumerate(stages):
        box = Rectangle(
            (-0.012, layer - 0.5), 0.008, 1.0, transform=axes.get_yaxis_transform(), clip_on=False, linewidth=0,
            facecolor=colours[stage],
        )  # fmt: skip
        axes.add_patch(box)
    axes.tick_params(axis="y", pad=9)
