"""What the MoE layers of one rank share during a step: pool, exchange, shared router, balance, tallies.

Passed to the layers once, when the model is built; the training step reads and resets it. Legend: L MoE layers over
all stages, P pool experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moue_dist.config import Config
from moue_dist.config.topology import Topology
from moue_dist.kernels.routing.choice import Auxiliary, Tally
from moue_dist.model.balance import BalanceState, balance_weights
from moue_dist.model.mask import RouterMask
from moue_dist.model.router import SharedRouter
from moue_dist.parallel.dispatch.exchange import ExpertExchange
from moue_dist.parallel.pool.pool import ExpertPool


@dataclass
class Tallies:
    """Sums over the microbatches of a step of this rank, to be added up over all ranks. fp64: counts stay exact.

    Mean scores and z-losses are means over the tokens of a microbatch, so their sums are divided by the number of
    microbatches of the global batch.
    """

    counts_lp: Tensor
    scores_lp: Tensor
    z_l: Tensor

    @classmethod
    def zeros(cls, layers: int, pool: int, device: torch.device) -> Tallies:
        def make(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(make(layers, pool), make(layers, pool), make(layers))

    def flat(self) -> Tensor:
        return torch.cat([self.counts_lp.flatten(), self.scores_lp.flatten(), self.z_l])

    @classmethod
    def from_flat(cls, flat: Tensor, layers: int, pool: int) -> Tallies:
        counts, scores, z = flat.split([layers * pool, layers * pool, layers])
        return cls(counts.view(layers, pool), scores.view(layers, pool), z)

    def reset(self) -> None:
        for t in (self.counts_lp, self.scores_lp, self.z_l):
            t.zero_()


@dataclass
class MoEContext:
    """`loss_scale` is 1 / microbatches of a step; `token_shards` the tensor-parallel ranks that split a sequence."""

    config: Config
    topology: Topology
    pool: ExpertPool
    exchange: ExpertExchange  # how tokens reach the pool's experts
    shared_router: SharedRouter
    balance: BalanceState
    token_shards: int
    device: torch.device
    first_layer: int = 0  # of this rank's stage, among the MoE layers
    loss_scale: float = 1.0
    mask: RouterMask = field(init=False)
    tallies: Tallies = field(init=False)
    weights_lp: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mask = RouterMask(self.config.moe, self.topology, self.device)
        self.tallies = Tallies.zeros(self.topology.layers, self.topology.pool, self.device)
        self.begin_step(1)

    def begin_step(self, microbatches: int) -> None:
        """Take the balance weights of the last global batch for the coming one and clear the tallies."""
        self.loss_scale = 1.0 / microbatches
        self.weights_lp = balance_weights(self.config.balance, self.topology, self.balance)
        self.tallies.reset()

    @property
    def bias(self) -> Tensor | None:
        return self.balance.bias if self.config.balance.bias else None

    def auxiliary(self, layer: int, tokens: int) -> Auxiliary | None:
        """The loss of a layer's `tokens` on this rank, or None where gradients are not wanted.

        Full recompute runs a layer twice, first without a graph, and evaluation never counts. So every token is
        counted once.
        """
        if not torch.is_grad_enabled():
            return None
        z = self.config.balance.z_loss / self.topology.layers
        return Auxiliary(self.weights_lp[layer], z, self.loss_scale, max(tokens * self.token_shards, 1))

    def observe(self, layer: int, window: Tensor, tally: Tally | None) -> None:
        """Add what a routing counted, if it was to count, to the step's statistics."""
        if tally is not None:
            self.tallies.counts_lp[layer].index_add_(0, window, tally.count_w)
            self.tallies.scores_lp[layer].index_add_(0, window, tally.score_w)
            self.tallies.z_l[layer] += tally.z
