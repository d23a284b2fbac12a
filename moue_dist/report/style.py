"""How pictures look: matplotlib's object API without pyplot, SVG out, one drawing for light and for dark pages.

Figures are drawn in the colours of a light page. `recolour` rewrites those few colours for a dark page, or for a page
of unknown colour, so that a picture is drawn once and reads everywhere. The data colours are Okabe and Ito's, which
stay apart for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moue_dist.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#24292f", "#5b6470", "#d5dae0"
BLUE, ORANGE, GREEN, PINK, SKY, GOLD = "#0072b2", "#d55e00", "#009e73", "#b5578c", "#3fa0d8", "#b98600"
STAGES = (BLUE, ORANGE, GREEN, PINK, SKY, GOLD)

# The same colours where the page is dark; "neutral" reads on both, for a picture whose page is not known.
DARK = {
    INK: "#e3e8ee",
    SOFT: "#a3adb8",
    GRID: "#3a434f",
    BLUE: "#3d9fe0",
    ORANGE: "#f08439",
    GREEN: "#25bd90",
    PINK: "#dc8bbb",
    SKY: "#8fd0f7",
    GOLD: "#e0b436",
}
NEUTRAL = {INK: "#77808a", SOFT: "#7d8690", GRID: "#8b949e"}

RC: Any = {  # matplotlib settings while writing
    "svg.fonttype": "none",  # text stays text: sharp, small, and the reader's own font
    "svg.hashsalt": "moue",  # the same picture gives the same bytes
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, laid out by constrained layout; no window, no global list of figures."""
    from matplotlib.figure import Figure

    # No ground of its own: the page shows through. (savefig's transparent=True would also undo the axes' hatching.)
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def style_axes(axes: Axes, xlabel: str = "", ylabel: str = "") -> None:
    """Quiet axes: no box, a light grid behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=SOFT, which="both", length=0, labelsize=8.5)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel, color=SOFT)
    axes.set_ylabel(ylabel, color=SOFT)


def legend(axes: Axes, **options: Any) -> None:
    """A frameless legend above the axes, where it hides no data."""
    defaults: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "ncols": 4,
        "frameon": False,
        "labelcolor": INK,
        "fontsize": 9,
        "borderaxespad": 0.2,
        "columnspacing": 1.4,
        "handlelength": 1.4,
    }
    axes.legend(**(defaults | options))


def stage_colours(stages: int) -> list[str]:
    """One colour per pipeline stage, 0-based. Beyond six stages the colours repeat: neighbours still differ."""
    return [STAGES[s % len(STAGES)] for s in range(stages)]


def to_svg(figure: Figure) -> str:
    """The figure as SVG text with a transparent ground, in the colours of a light page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without the document type, which names an address


def recolour(svg: str, page: Literal["dark", "neutral"]) -> str:
    """A light page's picture for a dark page, or for a page whose colour is not known."""
    for light, other in (DARK if page == "dark" else NEUTRAL).items():
        svg = svg.replace(light, other)
    return svg


def write_figure(path: Path, figure: Figure, option: str) -> Path:
    """Write a .png, or an .svg that reads on any page. Raises ConfigError, with the option that named the file."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"{option} {path}: name a file that ends in .png or .svg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(recolour(to_svg(figure), "neutral"), encoding="utf-8")
        else:
            figure.savefig(path, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot write it ({error.strerror}); name another file") from None
    return path


def thin(x: Sequence[float], y: Sequence[float], limit: int = 400) -> tuple[list[float], list[float]]:
    """At most about `limit` points of a line that keep its look: the lowest and the highest of each bin of steps."""
    if len(x) <= limit:
        return list(x), list(y)
    bins = limit // 2
    xs: list[float] = []
    ys: list[float] = []
    for b in range(bins):
        part = range(b * len(x) // bins, (b + 1) * len(x) // bins)
        finite = [i for i in part if y[i] == y[i]] or list(part)[:1]
        for i in sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}):
            xs.append(x[i])
            ys.append(y[i])
    return xs, ys


def smooth(y: Sequence[float], width: int) -> list[float]:
    """Exponential moving average over about `width` points, corrected for its start; NaNs are passed over."""
    keep = 1 - 1 / max(1, width)
    total = weight = 0.0
    result = []
    for value in y:
        if abs(value) < float("inf"):  # false for NaN too
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            result.append(total / weight)
        else:
            result.append(float("nan"))
    return result
