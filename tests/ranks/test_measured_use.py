"""A pool that starts where an earlier run's use wants it: planned, counted, and trained as if it lay elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import Device
from moue_dist.measuring.measured_use import measured_use
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.parallel.placement.planner import SLACK
from moue_dist.planning.plan import build_plan
from moue_dist.planning.pool import expected_traffic
from moue_dist.refusals.validate import validate
from tests.ranks import parity
from tests.ranks.cases import BASE, RING, Case
from tests.ranks.spawn import RankPool
from tests.ranks.test_pool_traffic import one_step

H200 = Device("H200", (9, 0), 139.8)
SEED, TOLERANCE = 3, 1e-5


def counted(folder: Path, counts_lp: torch.Tensor) -> str:
    """A run folder with one usage line, as `MetricsLog.usage` writes it."""
    folder.mkdir(exist_ok=True)
    layers = list(range(1, len(counts_lp) + 1))
    line = {"kind": "usage", "step": 1, "layers": layers, "counts": counts_lp.long().tolist()}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return str(folder)


def at_home(config: Config, **parallel: object) -> Config:
    options = {"placement": "home"} | parallel
    return replace(config, parallel=replace(config.parallel, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("layout", "placement", "budget"), [("pp4", "home", 0.0), ("pp2 ep2 dp2", "hybrid", 1e-4)])
def test_the_plan_of_a_run_that_starts_from_measured_use_is_what_it_sends(
    layout: str, placement: str, budget: float, recompute: str, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """The first step routes as the step did that was measured, so that `moue plan` knows its bytes to the last one."""
    case = Case(layout, "moue")
    even = replace(case.config, moe=replace(BASE.moe, **RING))
    even = at_home(even, placement=placement, pool_budget_gib=budget, recompute=recompute)
    before = ranks(4).run(one_step, even)
    config = at_home(even, placement=placement, measured_use=counted(tmp_path / "run", before[0][0]))
    validate(config, 4, cuda=False)
    after = ranks(4).run(one_step, config)
    assert torch.equal(after[0][0], before[0][0])
    planned = build_plan(config, 4, H200)
    sent = sum(rank[1] for rank in after)
    assert planned.pool.traffic.across == pytest.approx(sent, rel=1e-6)
    mesh = build_mesh(4, config.parallel)
    unplanned = expected_traffic(config, mesh, place_pool(config, mesh), measured_use(config))
    assert planned.pool.traffic.busiest < unplanned.busiest or sent < sum(rank[1] for rank in before)
    assert planned.pool.traffic.busiest <= max(unplanned.busiest, 1 + SLACK)


def test_it_trains_what_one_process_trains(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    case = Case("pp2 ep2 dp2", "moue")
    first = at_home(case.config)
    (counts_lp, *_), *_ = ranks(4).run(one_step, first)
    config = at_home(case.config, measured_use=counted(tmp_path / "run", counts_lp))
    mesh = build_mesh(4, config.parallel)
    assert place_pool(config, mesh, measured_use(config)) != place_pool(config, mesh)
    alone = parity.one_process(case.config)
    initial = parity.merge(ranks(1).run(parity.initial_weights, alone), "initial")
    truth = parity.run_reference(alone, initial)
    parts = ranks(4).run(parity.train, config, truth.seed)
    assert parts[0].losses == pytest.approx(truth.losses, rel=TOLERANCE)
    final = parity.merge(parts, "final")
    errors = {n: float((w - truth.final[n]).norm() / truth.final[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < TOLERANCE} == {}


def other_readings(config: Config, folders: list[str]) -> tuple[tuple[int, ...], ...]:
    """In a rank: the holders of a pool whose measured run reads otherwise on every rank, as while it goes on."""
    import torch.distributed as dist

    from moue_dist.parallel.megatron import adapter as megatron

    system = parity.build(at_home(config, measured_use=folders[dist.get_rank()]))
    try:
        return system.context.pool.placement.holders
    finally:
        megatron.shut_down()


def test_all_ranks_take_the_first_ones_reading(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = at_home(Case("pp2", "moue").config)
    windows = config.topology().windows
    folders = []
    for name, favourite in (("a", 0), ("b", -1)):
        counts = np.zeros((len(windows), config.moe.pool))
        for layer, window in enumerate(windows):
            counts[layer, list(window)] = 1
            counts[layer, window[favourite]] = 50
        folders.append(counted(tmp_path / name, torch.from_numpy(counts)))
    one, other = (place_pool(c, build_mesh(2, c.parallel), measured_use(c)).holders
                  for c in (at_home(config, measured_use=f) for f in folders))  # fmt: skip
    assert one != other
    assert ranks(2).run(other_readings, config, folders) == [one, one]


@pytest.mark.parametrize(
    ("counts_lp", "said"),
    [
        (None, "has not counted any use yet"),
        (torch.ones(3, 16), "counts of 3 MoE layers and 16 experts do not fit the 4 MoE layers and moe.pool=16"),
        (torch.ones(4, 8), "4 MoE layers and 8 experts do not fit"),
        (torch.ones(4, 16), "MoE layer 1 sent tokens to experts outside of the window"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(counts_lp: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    counted(folder, torch.zeros(4, 16) if counts_lp is None else counts_lp)
    if counts_lp is None:
        (folder / "metrics.jsonl").write_text("")
    config = at_home(Case("pp2", "moue").config, measured_use=str(folder))
    with pytest.raises(ConfigError, match=said) as refused:
        validate(config, 2, cuda=False)
    assert f"parallel.measured_use={folder}" in str(refused.value)


def test_a_run_that_goes_on_is_read_again(tmp_path: Path) -> None:
    config = at_home(Case("pp2", "moue").config, measured_use=str(tmp_path / "run"))
    inside = torch.zeros(4, 16)
    for layer, window in enumerate(config.topology().windows):
        inside[layer, list(window)] = 1
    for tokens in (10, 2000):
        counted(tmp_path / "run", tokens * inside)
        found = measured_use(config)
        assert found is not None and found is measured_use(config), "read once"
        assert found.max() == tokens


def test_it_means_nothing_to_replicas() -> None:
    config = at_home(Case("pp2", "moue").config, placement="replicate", measured_use="runs/x")
    with pytest.raises(ConfigError, match=r"measured_use=runs/x is only for parallel.placement=home or hybrid"):
        validate(config, 2, cuda=False)
