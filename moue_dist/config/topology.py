"""Which experts of the pool each MoE layer sees: a pure function of small integers.

Legend: L MoE layers, P pool experts, W window, S stride, g group of adjacent layers.
Layer l sees V_l = { (floor(l/g) * S + j) mod P : j = 0..W-1 }, kept sorted by expert id.
The staggered rotation is our reading of MoUE (arXiv 2603.04971); block sharing is ReXMoE's and MoRE's,
the full pool UniPool's (arXiv 2605.06665).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["private", "block", "full", "rotational"]
KINDS: tuple[Kind, ...] = ("private", "block", "full", "rotational")


@dataclass(frozen=True)
class Topology:
    """The windows of all MoE layers over one pool.

    `windows[l]` holds the sorted expert ids that MoE layer `l` (0-based, over all stages) sees. All windows have
    the same width. Example: pool 4, two layers, rotational, window 3, stride 2 -> ((0, 1, 2), (0, 2, 3)).
    """

    pool: int
    windows: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def window(self) -> int:
        return len(self.windows[0]) if self.windows else 0

    @property
    def exposure(self) -> tuple[int, ...]:
        """How many layers see each expert: c_e = sum_l [e in V_l]."""
        seen = [0] * self.pool
        for window in self.windows:
            for e in window:
                seen[e] += 1
        return tuple(seen)

    @property
    def target_share(self) -> tuple[float, ...]:
        """pi_e = (1/L) sum_l [e in V_l] / W_l: the share of all assignments a balanced pool gives to expert e."""
        share = [0.0] * self.pool
        for window in self.windows:
            for e in window:
                share[e] += 1.0 / len(window) / self.layers
        return tuple(share)


def build_topology(kind: Kind, layers: int, pool: int, *, window: int = 0, stride: int = 0, group: int = 1) -> Topology:
    """The windows of `layers` MoE layers over `pool` experts.

    `private`: W = S = P/L, g = 1 (the plain MoE). `block`: W = S = g*P/L (ReXMoE/MoRE). `full`: W = P (UniPool).
    `rotational`: the given window and stride, one step every `group` layers.
    Raises ValueError, naming the configuration key, when the numbers do not fit.
    """
    if layers == 0:
        return Topology(pool, ())
    if kind in ("private", "block"):
        group = 1 if kind == "private" else group
        if layers % group:
            raise ValueError(f"moe.group={group} does not divide the {layers} MoE layers")
        if pool % (layers // group):
            raise ValueError(
                f"moe.pool={pool} is not divisible by {layers // group} "
                f"({'MoE layers' if group == 1 else f'blocks of {group} MoE layers'}), which moe.topology={kind} needs"
            )
        window = stride = pool * group // layers
    elif kind == "full":
        window, stride, group = pool, 0, 1
    elif kind == "rotational":
        if window < 1:
            raise ValueError("moe.topology=rotational needs moe.window, the number of experts that a layer sees")
        if window > pool:
            raise ValueError(f"moe.window={window} is larger than moe.pool={pool}")
        if stride < 1:
            raise ValueError("moe.topology=rotational needs moe.stride of at least 1; use topology=full for one window")
        if group < 1:
            raise ValueError(f"moe.group={group} must be at least 1")
    else:
        raise ValueError(f"moe.topology={kind!r} is not one of {', '.join(KINDS)}")
    windows = tuple(tuple(sorted((i // group * stride + j) % pool for j in range(window))) for i in range(layers))
    return Topology(pool, windows)
