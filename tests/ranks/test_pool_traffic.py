"""The planner's bytes and rows against those that a step on ranks counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moue_dist.config import Config, ParallelConfig
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.placement.costs import row_wire_bytes, stage_use, step_traffic
from moue_dist.parallel.placement.of_config import expert_bytes, place_pool, stages_of_moe_layers
from moue_dist.planning.memory.in_flight import rows_served
from moue_dist.planning.memory.sizes import Share
from tests.ranks import parity
from tests.ranks.cases import BASE, RING
from tests.ranks.spawn import RankPool


def one_step(config: Config) -> tuple[torch.Tensor, int, int, int, int]:
    """In a rank: one training step; the step's counts [L, P] over all ranks, the bytes that this rank sent to other
    stages and to others of its own, its rows that stayed with it, and the most rows of others that it kept.
    """
    from moue_dist.parallel.lockstep.exchange import LockstepExchange
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training.step import train_step

    stayed = 0

    class Watched(LockstepExchange):
        def forward_round(self, j: int, x_td: torch.Tensor, weight_tk: torch.Tensor, order: Any) -> Any:
            nonlocal stayed
            stayed += int(order.counts_ow[0].sum())
            return super().forward_round(j, x_td, weight_tk, order)

    system = parity.build(config)
    try:
        system.context.exchange.__class__ = Watched
        tokens = parity.tokens_of(config, 1, seed=3)[0]
        result = train_step(system, parity.microbatches(config, tokens, system.coord.dp, system.mesh.data), 0)
        sent: Any = system.context.exchange.sent
        kept = system.dense.lockstep.exchange.owner.rows_kept_peak
        return result.counts_lp, sent.other_stage, sent.same_stage, stayed, kept
    finally:
        dist.barrier()
        megatron.shut_down()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("degrees", [(2, 2), (4, 1)])
@pytest.mark.parametrize(("placement", "budget"), [("home", 0.0), ("hybrid", 2e-4)])
def test_bytes_across_stages_are_as_predicted(
    recompute: str, degrees: tuple[int, int], placement: str, budget: float, ranks: Callable[[int], RankPool]
) -> None:
    parallel = ParallelConfig(
        pipeline_parallel=degrees[0], expert_parallel=degrees[1], placement=placement, pool_budget_gib=budget,
        recompute=recompute,
    )  # type: ignore[arg-type]  # fmt: skip
    config = replace(BASE, parallel=parallel, moe=replace(BASE.moe, **RING))
    found = ranks(4).run(one_step, config)
    mesh = build_mesh(4, parallel)
    placed, stages = place_pool(config, mesh), stages_of_moe_layers(config, mesh)
    each, t = expert_bytes(config), config.train
    lean = recompute == "full"
    row = row_wire_bytes(config.model.hidden_size, each.weight, lock_step=True, recompute=lean)
    microbatches, layers = t.global_batch_size // (t.micro_batch_size * mesh.data), Counter(stages)
    predicted = step_traffic(
        placed,
        stage_use(config.topology().windows, stages, config.moe.pool, mesh.pipeline, found[0][0].numpy()),
        rows=t.global_batch_size * config.model.sequence_length * config.moe.top_k,
        row_bytes=row,
        layers=[layers[s] for s in range(mesh.pipeline)],
        microbatches=microbatches,
        each=each,
        expert_data=mesh.expert_data,
        recompute=lean,
    )
    across, within, stayed = (sum(rank[i] for rank in found) for i in (1, 2, 3))
    assert predicted.across == pytest.approx(across, rel=1e-6), "measured use predicts it exactly"
    assert across > 0
    if mesh.expert == 1:
        assert within == predicted.within == 0
        return
    # Which of a stage's ranks a row came from is not in the use: one of two, the prediction takes. So of the rows that
    # are computed on their stage half should stay; here all of them are counted.
    width = max(len(placed.rows(s, ep)) for s in range(mesh.pipeline) for ep in range(mesh.expert))
    counts = 8 * width * (microbatches + mesh.pipeline - 1) * max(layers.values()) * mesh.world
    assert 2 * (predicted.within - counts) == pytest.approx(within - counts + stayed * row, rel=1e-6)


@pytest.mark.parametrize(
    ("degrees", "batch", "lag"),
    [((2, 2), 10, 0), ((2, 2), 10, 1), ((4, 1), 9, 0), ((4, 1), 9, 1), ((4, 1), 3, 1), ((2, 1), 1, 1), ((2, 1), 4, 1)],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_owners_keep_as_many_rows_as_predicted(
    degrees: tuple[int, int], batch: int, lag: int, recompute: str, ranks: Callable[[int], RankPool]
) -> None:
    """A token that chooses its whole window spreads evenly, as the prediction assumes: then it is exact."""
    parallel = ParallelConfig(
        pipeline_parallel=degrees[0], expert_parallel=degrees[1], placement="home", lag=lag, recompute=recompute
    )  # type: ignore[arg-type]
    config = replace(
        BASE,
        parallel=parallel,
        moe=replace(BASE.moe, **RING, top_k=RING["window"]),
        train=replace(BASE.train, global_batch_size=batch),
    )
    mesh = build_mesh(degrees[0] * degrees[1], parallel)
    found = ranks(mesh.world).run(one_step, config)
    placed, microbatches = place_pool(config, mesh), batch // mesh.data
    for rank, (*_, kept) in enumerate(found):
        at = mesh.coords(rank)
        share = Share(at.pp, ((),), at.ep)
        assert kept == rows_served(config, mesh, placed, share, microbatches).kept, f"rank {rank}"
