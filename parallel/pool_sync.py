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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.groups import ReplicaGroup


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
    (first row, end row, replicas). `grad_scale` turns the sum over replicas into the wanted mean over data ranks.
    `pieces` divides `row` and must be the same on all ranks.
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
        """Sum the gradients over all replicas into each owner's share, scaled. The rest of the buffer is then stale."""
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
            if self.grad_scale != 1.0:
                share.mul_(self.grad_scale)

    @torch.no_grad()
    def gather(self) -> None:
        """Give every replica the shares of all: afterwards the replicas are bit-equal."""
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


def common_pieces(segment_rows: Iterable[tuple[int, int]], row: int) -> int:
    """How many pieces a row is cut in so that every replica of every segment can get a share.

    `segment_rows` are (rows, replicas) of all segments of all ranks: with at least as many rows as replicas, whole
    rows (1 piece); otherwise the next power of two that gives each replica a piece, as far as it divides the row.
    """
    need = max((math.ceil(replicas / rows) for rows, replicas in segment_rows if rows), default=1)
    pieces = 1
    while pieces < need and row % (pieces * 2) == 0:
        pieces *= 2
    return pieces


class SharedOptimizer:
    """AdamW over this rank's shares of synced buffers: fp32 masters and moments, one tensor a segment.

    Where the weights are fp32 already, masters are the weights themselves. Steps in three moves, so that the caller
    can form one gradient norm with the dense parameters: `reduce`, `squared_norm`, `step`.
    """

    def __init__(self, buffers: Sequence[SyncedBuffer], *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.buffers = tuple(buffers)
        self.masters = [
            [w if w.dtype == torch.float32 else w.float() for w in b.shares(b.weight)] for b in self.buffers
        ]
        flat = [torch.nn.Parameter(m, requires_grad=False) for ms in self.masters for m in ms]
        fused = bool(flat) and flat[0].is_cuda  # unfused AdamW needs several temporaries as large as the pool
        self.adam = torch.optim.AdamW(flat, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        for p in flat:  # created here, not at the first step, so that memory is known and checkpoints can load
            self.adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.adam.param_groups[0]["params"])

    def states(self, buffer: int) -> dict[str, list[Tensor]]:
        """Per segment of a buffer: `weight` (fp32 masters), `exp_avg`, `exp_avg_sq`."""
        first = sum(len(ms) for ms in self.masters[:buffer])
        mine = self.parameters[first : first + len(self.masters[buffer])]
        moments = {n: [self.adam.state[p][n] for p in mine] for n in ("exp_avg", "exp_avg_sq")}
        return {"weight": [p.data for p in mine], **moments}

    def zero_grad(self) -> None:
        for b in self.buffers:
            b.grad.zero_()

    def reduce(self) -> None:
        for b in self.buffers:
            b.reduce()

    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's shares, fp32 scalar; their sum over all ranks is the buffers' squared norm."""
        parts = [g.square().sum() if not g.is_cuda else torch.linalg.vector_norm(g).square() for g in self._grads()]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def _grads(self) -> list[Tensor]:
        return [g for b in self.buffers for g in b.shares(b.grad)]

    @torch.no_grad()
    def step(self, lr: float, clip: float | None) -> None:
        """One AdamW step on the shares, gradients multiplied by `clip` first; replicas are equal afterwards."""
        for p, g in zip(self.parameters, self._grads(), strict=True):
            p.grad = g if clip is None else g.mul_(clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for p in self.parameters:
            p.grad = None
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> weights -> all replicas; also after loading a checkpoint."""
        for b, masters in zip(self.buffers, self.masters, strict=True):
            for w, m in zip(b.shares(b.weight), masters, strict=True):
                if w.data_ptr() != m.data_ptr():
                    w.copy_(m)
            b.gather()

    def set_steps(self, step: int) -> None:
        """Adam's step count after loading: it corrects the bias of the moments."""
        for p in self.parameters:
            self.adam.state[p]["step"].fill_(step)

    def adopt_weights(self) -> None:
        """Weights -> masters: after initialisation."""
        for b, masters in zip(self.buffers, self.masters, strict=True):
            for w, m in zip(b.shares(b.weight), masters, strict=True):
                if w.data_ptr() != m.data_ptr():
                    m.copy_(w)


@dataclass(frozen=True)
class UnequalReplicas(RuntimeError):
    """Copies of one row differ on two ranks: the run is wrong from some step on."""

    buffer: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"replicas of {self.buffer} rows {list(self.rows[:8])} differ between ranks ({len(self.rows)} rows)"


def check_replicas(buffers: Sequence[SyncedBuffer]) -> None:
    """Raise UnequalReplicas if any replica differs in a bit (collective over each segment's replicas)."""
    for b in buffers:
        if bad := b.unequal_rows():
            raise UnequalReplicas(b.name, tuple(bad))
