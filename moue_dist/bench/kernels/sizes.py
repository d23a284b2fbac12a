"""The sizes at which kernels are timed: what a microbatch of a configuration brings to one rank. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moue_dist.config import Config
from moue_dist.parallel.mesh import build_mesh, smallest_world
from moue_dist.parallel.placement.of_config import place_pool, stages_of_moe_layers
from moue_dist.parallel.placement.placement import spans
from moue_dist.planning.pool import with_placement

MOST_NUMBERS = 2**28  # of AdamW: time is the bytes', so that more would say the same
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sizes:
    """Of one rank, under balanced routing. An expert is visible here if the layer sees it and this rank holds it."""

    tokens: int  # of a microbatch, on one rank
    top_k: int
    hidden: int
    width: int
    window: int  # experts that a layer sees, on all expert ranks
    expert_ranks: int
    layers: tuple[Spans, ...]  # of layers whose weight gradients are added together: visible ones among those held
    numbers: int  # of the pool that this rank's optimizer owns
    headroom: float

    @property
    def rows(self) -> int:
        """(token, choice) pairs that come to this rank's experts."""
        return self.tokens * self.top_k

    @property
    def held(self) -> int:
        return max(end for layer in self.layers for _, end in layer)

    @property
    def visible(self) -> int:
        """Experts of the first layer that are here."""
        return sum(end - first for first, end in self.layers[0])


def sizes_of(config: Config, merged: int) -> Sizes:
    """Of the first expert rank of the first stage with MoE layers, in the smallest layout with these degrees.

    `merged`: layers whose weight gradients are added in one pass. Experts are where `replicate` has them.
    """
    config = with_placement(config, "replicate")
    world = smallest_world(config.parallel)
    mesh = build_mesh(world, config.parallel)
    placement, topology = place_pool(config, mesh), config.topology()
    stages = stages_of_moe_layers(config, mesh)
    here = [i for i, stage in enumerate(stages) if stage == stages[0]][:merged]
    seen = [[e for e in topology.windows[i] if placement.columns[e] == 0] for i in here]
    held = sorted({e for layer in seen for e in layer})
    return Sizes(
        tokens=config.model.sequence_length * config.train.micro_batch_size // config.parallel.tensor_parallel,
        top_k=config.moe.top_k,
        hidden=config.model.hidden_size,
        width=config.moe.expert_width,
        window=topology.window,
        expert_ranks=mesh.expert,
        layers=tuple(spans(held, layer) for layer in seen),
        numbers=min(config.moe.pool * 3 * config.model.hidden_size * config.moe.expert_width // world, MOST_NUMBERS),
        headroom=config.moe.headroom,
    )


def small(sizes: Sizes) -> Sizes:
    """Small enough for a CPU, with all that makes a difference: two layers that overlap, a window of two spans."""
    ranks = min(sizes.expert_ranks, 2)
    return replace(
        sizes,
        tokens=min(sizes.tokens, 96),
        top_k=min(sizes.top_k, 3),
        hidden=min(sizes.hidden, 64),
        width=min(sizes.width, 32),
        window=6 * ranks,
        expert_ranks=ranks,
        layers=(((0, 4), (6, 8)), ((2, 8),)),
        numbers=min(sizes.numbers, 5000),
    )
