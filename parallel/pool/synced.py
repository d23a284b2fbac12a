"""Weights that many ranks replicate and many layers use: one gradient buffer, one reduction, a sharded optimizer.

megatron-core's DistributedDataParallel hooks one autograd use of a parameter; the pool has as many as layers see it,
on as many stages. So the pool's gradients are accumulated into one fp32 buffer outside of autograd's parameters and
handled here: reduce-scatter over all replicas (data-parallel copies and stages alike: a sum), AdamW on this rank's
share, all-gather. A share is counted once in the gradient norm because the shares partition the buffer.

Legend: a buffer is [rows, row]; a segment is a run of rows with one replica group; a unit is 1/pieces of a row and
the grain at which shares are cut, so that checkpoints can name every share by (row, piece).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.groups import ReplicaGroup
from moue_dist.parallel.pool.device_adam import DeviceAdam, ShareAdam
from moue_dist.parallel.pool.host_adam import HostAdam, Pending

ALL_ON_DEVICE: Mapping[str, torch.dtype] = MappingProxyType({})


@dataclass(frozen=True)
class Span:
    """One segment in flat elements, and how its replicas share it: `share` elements each, the last ones fewer."""

    start: int
    stop: int
    share: int
    replicas: ReplicaGroup

    @property
    def mine(self) -> tuple[int, int]:
        """This rank's elements [a, b); empty where the segment has fewer units than replicas."""
        a = min(self.start + self.replicas.rank * self.share, self.stop)
        return a, min(a + self.share, self.stop)

    @property
    def even(self) -> bool:
        return self.share * self.replicas.size == self.stop - self.start


