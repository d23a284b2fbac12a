"""Moves the pool to another placement between two steps: who sends what to whom, and the sending.

Every number of the optimizer's state (fp32 master, first and second moment) has one owner, which follows from mesh and
placement alone. So both ends of a move are known everywhere and no message asks for anything. Old shares are put aside
in host memory, the old tensors give their memory back, and batches of units travel to their new owners by all-to-all
over all ranks; the weights then come from the masters, as after every step. Gradients are empty between steps.

Legend: U units, pieces of experts: unit number = expert * pieces + piece. u numbers in a unit, W ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.groups import Groups, ReplicaGroup
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import Floats, Ints, servers
from moue_dist.parallel.placement.placement import Placement, pieces_of_a_row
from moue_dist.parallel.pool.synced import SyncedBuffer

STATES = ("weight", "exp_avg", "exp_avg_sq")  # as `SharedOptimizer.states` names them
BATCH_BYTES = 256 << 20  # that travel at once: no rank sends or receives more in one all-to-all


class MoveError(RuntimeError):
    """Ranks disagree about a move; nothing has moved yet."""


# Pure: who owns what, and what a move takes.


def owners(placement: Placement, mesh: Mesh, pieces: int) -> Ints:
    """The global rank that owns the optimizer state of every unit, [P * pieces]; as `SyncedBuffer` cuts its shares.

    Example: 2 experts held by 2 stages, 1 piece -> expert 0 belongs to the first stage's rank, expert 1 to the second.
    """
    out = np.full(placement.pool * pieces, -1, dtype=np.int64)
    for ep in range(placement.expert_parallel):
        for stage in range(placement.pipeline):
            ids = np.asarray(placement.rows(stage, ep), dtype=np.int64)
            for segment in placement.segments(stage, ep):
                if segment.stages[0] != stage:
                    continue  # the other holders have the same segment
                ranks = np.asarray(mesh.expert_cells(segment.stages, ep), dtype=np.int64)
                units = ids[segment.start : segment.stop, None] * pieces + np.arange(pieces)
                share = -(-units.size // len(ranks))
                out[units.reshape(-1)] = ranks[np.arange(units.size) // share]
    return out


@dataclass(frozen=True, eq=False)
class Move:
    """Every unit's owner before and after."""

    pieces: int
    unit: int  # numbers in a unit
    source: Ints
    target: Ints
    experts: int  # whose cells change

    @property
    def unit_bytes(self) -> int:
        return len(STATES) * self.unit * 4

    def bytes_sent(self, rank: int) -> int:
        """Bytes that a rank sends to others."""
        return int(((self.source == rank) & (self.target != rank)).sum()) * self.unit_bytes

    @property
    def bytes(self) -> int:
        """Bytes between ranks, in all."""
        return int((self.source != self.target).sum()) * self.unit_bytes

    def batches(self, limit_bytes: int = BATCH_BYTES) -> Iterator[Ints]:
        """Units that travel at once, in ascending order: together no more than the limit, at least one."""
        step = max(1, limit_bytes // self.unit_bytes)
        for first in range(0, len(self.source), step):
            yield np.arange(first, min(first + step, len(self.source)))


def plan_move(old: Placement, new: Placement, mesh: Mesh, row: int) -> Move:
    """What takes the pool, experts of `row` numbers, from one placement to another; units are the finer of the two."""
    cut_old, cut_new = (pieces_of_a_row(p, mesh.expert_data, row) for p in (old, new))
    pieces = max(cut_old, cut_new)  # powers of two: one divides the other
    source = np.repeat(owners(old, mesh, cut_old), pieces // cut_old)
    target = np.repeat(owners(new, mesh, cut_new), pieces // cut_new)
    cells = zip(zip(old.holders, old.columns, strict=True), zip(new.holders, new.columns, strict=True), strict=True)
    return Move(pieces, row // pieces, source, target, sum(a != b for a, b in cells))


def rows_across(placement: Placement, use: Floats) -> float:
    """The share of routed rows that another stage computes; `use` [S, P] comes from `costs.stage_use`."""
    own = servers(placement) == np.arange(placement.pipeline)[:, None]
    total = float(use.sum())
    return float(use[~own].sum()) / total if total else 0.0


# On the ranks.


def check_same_plan(placement: Placement, group: Any, device: torch.device) -> None:
    """Raise MoveError where ranks have planned different placements (collective)."""
    digest = int.from_bytes(hashlib.sha256(repr(placement).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) != -int(extremes[1]):
        raise MoveError("ranks have planned different placements of the pool from the same use of the experts")


def regroup(
    groups: Groups, mesh: Mesh, rank: int, old: Placement, new: Placement, timeout: timedelta
) -> tuple[Groups, list[Any]]:
    """Groups for the new placement, those that stay reused, and this rank's that nobody needs any more (collective)."""
    before, after = old.stage_sets(), new.stage_sets()
    pool = {stages: group for stages, group in groups.pool.items() if stages in after}
    unused = [g.group for stages, g in groups.pool.items() if stages not in after and g.group is not None]
    for stages in after:
        if stages in before:
            continue
        for ep in range(mesh.expert):
            ranks = mesh.expert_cells(stages, ep)
            group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                pool[stages] = ReplicaGroup(group, len(ranks), ranks.index(rank))
    return replace(groups, pool=pool), unused


@dataclass(frozen=True, eq=False)
class Staged:
    """A rank's old shares in host memory: `values` [n, states, u], `place[unit]` their row there, -1 elsewhere."""

    values: Tensor
    place: Ints


States = Mapping[str, Sequence[Tensor]]  # name -> a flat share for each segment


def put_aside(move: Move, rank: int, buffer: SyncedBuffer, states: States) -> Staged:
    """Copy this rank's shares to host memory."""
    per_segment = _units(buffer, move.pieces)
    place = np.full(len(move.source), -1, dtype=np.int64)
    values = torch.empty(sum(map(len, per_segment)), len(STATES), move.unit)
    at = 0
    for segment, units in enumerate(per_segment):
        place[units] = np.arange(at, at + len(units))
        for i, name in enumerate(STATES):
            values[at : at + len(units), i].copy_(states[name][segment].view(len(units), move.unit))
        at += len(units)
    _same_units(np.flatnonzero(place >= 0), move.source, rank, "before")
    return Staged(values, place)


def release(tensors: Iterable[Tensor]) -> None:
    """Give the memory back now, whoever still holds the tensors: they must not be read any more."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def send(move: Move, rank: int, group: Any, staged: Staged, buffer: SyncedBuffer, states: States) -> int:
    """Bring every unit to its new owner's `states` (collective over all ranks); bytes that this rank sent to others.

    Beside the new tensors it needs twice BATCH_BYTES on the device.
    """
    segment_of, index_of = (np.full(len(move.target), -1, dtype=np.int64) for _ in range(2))
    for segment, units in enumerate(_units(buffer, move.pieces)):
        segment_of[units], index_of[units] = segment, np.arange(len(units))
    _same_units(np.flatnonzero(segment_of >= 0), move.target, rank, "after")
    world, device, sent = dist.get_world_size(group), buffer.weight.device, 0
    for batch in move.batches():
        leaving, to = _of_rank(batch, move.source, move.target, rank)
        coming, where_from = _of_rank(batch, move.target, move.source, rank)
        out = staged.values[torch.from_numpy(staged.place[leaving])].to(device)
        got = torch.empty(len(coming), len(STATES), move.unit, device=device)
        receives, sends = (np.bincount(peers, minlength=world).tolist() for peers in (where_from, to))
        dist.all_to_all_single(got, out, receives, sends, group=group)
        sent += int((to != rank).sum()) * out[0:1].nbytes
        for segment in np.unique(segment_of[coming]).tolist():
            here = np.flatnonzero(segment_of[coming] == segment)
            index = torch.from_numpy(index_of[coming[here]]).to(device)
            rows = got[torch.from_numpy(here).to(device)]
            for i, name in enumerate(STATES):
                states[name][segment].view(-1, move.unit).index_copy_(0, index, rows[:, i])
    return sent


def _units(buffer: SyncedBuffer, pieces: int) -> list[Ints]:
    """The units of this rank's share of every segment, in the order of the share."""
    finer = pieces // buffer.pieces
    found: list[list[int]] = [[] for _ in buffer.spans]
    for segment, _, _, row, piece in buffer.share_units():
        first = row * pieces + piece * finer
        found[segment].extend(range(first, first + finer))
    return [np.asarray(units, dtype=np.int64) for units in found]


def _of_rank(batch: Ints, mine: Ints, peer: Ints, rank: int) -> tuple[Ints, Ints]:
    """The units of a batch that are `rank`'s by `mine`, ordered by their peer, then by number; and the peers."""
    units = batch[mine[batch] == rank]
    units = units[np.argsort(peer[units], kind="stable")]
    return units, peer[units]


def _same_units(held: Ints, plan: Ints, rank: int, when: str) -> None:
    """The plan is pure; what the buffers hold must be what it says."""
    if not np.array_equal(held, np.flatnonzero(plan == rank)):
        raise MoveError(f"rank {rank} owns other shares {when} the move than the plan says")
