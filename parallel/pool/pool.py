"""This rank's part of the global expert pool: storage, layout, and what each layer sees of it.

An expert is a row of 3*f*d numbers: w_in [2f, d] (gate rows, then up rows) and w_out [d, f]. The pool belongs to no
layer and is no submodule of the model: layers borrow `ExpertSlab`s, gradients go to `SyncedBuffer.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.kernels.experts.wgrad import WeightGradients
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.parallel.groups import Groups
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.placement import Placement, pieces_of_a_row, spans
from moue_dist.parallel.pool.synced import SyncedBuffer


class ExpertPool:
    """The rows of one cell (stage, EP rank). All data ranks of the cell, and the other holders, have copies."""

    def __init__(
        self,
        placement: Placement,
        mesh: Mesh,
        rank: int,
        groups: Groups,
        *,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        merge_wgrad: int = 1,
        fp8: bool = False,
    ) -> None:
        """`merge_wgrad`: layers whose weight gradients are added in one pass (`kernels/experts/wgrad.py`).

        `fp8` holds the weights in FP8, too (`kernels/fp8/pool.py`).
        """
        me = mesh.coords(rank)
        self.placement, self.hidden, self.width, self.ep_rank = placement, hidden, width, me.ep
        self.ids = placement.rows(me.pp, me.ep)
        self.sums = WeightGradients(merge_wgrad)
        self.buffer = SyncedBuffer(
            "pool",
            self.ids,
            placement.pool,
            3 * width * hidden,
            [(s.start, s.stop, groups.pool[s.stages]) for s in placement.segments(me.pp, me.ep)],
            pieces=pieces_of_a_row(placement, mesh.expert_data, 3 * width * hidden),
            dtype=dtype,
            device=device,
            grad_scale=1.0 / mesh.data,  # the mean over the dense data ranks, whatever the number of replicas
        )
        self.fp8 = QuantisedPool(self.buffer, hidden, width) if fp8 else None

    def ready(self) -> None:
        """Before layers use the pool in a step or an evaluation: what is made of the weights is made of these."""
        if self.fp8 is not None:
            self.fp8.refresh()

    def slab(self, visible: Sequence[int]) -> ExpertSlab:
        """The view a layer computes with: those of its `visible` experts (ascending) that live in this cell."""
        mine = [e for e in visible if self.placement.columns[e] == self.ep_rank]
        seen = spans(self.ids, mine)
        return ExpertSlab(self.buffer.weight, self.buffer.grad, self.hidden, self.width, seen, self.sums, self.fp8)

    @torch.no_grad()
    def initialise(self, seed: int, std_in: float, std_out: float) -> None:
        """Normal weights that depend on seed and expert id alone, so that every layout and replica starts equal."""
        split = 2 * self.width * self.hidden
        weight = self.buffer.weight
        for row, e in zip(weight, self.ids, strict=True):
            generator = torch.Generator(weight.device).manual_seed(seed * 1_000_003 + e)
            values = torch.randn(row.shape, generator=generator, device=weight.device, dtype=torch.float32)
            values[:split] *= std_in
            values[split:] *= std_out
            row.copy_(values)
        self.buffer.version += 1
