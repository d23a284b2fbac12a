"""One rank's part of a run: everything that a training step touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moue_dist.config import Config
from moue_dist.model.context import MoEContext
from moue_dist.model.moe import MoELayer
from moue_dist.parallel.dispatch.exchange import ExpertExchange
from moue_dist.parallel.groups import Groups
from moue_dist.parallel.megatron import adapter as megatron
from moue_dist.parallel.mesh import Coord, Mesh
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.pool.synced import SharedOptimizer
from moue_dist.refusals.machine import Resolved


@dataclass
class System:
    """Built once; only the pool may change later, with all that hangs on it (`take_pool`)."""

    config: Config
    resolved: Resolved
    mesh: Mesh
    coord: Coord
    rank: int
    layout: tuple[tuple[int, ...], ...]
    groups: Groups
    dense: megatron.DenseSide
    context: MoEContext
    shared: SharedOptimizer  # of the pool and of the routers' shared weights
    device: torch.device

    @property
    def my_stages(self) -> tuple[int, ...]:
        """Virtual stages of this rank, one a chunk."""
        return tuple(v * self.mesh.pipeline + self.coord.pp for v in range(self.mesh.virtual))

    @property
    def microbatches(self) -> int:
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.mesh.data)

    @property
    def last_stage(self) -> bool:
        return self.coord.pp == self.mesh.pipeline - 1

    def chunk_modules(self) -> list[Any]:
        """The GPTModels, without their data-parallel wrappers."""
        return [chunk.module for chunk in self.dense.chunks]

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers of this rank, in the order of the model."""
        layers = [layer.mlp for chunk in self.chunk_modules() for layer in chunk.decoder.layers]
        return [layer for layer in layers if isinstance(layer, MoELayer)]

    def take_pool(self, pool: ExpertPool, exchange: ExpertExchange, groups: Groups, shared: SharedOptimizer) -> None:
        """Go on with another pool of the same experts: what the pool was moved to replaces all that pointed to it."""
        self.groups, self.shared = groups, shared
        self.context.pool, self.context.exchange = pool, exchange
        if self.dense.lockstep is not None:
            self.dense.lockstep.exchange = exchange  # type: ignore[assignment]
        for layer in self.moe_layers():
            layer.bind(self.context)
