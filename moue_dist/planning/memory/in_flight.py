"""How many microbatches a stage has in flight at its fullest, and whose rows its experts meet and keep meanwhile.

M microbatches of a step, PP stages, p one of them, V chunks of a rank, d hidden, b bytes of a number, R rows that a
rank routes in a layer and microbatch.

1F1B keeps min(M, PP - p) microbatches on stage p; interleaved keeps 2 (PP - p - 1) + (V - 1) PP + 1 chunks;
lock step (parallel.placement=home or hybrid) keeps min(M, 2 (PP - p - 1) + 1 + lag) microbatches. Where a slot's two
directions run side by side, backward frees a layer while forward fills one: of the last microbatch only one layer
counts at its source, nothing at its owners, but a forward round's buffers stand beside a backward round's.

In lock step the owner of an expert keeps the rows that other ranks sent, d b each, for every microbatch in flight on
their stage: all stages together about PP n R rows a rank, n MoE layers a stage, less those that never left theirs; none
with recompute=full. Of its own rows it keeps the tokens (`activations.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import Floats, servers, stage_use
from moue_dist.parallel.placement.of_config import stages_of_moe_layers
from moue_dist.parallel.placement.placement import Placement
from moue_dist.planning.memory.sizes import Share, tokens_of


def lock_step_lag(config: Config) -> int | None:
    """Slots by which backward trails where stages run in lock step, None where they run 1F1B."""
    return config.parallel.slots_behind if config.parallel.placement != "replicate" else None


def chunks_in_flight(mesh: Mesh, stage: int, microbatches: int, lag: int | None = None) -> tuple[int, ...]:
    """The chunk of each forward whose activations a stage keeps at its fullest, in the schedule's order.

    `lag` is lock step's, None for 1F1B. Example: pipeline 2, virtual 2, stage 0, 4 microbatches -> (0, 0, 1, 1, 0).
    """
    if lag is not None:
        return (0,) * min(microbatches, 2 * (mesh.pipeline - 1 - stage) + 1 + lag)
    if mesh.virtual == 1:
        return (0,) * min(microbatches, mesh.pipeline - stage)
    many = 2 * (mesh.pipeline - stage - 1) + (mesh.virtual - 1) * mesh.pipeline + 1
    many = min(many, microbatches * mesh.virtual)
    return tuple(i // mesh.pipeline % mesh.virtual for i in range(many))


def side_by_side(config: Config, mesh: Mesh, stage: int, microbatches: int) -> bool:
    """Whether a stage is at its fullest while forward fills one microbatch's layers and backward frees another's."""
    lag = config.parallel.slots_behind
    return lag % 2 == 1 and mesh.tensor == 1 and microbatches >= 2 * (mesh.pipeline - 1 - stage) + 1 + lag


class Served(NamedTuple):
    """Rows of one round of lock step at a rank, and those of others that it keeps for backward at its fullest."""

    met: int = 0  # at its experts
    theirs: int = 0  # of these, from other ranks
    away: int = 0  # of its own, at experts of others
    kept: int = 0


def rows_served(
    config: Config, mesh: Mesh, placement: Placement, share: Share, microbatches: int, use: Floats | None = None
) -> Served:
    """What lock step brings to a rank, zeros where there is none.

    Expected numbers, with every layer spread like `use` [L, P], or evenly over its window.
    """
    lag = lock_step_lag(config)
    if lag is None:
        return Served()
    stages = stages_of_moe_layers(config, mesh)
    used = stage_use(config.topology().windows, stages, placement.pool, mesh.pipeline, use)
    here = (servers(placement) == share.stage) & (np.asarray(placement.columns) == share.expert_rank)
    met = (used * here).sum(1)  # of each stage's rows, in rows of one layer
    mine = tokens_of(config) // mesh.tensor * config.moe.top_k  # rows of one source in a layer
    sources = np.full(mesh.pipeline, mesh.expert)  # of each stage
    others = sources - (np.arange(mesh.pipeline) == share.stage)
    layers_of = np.bincount(stages, minlength=mesh.pipeline)
    layers = np.maximum(layers_of, 1)
    # Side by side an owner gives a layer's rows back before it takes the next one's (parallel/lockstep/turns.py).
    flight = [
        len(chunks_in_flight(mesh, s, microbatches, lag)) - side_by_side(config, mesh, s, microbatches)
        for s in range(mesh.pipeline)
    ]
    a_round, theirs = (round(float((met / layers * ranks).sum()) * mine) for ranks in (sources, others))
    kept = 0 if config.parallel.recompute == "full" else round(float((met * flight * others).sum()) * mine)
    own = a_round - theirs
    return Served(a_round, theirs, mine - own if layers_of[share.stage] else 0, kept)