class SyncedBuffer:
    """Replicated weights [rows, row] with their fp32 gradients and this rank's fp32 optimizer shares.

    `row_ids` are the global ids of the rows and `global_rows` their number over all ranks. `segments` are
    (first row, end row, replicas). `grad_scale` turns the sum over replicas into the wanted mean over data ranks; the
    optimizer applies it, together with the clip factor. `pieces` divides `row` and must be the same on all ranks.
    """

    def __init__(
        self,
        name: str,
        row_ids: Sequence[int],
        global_rows: int,
        row: int,
        segments: Sequence[tuple[int, int, ReplicaGroup]],
        *,
        pieces: int,
        dtype: torch.dtype,
        device: torch.device,
        grad_scale: float,
    ) -> None:
        if row % pieces:
            raise ValueError(f"{name}: {pieces} pieces do not divide a row of {row}")
        self.name, self.row_ids, self.global_rows, self.row = name, tuple(row_ids), global_rows, row
        self.pieces, self.grad_scale = pieces, grad_scale
        self.weight = torch.empty(len(self.row_ids), row, dtype=dtype, device=device)
        self.grad = torch.zeros(len(self.row_ids), row, dtype=torch.float32, device=device)
        unit = row // pieces
        self.spans = tuple(
            Span(a * row, b * row, math.ceil((b - a) * pieces / g.size) * unit, g) for a, b, g in segments if b > a
        )
        self.pending: Pending | None = None  # an update of the weights that this rank's worker is at
        self.version = 0  # of the weights: whoever writes to them raises it, so that nobody keeps what was made of them

    def settle(self) -> None:
        """End the update that is under way, if there is one, on all replicas (collective).

        Before any use of the weights or gradients after an optimizer step, and at a point that all ranks reach with no
        message between them: inside a pipeline's schedule the replicas of other stages would wait for each other.
        """
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            self.gather()

    def shares(self, flat: Tensor) -> list[Tensor]:
        """This rank's part of each segment of a tensor laid out like the buffer, as views."""
        flat = flat.view(-1)
        return [flat[a:b] for a, b in (span.mine for span in self.spans)]

    def share_units(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(segment, offset in its share, length, global row, piece) of every unit-run of this rank's shares.

        Runs are whole rows where a share holds whole rows and `pieces` is 1.
        """
        unit = self.row // self.pieces
        for s, span in enumerate(self.spans):
            a, b = span.mine
            for offset in range(0, b - a, unit):
                row, inside = divmod(a + offset, self.row)
                yield s, offset, unit, self.row_ids[row], inside // unit

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over all replicas into each owner's share. The rest of the buffer is then stale."""
        flat = self.grad.view(-1)
        for span, share in zip(self.spans, self.shares(self.grad), strict=True):
            group = span.replicas.group
            if group is not None and span.even:
                dist.reduce_scatter_tensor(share, flat[span.start : span.stop], group=group)
            elif group is not None:
                padded = flat.new_zeros(span.share * span.replicas.size)
                padded[: span.stop - span.start] = flat[span.start : span.stop]
                out = flat.new_empty(span.share)
                dist.reduce_scatter_tensor(out, padded, group=group)
                share.copy_(out[: share.numel()])

    @torch.no_grad()
    def gather(self) -> None:
        """Give every replica the shares of all; replicas are bit-equal afterwards. Every write to a share ends here."""
        self.version += 1
        flat = self.weight.view(-1)
        for span, share in zip(self.spans, self.shares(self.weight), strict=True):
            group = span.replicas.group
            if group is None:
                continue
            if span.even:
                dist.all_gather_into_tensor(flat[span.start : span.stop], share, group=group)
                continue
            mine = flat.new_zeros(span.share)
            mine[: share.numel()] = share
            padded = flat.new_empty(span.share * span.replicas.size)
            dist.all_gather_into_tensor(padded, mine, group=group)
            flat[span.start : span.stop] = padded[: span.stop - span.start]

    @torch.no_grad()
    def unequal_rows(self) -> list[int]:
        """Global ids of rows whose replicas differ in any bit, as this rank's groups see them (collective)."""
        as_int = self.weight.view(torch.int32 if self.weight.element_size() == 4 else torch.int16)
        bad: list[int] = []
        for span in self.spans:
            if span.replicas.group is None:
                continue
            a, b = span.start // self.row, span.stop // self.row
            sums = torch.stack([as_int[i].sum(dtype=torch.int64) for i in range(a, b)])
            low, high = sums.clone(), sums.clone()
            dist.all_reduce(low, dist.ReduceOp.MIN, group=span.replicas.group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group=span.replicas.group)
            bad += [self.row_ids[a + i] for i in torch.nonzero(low != high).flatten().tolist()]
        return bad


class SharedOptimizer:
    """AdamW over this rank's shares of synced buffers: fp32 masters and moments, one tensor a segment.

    Steps in three moves, so that the caller can form one gradient norm with the dense parameters: `reduce`,
    `squared_norm`, `step`. `on_host` names buffers whose state lives in host memory, with the type of their moments;
    their step may still be under way when `step` returns, and `finish` ends it.
    """

    def __init__(
        self,
        buffers: Sequence[SyncedBuffer],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        on_host: Mapping[str, torch.dtype] = ALL_ON_DEVICE,
    ) -> None:
        self.buffers = tuple(buffers)
        self.adams: list[ShareAdam] = []
        for b in self.buffers:
            shares = b.shares(b.weight)
            if b.name in on_host:
                moments = on_host[b.name]
                adam = HostAdam(shares, betas=betas, eps=eps, weight_decay=weight_decay, moments=moments)
                self.adams.append(adam)
            else:
                self.adams.append(DeviceAdam(shares, betas=betas, eps=eps, weight_decay=weight_decay))

    @property
    def masters(self) -> list[list[Tensor]]:
        """By buffer and segment."""
        self.finish()
        return [adam.masters for adam in self.adams]

    def states(self, buffer: int) -> dict[str, list[Tensor]]:
        """Per segment of a buffer: `weight` (fp32 masters), `exp_avg`, `exp_avg_sq` (type of `on_host`, or fp32)."""
        self.finish()
        return self.adams[buffer].states()

    def finish(self) -> None:
        """End the last step where it is still under way (collective, see `SyncedBuffer.settle`).

        Everything here and `check_replicas` call it themselves; so does a training step, through `zero_grad`. A caller
        that uses the weights otherwise after a step, as an evaluation does, calls it first.
        """
        for b in self.buffers:
            b.settle()

    def zero_grad(self) -> None:
        self.finish()
        for b in self.buffers:
            b.grad.zero_()

    def reduce(self) -> None:
        self.finish()
        for b in self.buffers:
            b.reduce()

    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's shares, fp32 scalar; their sum over all ranks is the buffers' squared norm."""
        parts = [_square(g) * b.grad_scale**2 for b in self.buffers for g in b.shares(b.grad)]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    @torch.no_grad()
    def step(self, lr: float, clip: float | None) -> None:
        """One AdamW step on the shares from `clip` times their gradients; replicas are equal after `finish`."""
        self.finish()
        for b, adam in zip(self.buffers, self.adams, strict=True):
            b.pending = adam.step(b.shares(b.grad), lr, b.grad_scale * (1.0 if clip is None else clip))
            if b.pending is None:
                b.gather()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> weights -> all replicas: after loading a checkpoint."""
        self.finish()
        for b, adam in zip(self.buffers, self.adams, strict=True):
            adam.publish()
            b.gather()

    def set_steps(self, step: int) -> None:
        """Adam's step count after loading: it corrects the bias of the moments."""
        self.finish()
        for adam in self.adams:
            adam.set_steps(step)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Weights -> masters: after initialisation."""
        self.finish()
        for adam in self.adams:
            adam.adopt()


def _square(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g).square() if g.is_cuda else g.square().sum()


@dataclass(frozen=True)
class UnequalReplicas(RuntimeError):
    """Copies of one row differ on two ranks: the run is wrong from some step on."""

    buffer: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"replicas of {self.buffer} rows {list(self.rows[:8])} differ between ranks ({len(self.rows)} rows)"


def check_replicas(buffers: Sequence[SyncedBuffer], world: Any = None) -> None:
    """Raise UnequalReplicas if any replica differs in a bit (collective over each segment's replicas).

    With `world`, the group of all ranks, every rank raises the same error, not only those that hold the copies: a
    rank that raised alone would leave the others waiting in their next collective.
    """
    found = []
    for b in buffers:
        b.settle()
        bad = b.unequal_rows()
        if world is not None:
            marks = torch.zeros(b.global_rows, dtype=torch.int32, device=b.weight.device)
            marks[bad] = 1
            dist.all_reduce(marks, dist.ReduceOp.MAX, group=world)
            bad = torch.nonzero(marks).flatten().tolist()
        found.append(tuple(bad))
    for b, rows in zip(buffers, found, strict=True):
        if rows:
            raise UnequalReplicas(b.name, rows)
