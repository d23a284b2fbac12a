"""What `moue bench dispatch` and `moue bench layer` measure computes what it should, over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moue_dist.parallel.mesh import build_mesh
from tests.ranks.parity import ON_CPU
from tests.ranks.spawn import RankPool

CONFIG = Config(
    model=ModelConfig(layers=4, hidden_size=16, heads=2, vocab_size=23, sequence_length=6),
    moe=MoEConfig(pool=12, top_k=3, expert_width=8, topology="rotational", window=6, stride=2, headroom=0.5),
    parallel=ParallelConfig(expert_parallel=2),
    train=TrainConfig(global_batch_size=8, micro_batch_size=2),
)


def here(config: Config) -> Any:
    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    from moue_dist.bench.layer.run import Here

    return Here(config, build_mesh(dist.get_world_size(), config.parallel), dist.get_rank(), ON_CPU, dist.group.WORLD)


def moved(config: Config) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """In a rank: what each way gives, what went in, the facts, and the measured entry."""
    place = here(config)
    from moue_dist.bench.layer.movement import Inputs
    from moue_dist.bench.layer.run import contests
    from moue_dist.bench.timing.contest import measure
    from moue_dist.parallel.megatron import adapter as megatron

    megatron.initialise(place.mesh, 1, 1.0)
    try:
        ((name, contest),) = contests("dispatch", place)
        assert name == "movement"
        results = {name: list(way()) for name, way in contest.ways.items()}
        inputs = Inputs.draw(12, 16, 6, 3, torch.float32, config.train.seed + place.rank)
        given = {key: getattr(inputs, key).detach() for key in ("x_td", "ids_tk", "weight_tk", "dy_td")}
        return results, given, dict(contest.facts), measure(contest, 2, torch.device("cpu"), dist.group.WORLD)
    finally:
        megatron.shut_down()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_come_back_weighted_whichever_way_they_went(world: int, ranks: Callable[[int], RankPool]) -> None:
    config = replace(CONFIG, parallel=ParallelConfig(expert_parallel=min(world, 2)))
    parts = ranks(world).run(moved, config)
    for results, given, _, entry in parts:
        x, w, dy = given["x_td"], given["weight_tk"], given["dy_td"]
        total = w.sum(1, keepdim=True)
        expected = [x * total, dy * total, (x * dy).sum(1, keepdim=True).expand_as(w)]
        for name, got in results.items():
            for a, b in zip(got, expected, strict=True):
                assert torch.allclose(a, b, atol=1e-5), name
        assert entry["agree"] and len(entry["ways"]["all_to_all"]["ms_all"]) == 2
        for name, way in entry["ways"].items():
            assert way["ms_all"] == parts[0][3]["ways"][name]["ms_all"], "a sample is its slowest rank's, on all"
    assert all(facts["headroom"] > 0.5 for _, _, facts, _ in parts) or world == 1, "no room at first"
    # Experts lie in the ranks of a pair by turns; a row of 16 fp32 goes out and comes back, forward and backward.
    sent = parts[0][2]["gb_out_of_a_gpu"]
    away = [int((given["ids_tk"] % 2 != rank % 2).sum()) for rank, (_, given, _, _) in enumerate(parts)]
    rows = 0 if world == 1 else sum(away) / world
    assert sent["all_to_all"] * 1e9 == pytest.approx(4 * rows * 16 * 4)
    each = 4 * 12 * 16 * 4 + 3 * 12 * 3 * 4  # tokens and gradients; ids, weights and theirs
    assert sent["gathered"] * 1e9 == pytest.approx(0 if world == 1 else each)
