"""Chooses a placement: `replicate`, `home` or `hybrid`, from windows, stages, degrees, measured use and a budget.

Pure, deterministic, free of torch; the same arguments give the same placement on every rank.

- `replicate`: every stage whose layers see an expert holds it, in column `e % EP`.
- `home`: every expert has one cell. Cells differ by at most one expert: P experts over C = PP * EP cells are
  floor(P/C) each, and P mod C cells have one more. The rule:
  1. Stages, by locality. Experts in the order of what a wrong stage would cost (use by the first stage minus use by the
     second, then total use, then id) go to the stage that uses them most among those with room; equals go to the stage
     with the least load. Then experts move in cycles of stages as long as that makes more rows local: with no such
     cycle left no other assignment of these sizes is more local.
  2. Stages, by load. While some stage serves more than (1 + SLACK) of the mean, it swaps experts with a lighter stage,
     those that lose least locality per row of load; below that, only swaps that lose none.
  3. Columns. Within a stage, experts in descending use go to the column with the least load that has room; then the
     busiest column swaps as long as that makes it lighter.
- `hybrid`: `home`, and the copies that a budget allows; see `hybrid.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moue_dist.parallel.placement.costs import ExpertBytes, Floats, Ints, stage_use
from moue_dist.parallel.placement.hybrid import buy_copies
from moue_dist.parallel.placement.placement import Placement, replicate

Kind = Literal["replicate", "home", "hybrid"]
SLACK = 0.05  # of the mean load of a stage, that locality may cost


def plan_placement(
    kind: Kind,
    windows: Sequence[Sequence[int]],
    stage_of_layer: Sequence[int],
    pool: int,
    pipeline: int,
    expert_parallel: int,
    *,
    use: Sequence[Sequence[float]] | Floats | None = None,
    expert_bytes: ExpertBytes | None = None,
    budget_bytes: int = 0,
    expert_data: int = 1,
) -> Placement:
    """Who holds every expert. `windows[l]` are the ids that MoE layer l sees, `stage_of_layer[l]` its pipeline stage.

    `use[l][e]` are measured tokens of layer l for expert e (None: each layer spreads evenly over its window).
    `budget_bytes`, for `hybrid`, bounds each GPU's weights, gradients and optimizer state of the pool, of which
    `expert_bytes` tells the sizes; `expert_data` ranks share a cell.
    Raises ValueError where the arguments do not fit each other, BudgetError where the budget is too small.
    """
    everywhere = replicate(windows, stage_of_layer, pool, pipeline, expert_parallel)  # refuses experts that none sees
    if kind == "replicate":
        return everywhere
    used = stage_use(windows, stage_of_layer, pool, pipeline, use)
    placement = _home(used, expert_parallel)
    if kind == "home" or budget_bytes == 0:
        return placement
    if expert_bytes is None:
        raise ValueError("a hybrid placement needs to know the bytes of an expert")
    return buy_copies(placement, everywhere, used, expert_bytes, budget_bytes, expert_data)


def _home(use: Floats, ep: int) -> Placement:
    stages, pool = use.shape
    least, extra = divmod(pool, stages * ep)
    stage_of = _nearest_stages(use, least * ep, ep, extra)
    _make_local(use, stage_of, least * ep, (least + (extra > 0)) * ep)
    _level_stages(use, stage_of)
    columns = np.zeros(pool, dtype=np.int64)
    for s in range(stages):
        mine = np.flatnonzero(stage_of == s)
        columns[mine] = _spread(use.sum(0)[mine], ep, least)
    holders = tuple((s,) for s in stage_of.tolist())
    return Placement(stages, ep, holders, tuple(columns.tolist()))


def _nearest_stages(use: Floats, least: int, ep: int, extra: int) -> Ints:
    """A first assignment: every stage gets `least` experts and up to `ep` of the `extra` ones."""
    stages, pool = use.shape
    total = use.sum(0)
    ranked = np.sort(use, axis=0)
    regret = ranked[-1] - ranked[-2] if stages > 1 else ranked[-1]
    stage_of = np.zeros(pool, dtype=np.int64)
    count, load = np.zeros(stages, dtype=np.int64), np.zeros(stages)
    for e in np.lexsort((np.arange(pool), -total, -regret)).tolist():
        wish = np.where((count < least) | ((count < least + ep) & (extra > 0)), use[:, e], -1.0)
        equals = np.flatnonzero(wish == wish.max())
        s = int(equals[np.lexsort((count[equals], load[equals]))[0]])
        stage_of[e] = s
        count[s] += 1
        load[s] += total[e]
        extra -= int(count[s] > least)
    return stage_of


def _make_local(use: Floats, stage_of: Ints, least: int, most: int) -> None:
    """Move experts around cycles of stages while that makes more rows local; in place.

    best[s, t] is the most that moving one expert from s to t gains. An assignment is optimal when no cycle of such
    moves gains; a further node stands for the room of stages that may have one expert more or fewer.
    """
    stages, pool = use.shape
    if stages == 1:
        return
    count = np.bincount(stage_of, minlength=stages)
    best = np.full((stages + 1, stages + 1), -np.inf)
    which = np.zeros((stages, stages), dtype=np.int64)

    def refresh(s: int) -> None:
        mine = np.flatnonzero(stage_of == s)
        if not len(mine):
            best[s, :stages] = -np.inf
        else:
            gain = use[:, mine] - use[s, mine]
            which[s] = mine[gain.argmax(1)]
            best[s, :stages] = gain.max(1)
        best[s, s] = -np.inf
        best[s, stages] = 0.0 if count[s] < most else -np.inf  # the stage ends with one more
        best[stages, s] = 0.0 if count[s] > least else -np.inf  # the stage ends with one fewer

    for s in range(stages):
        refresh(s)
    for _ in range(2 * pool):
        cycle = _gaining_cycle(best)
        if cycle is None:
            return
        moves = [
            (int(which[s, t]), t) for s, t in zip(cycle, cycle[1:] + cycle[:1], strict=True) if stages not in (s, t)
        ]
        for e, t in moves:
            count[stage_of[e]] -= 1
            count[t] += 1
            stage_of[e] = t
        for s in set(cycle) - {stages}:
            refresh(s)


def _gaining_cycle(best: Floats) -> list[int] | None:
    """Nodes of a cycle whose edges sum to more than nothing, or None. Pairs first; then by Bellman and Ford."""
    tiny = 1e-9
    pairs = best + best.T
    at = int(pairs.argmax())
    if pairs.flat[at] > tiny:
        return [int(n) for n in divmod(at, len(best))]
    nodes = len(best)
    gain, came = np.zeros(nodes), np.full(nodes, -1)
    for _ in range(nodes):
        through = gain[:, None] + best
        better = through.max(0)
        grown = better > gain + tiny
        if not grown.any():
            return None
        came[grown] = through.argmax(0)[grown]
        gain = np.where(grown, better, gain)
    node = int(np.flatnonzero(grown)[0])
    for _ in range(nodes):  # far enough back to stand on the cycle
        node = int(came[node])
        if node < 0:
            return None
    cycle = [node]
    while (before := int(came[cycle[-1]])) != node:
        cycle.append(before)
    cycle.reverse()
    return cycle if sum(best[s, t] for s, t in zip(cycle, cycle[1:] + cycle[:1], strict=True)) > tiny else None


def _level_stages(use: Floats, stage_of: Ints, tries: int = 512, looked_at: int = 256) -> None:
    """Swap experts between a heavy and a light stage until the heaviest is within SLACK of the mean; in place."""
    stages = len(use)
    total = use.sum(0)
    load = np.bincount(stage_of, weights=total, minlength=stages)
    for _ in range(tries):
        heavy, light = int(load.argmax()), int(load.argmin())
        gap = load[heavy] - load[light]
        over = load[heavy] > (1 + SLACK) * load.mean()
        if gap <= 1e-9 * max(1.0, load[heavy]):
            return
        loss_of = use[heavy] - use[light]
        a, b = (np.flatnonzero(stage_of == s) for s in (heavy, light))
        if len(a) > looked_at:  # those that cost least to give away
            a = a[np.lexsort((-total[a], loss_of[a]))[:looked_at]]
        if len(b) > looked_at:
            b = b[np.lexsort((total[b], -loss_of[b]))[:looked_at]]
        if not len(a) or not len(b):
            return
        moved = total[a][:, None] - total[b][None, :]
        better = np.minimum(moved, gap - moved)  # how much lighter the heavier of the two becomes
        loss = loss_of[a][:, None] - loss_of[b][None, :]
        fit = better > 1e-9 * max(1.0, load[heavy])
        if not over:
            fit &= loss <= 1e-9
        if not fit.any():
            return
        price = np.where(fit, np.maximum(loss, 0.0) / np.where(fit, better, 1.0), np.inf)
        cheapest = price <= price.min() + 1e-12
        i, j = divmod(int(np.where(cheapest, better, -1.0).argmax()), len(b))
        stage_of[a[i]], stage_of[b[j]] = light, heavy
        load[heavy] -= moved[i, j]
        load[light] += moved[i, j]


def _spread(weight: Floats, columns: int, least: int) -> Ints:
    """The column of each expert of one stage: `least` or one more in each, and loads as even as possible."""
    column = np.zeros(len(weight), dtype=np.int64)
    if columns == 1:
        return column
    extra = len(weight) - least * columns
    count, load = [0] * columns, [0.0] * columns
    for e in np.lexsort((np.arange(len(weight)), -weight)).tolist():
        room = [c for c in range(columns) if count[c] < least + (extra > 0)]
        c = min(room, key=lambda c: (load[c], count[c], c))
        column[e] = c
        count[c] += 1
        load[c] += float(weight[e])
        extra -= count[c] > least
    for _ in range(4 * columns):
        heavy = max(range(columns), key=lambda c: (load[c], -c))
        light = min(range(columns), key=lambda c: (load[c], c))
        gap = load[heavy] - load[light]
        a, b = np.flatnonzero(column == heavy), np.flatnonzero(column == light)
        if not len(a) or not len(b):
            return column
        b = b[np.argsort(weight[b], kind="stable")]
        wanted = np.clip(np.searchsorted(weight[b], weight[a] - gap / 2), 0, len(b) - 1)
        pairs = [(i, j) for near in (wanted, np.maximum(wanted - 1, 0)) for i, j in zip(a, b[near], strict=True)]
        moved = np.asarray([weight[i] - weight[j] for i, j in pairs])
        better = np.minimum(moved, gap - moved)
        k = int(better.argmax())
        if better[k] <= 1e-9 * max(1.0, load[heavy]):
            return column
        i, j = pairs[k]
        column[i], column[j] = light, heavy
        load[heavy] -= float(moved[k])
        load[light] += float(moved[k])
    return column
