"""What a part of a benchmark says of the pool: where it lives, what crosses stages for it, what stands idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moue_dist.bench.record.numbers import PLACEMENTS
from moue_dist.config import Config, ConfigError
from moue_dist.measuring.measured_use import measured_use
from moue_dist.measuring.slots import Lane, Step, bubble, ideal_bubble
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.parallel.recording.timeline import Timeline, clock_of
from moue_dist.planning.memory.sizes import GIB
from moue_dist.planning.pool import expected_traffic, pool_bytes, with_placement

if TYPE_CHECKING:  # megatron-core, which a CPU host prepares for first
    from moue_dist.model.system import System


def variant(config: Config, part: str, world: int) -> Config:
    """The configuration of a part: a placement's, where the part is named after one, else unchanged.

    A hybrid without parallel.pool_budget_gib may spend the mean of what home and replicate take. Raises ConfigError for
    an unknown name.
    """
    if part in ("ours", "baseline"):
        return config
    if part not in PLACEMENTS:
        raise ConfigError(f"--placements: '{part}' is none of {', '.join(PLACEMENTS)}")
    budget = config.parallel.pool_budget_gib
    if part == "hybrid" and not budget:
        mesh = build_mesh(world, config.parallel)
        ends = [with_placement(config, kind) for kind in ("replicate", "home")]
        budget = sum(pool_bytes(c, mesh, place_pool(c, mesh)) for c in ends) / 2 / GIB
    return with_placement(config, part, budget if part == "hybrid" else 0.0)  # type: ignore[arg-type]


def pool_facts(system: System, step: Callable[[Timeline], Any], world: Any, *, alone: bool) -> dict[str, Any]:
    """Pool bytes of a GPU, bytes sent across and within stages in one more step, counted and expected, and the bubble.

    Means over the ranks. Counted are the rows of lock step (null elsewhere). `alone`: there is one rank that others
    only echo, which has no bubble. Collective over `world`.
    """
    config, placement, exchange = system.config, system.context.pool.placement, system.context.exchange
    before = exchange.sent
    timeline = Timeline(not alone, clock_of(system.device))
    timeline.begin_step(world)
    step(timeline)
    timeline.finish_step(1)
    lanes = None if alone else timeline.gather(world)
    sent = None
    if before is not None and (now := exchange.sent) is not None:
        mine = [now.other_stage - before.other_stage, now.same_stage - before.same_stage]
        total = torch.tensor(mine, dtype=torch.float64, device=system.device)
        dist.all_reduce(total, group=world)
        sent = [float(x) / (1 if alone else system.mesh.world) / GIB for x in total]
    expected = expected_traffic(config, system.mesh, placement, measured_use(config))
    each = GIB * system.mesh.world
    return {
        "placement": config.parallel.placement,
        "lag": config.parallel.slots_behind,
        "pool_gib": pool_bytes(config, system.mesh, placement) / GIB,
        "sent_gib": sent and {"across": sent[0], "within": sent[1]},
        "sent_gib_expected": {"across": expected.across / each, "within": expected.within / each},
        "copies_gib_expected": {"across": expected.sync_across / each, "within": expected.sync_within / each},
        "bubble": _bubble(system, lanes) if lanes else None,
        "bubble_ideal": ideal_bubble(system.mesh.pipeline, system.microbatches, system.mesh.virtual),
    }


def _bubble(system: System, spans: list[Any]) -> float | None:
    mesh, p = system.mesh, system.config.parallel
    lanes = tuple(Lane(rank, mesh.coords(rank).pp, tuple(mine)) for rank, mine in enumerate(spans))
    schedule = "lock-step 1F1B" if p.placement != "replicate" else "1F1B"
    return bubble(Step(1, mesh.pipeline, mesh.virtual, system.microbatches, schedule, p.slots_behind, lanes))
