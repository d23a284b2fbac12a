"""What a placement costs: bytes in each cell, and bytes that a training step sends within and across stages.

Pure functions of a placement, of how much each stage uses each expert, and of sizes. Free of torch.

Legend: S pipeline stages, EP columns, P experts, L MoE layers, M microbatches of a step, d hidden, b bytes of a number,
E ranks that hold the same cell (expert data), C = S * EP cells, h holders of an expert.

Dispatch. A MoE layer routes n = tokens of the step * top_k rows; `use[s, e]` is the share of them that meets expert e,
summed over the layers of stage s. A row whose expert is computed on another stage crosses; otherwise it goes to its
expert's column, which is the source's own for 1 in EP rows: what stays on its rank is in no message. Bytes of one row
that travels, over a whole step:

    per stage (replicate)      4 d b            dispatch, combine, and their gradients back; 6 d b with recompute=full
    lock step, rows kept       4 d b + 32       forward d b out, d b back; backward d b + 16 out, d b + 16 back: rows of
                                                messages are multiples of 16 bytes, of which the last 4 are the routing
                                                weight and its gradient in fp32
    lock step, recompute=full  5 d b + 32       the rows travel once more, with their gradients: 2 d b + 16 out

These are for d b in multiples of 16; others are filled up to them in backward.

Counts, int64, go before each forward exchange, padded to w, the most experts that one peer may serve. Lock step: a rank
sends 8 w to each of the C - 1 other cells in each of (M + S - 1) * max(MoE layers of a stage) rounds, w the largest
number of experts of a cell. Per stage: 8 w to each of EP - 1 other columns for every layer and microbatch (twice with
recompute=full), w the largest part of a window in one column.

Replicas. Every step each copy's fp32 gradient goes to the owners of its shares (reduce-scatter) and the new weights
come back (all-gather). An expert with h holders has R = h * E replicas; of its 4 + b bytes a number, R - E times as
many cross stages and E - 1 times as many move inside of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moue_dist.parallel.placement.placement import Placement, pieces_of_a_row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COUNT_BYTES = 8


@dataclass(frozen=True)
class ExpertBytes:
    """One expert: `row` numbers, and the bytes that each of them takes.

    Every copy has its own weights and gradients; the optimizer's state exists once, spread over all replicas (0 where
    it lives in host memory).
    """

    row: int
    weight: int = 2
    gradient: int = 4
    optimizer: int = 12


def stage_use(
    windows: Sequence[Sequence[int]],
    stage_of_layer: Sequence[int],
    pool: int,
    pipeline: int,
    use: Sequence[Sequence[float]] | Floats | None = None,
) -> Floats:
    """How much each stage uses each expert, [S, P]: the sum over its MoE layers of each layer's shares, which sum to 1.

    `use[l][e]` are tokens that MoE layer l routed to expert e; a layer without any, and every layer if `use` is None,
    spreads evenly over its window. Raises ValueError where `use` does not fit the topology.
    """
    out = np.zeros((pipeline, pool))
    if use is not None and len(use) != len(windows):
        raise ValueError(f"measured use of {len(use)} layers does not fit the {len(windows)} MoE layers")
    for i, (window, stage) in enumerate(zip(windows, stage_of_layer, strict=True)):
        seen = np.asarray(window, dtype=np.int64)
        if use is not None:
            counts = np.asarray(use[i], dtype=np.float64)
            if counts.shape != (pool,) or not np.isfinite(counts).all() or (counts < 0).any():
                raise ValueError(f"measured use of MoE layer {i} must be {pool} counts of at least 0")
            inside = counts[seen]
            if np.delete(counts, seen).any():
                raise ValueError(f"measured use of MoE layer {i} has tokens for experts outside of its window")
            if inside.sum() > 0:
                out[stage, seen] += inside / inside.sum()
                continue
        out[stage, seen] += 1.0 / len(seen)
    return out


def servers(placement: Placement) -> Ints:
    """The stage that computes expert e for stage s, [S, P]; -1 for an expert that nobody holds."""
    known: dict[tuple[int, ...], Ints] = {(): np.full(placement.pipeline, -1, dtype=np.int64)}
    for stages in placement.stage_sets():
        if stages:
            distance = np.abs(np.arange(placement.pipeline)[:, None] - np.asarray(stages)[None, :])
            known[stages] = np.asarray(stages, dtype=np.int64)[distance.argmin(1)]  # the first of equals: the lower
    return np.stack([known[stages] for stages in placement.holders], axis=1)


def served(placement: Placement, use: Floats) -> Floats:
    """The load of each cell, [S, EP], in rows of one layer: all cells together serve as many as there are layers."""
    load = np.zeros((placement.pipeline, placement.expert_parallel))
    columns = np.broadcast_to(np.asarray(placement.columns), use.shape)
    np.add.at(load, (servers(placement), columns), use)
    return load


def cell_bytes(placement: Placement, each: ExpertBytes, expert_data: int = 1) -> dict[str, Ints]:
    """Bytes of a rank in every cell, [S, EP], by component: `weights`, `gradients`, `optimizer`.

    A segment's optimizer state is cut in equal shares of whole pieces, the last ones smaller: exact, and of a cell's
    ranks the one with the largest shares counts.
    """
    cut = pieces_of_a_row(placement, expert_data, each.row)
    runs = [(n, at, ep) for ep in range(placement.expert_parallel) for n, at in placement.column_runs(ep) if at]
    copies = np.asarray([len(at) for _, at, _ in runs], dtype=np.int64)
    # From here on an entry for every (segment, holder).
    length = np.repeat(np.asarray([n for n, _, _ in runs], dtype=np.int64), copies)
    column = np.repeat(np.asarray([ep for _, _, ep in runs], dtype=np.int64), copies)
    holders = np.repeat(copies, copies)
    stage = np.fromiter(itertools.chain.from_iterable(at for _, at, _ in runs), dtype=np.int64, count=len(length))
    position = np.arange(len(length)) - np.repeat(np.cumsum(copies) - copies, copies)
    share = -(-length * cut // (holders * expert_data))
    mine = np.minimum(np.maximum(length * cut - position * expert_data * share, 0), share)  # of the cell's first rank
    rows, pieces = (np.zeros((placement.pipeline, placement.expert_parallel), dtype=np.int64) for _ in range(2))
    np.add.at(rows, (stage, column), length)
    np.add.at(pieces, (stage, column), mine)
    return {
        "weights": rows * each.row * each.weight,
        "gradients": rows * each.row * each.gradient,
        "optimizer": pieces * (each.row // cut) * each.optimizer,
    }


def row_with_number(size: int) -> int:
    """Bytes of a message's row that holds `size` bytes and an fp32 number in its last four; a multiple of 16."""
    return 16 * (-(-size // 16) + 1)


def row_wire_bytes(hidden: int, number: int, *, lock_step: bool, recompute: bool) -> int:
    """Bytes that one routed row sends in a training step; the table stands at the top of this file."""
    if lock_step:
        size = hidden * number
        return 2 * size + row_with_number(2 * size if recompute else size) + row_with_number(size)
    return (6 if recompute else 4) * hidden * number


@dataclass(frozen=True)
class Traffic:
    """Bytes that all ranks together send in one training step for the pool, by how far they go; and shares.

    `across` and `within` are dispatch with its counts, to ranks of other stages and to other ranks of the same.
    `sync_across` and `sync_within` are the replicas' gradients and weights.
    """

    across: int
    within: int
    sync_across: int
    sync_within: int
    local_experts: float  # share of experts that every stage which reaches them holds: no token of theirs crosses
    local_tokens: float  # share of rows that are computed on the stage that routes them
    busiest: float  # rows of the busiest cell over the mean


def step_traffic(
    placement: Placement,
    use: Floats,
    *,
    rows: int,
    row_bytes: int,
    layers: Sequence[int],
    microbatches: int,
    each: ExpertBytes,
    expert_data: int = 1,
    lock_step: bool = True,
    recompute: bool = False,
    window: int = 0,
) -> Traffic:
    """Expected bytes of one training step over all ranks; the formulas stand at the top of this file.

    `use` comes from `stage_use`; `rows` are those that one MoE layer routes in a step over all ranks, `row_bytes` comes
    from `row_wire_bytes`, `layers` are the MoE layers of each stage, `window` the experts that a layer sees. With
    measured use of the step itself, dispatch is exact but for how a stage's rows spread over its expert ranks.
    """
    stages, ep = placement.pipeline, placement.expert_parallel
    server = servers(placement)
    own = server == np.arange(stages)[:, None]
    total = float(use.sum())
    away = float(use[~own].sum())
    local = total - away
    across = away * rows * row_bytes
    within = local * rows * row_bytes * (ep - 1) / ep

    if lock_step:
        held = [sum(n for n, at in placement.column_runs(c) if s in at) for c in range(ep) for s in range(stages)]
        vectors = (microbatches + stages - 1) * max(layers, default=0) * stages * ep * expert_data
        a_vector = COUNT_BYTES * max(held, default=0) * vectors
        across, within = across + a_vector * (stages - 1) * ep, within + a_vector * (ep - 1)
    elif ep > 1:
        a_vector = (
            COUNT_BYTES * -(-window // ep) * sum(layers) * microbatches * ep * expert_data * (2 if recompute else 1)
        )
        within += a_vector * (ep - 1)

    copies = np.asarray([len(at) for at in placement.holders], dtype=np.int64)
    a_copy = each.row * (each.gradient + each.weight)
    load = served(placement, use)
    reached_elsewhere = ((use > 0) & ~own).any(0)
    return Traffic(
        across=round(across),
        within=round(within),
        sync_across=int(((copies - 1) * expert_data * a_copy)[copies > 0].sum()),
        sync_within=int((copies > 0).sum()) * (expert_data - 1) * a_copy,
        local_experts=1.0 - float(reached_elsewhere.mean()) if placement.pool else 1.0,
        local_tokens=local / total if total else 1.0,
        busiest=float(load.max() / load.mean()) if total else 1.0,
    )
