"""Experts in the ranks of one stage (`replicate`): dispatch, experts, combine, in the expert-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_mlp
from moue_dist.parallel.dispatch.all_to_all import AllToAllDispatcher
from moue_dist.parallel.dispatch.routes import RouteTable
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.recording.timeline import Timeline


class StageExchange:
    """See `exchange.ExpertExchange`. `recompute`: pre-activations are computed again in backward."""

    sent = None

    def __init__(
        self,
        pool: ExpertPool,
        dispatcher: AllToAllDispatcher,
        *,
        backend: ExpertBackend,
        recompute: bool,
        device: torch.device,
    ) -> None:
        self.pool, self.dispatcher, self.backend, self.recompute = pool, dispatcher, backend, recompute
        self.device = device

    def begin_step(self, timeline: Timeline) -> None:
        self.dispatcher.timeline = timeline

    def make_room(self, group: Any) -> bool:
        return False  # sizes are known before anything is sent

    def layer(self, visible: Sequence[int], index: int) -> StageExperts:
        placement, me = self.pool.placement, self.pool.ep_rank
        table = RouteTable.build(placement.columns, visible, placement.expert_parallel, me, self.device)
        return StageExperts(self, table, self.pool.slab(visible))


@dataclass(frozen=True, eq=False)
class StageExperts:
    """One layer's experts in the ranks of its stage."""

    exchange: StageExchange
    table: RouteTable
    slab: ExpertSlab

    def chosen_before(self) -> None:
        """Routers choose again: what leads to a choice is computed as in the first run."""

    def begin(self, x_td: Tensor) -> None:
        """Rows follow from the choice."""

    def __call__(self, x_td: Tensor, ids_tk: Tensor, weight_tk: Tensor, begun: None = None) -> Tensor:
        exchange = self.exchange
        rows_rd, counts, counts_host, handle = exchange.dispatcher.dispatch(x_td, ids_tk, self.table)
        rows_rd = expert_mlp(
            rows_rd,
            counts,
            self.slab,
            backend=exchange.backend,
            recompute=exchange.recompute,
            counts_host=counts_host,
        )
        return exchange.dispatcher.combine(rows_rd, weight_tk, handle)
