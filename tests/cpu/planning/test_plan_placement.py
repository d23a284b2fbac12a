"""What `moue plan` says of a placement: refusals, bytes, the cheapest change, the picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moue_dist.cli import main
from moue_dist.config import ConfigError
from moue_dist.config.devices import Device
from moue_dist.config.load import load_config
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.planning.plan import build_plan
from moue_dist.refusals.validate import validate
from tests.ranks.spawn import ROOT

TINY, SEVEN = (str(ROOT / "configs" / name) for name in ("tiny.yaml", "moue_7b.yaml"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--parallel.placement hybrid", "parallel.pool_budget_gib"),
        ("--parallel.pool-budget-gib 1", "parallel.placement=hybrid"),
        ("--parallel.lag 1", "parallel.placement=home"),
        ("--parallel.replace-interval 5", "parallel.placement=home"),
        ("--parallel.placement home --parallel.virtual-stages 2", "virtual_stages=1"),
        ("--parallel.placement home --parallel.recompute selective", "use none or full"),
        ("--parallel.placement home --train.precision fp8 --moe.experts te --moe.expert-width 128", "use bf16"),
        ("--parallel.placement home --moe.pool 2 --moe.window 2 --moe.stride 1 --moe.top-k 1", "moe.pool=2 is smaller"),
        ("--parallel.placement hybrid --parallel.pool-budget-gib 0.0001", "one home for each expert already takes"),
    ],
)
def test_what_is_not_proven_is_refused_by_name(given: str, said: str) -> None:
    config = load_config(TINY, given.split())
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(config, 4, cuda=True, device=Device("H200", (9, 0), 139.8), transformer_engine=True)


def test_home_divides_the_pool_of_the_full_topology() -> None:
    given = ["--moe.topology", "full", "--moe.window", "0", "--moe.stride", "0", "--parallel.pipeline-parallel", "4"]
    given += ["--parallel.expert-parallel", "1", "--parallel.placement"]
    one, all_ = (build_plan(load_config(SEVEN, [*given, kind]), 4, H200) for kind in ("home", "replicate"))
    for part in ("pool weights", "pool gradients"):
        assert all(
            4 * a.memory_bytes[part] == b.memory_bytes[part] for a, b in zip(one.stages, all_.stages, strict=True)
        )
    assert one.pool.traffic.local_tokens == pytest.approx(0.25)


H200 = Device("H200", (9, 0), 139.8)


@pytest.mark.parametrize("lag", [0, 1])
def test_microbatches_in_flight_and_rows_kept_are_the_schedules(lag: int) -> None:
    from moue_dist.parallel.lockstep.schedule import Schedule

    given = "--parallel.pipeline-parallel 4 --parallel.expert-parallel 1 --train.global-batch-size 16"
    config = load_config(SEVEN, [*given.split(), "--parallel.placement", "home", "--parallel.lag", str(lag)])
    plan = build_plan(config, 4, H200)
    schedule = Schedule(4, 16, lag)
    assert [s.microbatches_in_flight for s in plan.stages] == [schedule.in_flight(s) for s in range(4)]
    rows = sum(s.memory_bytes["rows kept for other ranks"] for s in plan.stages) / (2048 * 2)
    # A lag of 1 runs both directions at once: an owner gives a layer's rows back before it takes another's.
    whole = [schedule.in_flight(s) - lag for s in range(4)]
    placement, windows, crossing = place_pool(config, build_mesh(4, config.parallel)), config.topology().windows, 0
    for layer, window in enumerate(windows):
        stage = layer // 4
        crossing += whole[stage] * 4096 * 8 * sum(placement.server(e, stage) != stage for e in window) // len(window)
    assert rows == crossing > 0, "every row that left its stage is kept somewhere, once"
    full = replace(config, parallel=replace(config.parallel, recompute="full"))
    assert all(s.memory_bytes["rows kept for other ranks"] == 0 for s in build_plan(full, 4, H200).stages)


def test_host_memory_takes_the_optimizer_from_the_gpu() -> None:
    given = "--parallel.pipeline-parallel 1 --parallel.expert-parallel 1 --parallel.pool-optimizer host"
    (stage,) = build_plan(load_config(SEVEN, given.split()), 1, H200).stages
    pool = 1024 * 3 * 2048 * 1024
    assert stage.memory_bytes["pool optimizer"] == 0
    assert 12 * pool <= stage.host_bytes < 12 * pool + 2**28


@pytest.mark.parametrize(
    ("gib", "said"),
    [
        ("44", "parallel.placement=hybrid and parallel.pool_budget_gib="),
        ("22", "parallel.pool_optimizer=host and parallel.recompute=full"),
        ("5", "no change that was tried"),
    ],
)
def test_a_misfit_names_the_cheapest_change(gib: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", SEVEN, "--world", "4", "--parallel.pipeline-parallel", "4", "--parallel.expert-parallel", "1"]
    assert main([*given, "--memory-gib", gib]) == 1
    message = capsys.readouterr().err
    assert said in message
    if found := re.search(r"pool_budget_gib=([\d.]+)", message):  # what it names does fit
        change = ["--parallel.placement", "hybrid", "--parallel.pool-budget-gib", found[1]]
        assert main([*given, "--memory-gib", gib, *change]) == 0


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plan_tells_and_draws_the_placement(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / f"pool.{kind}"
    assert main(["plan", TINY, "--parallel.placement", "home", "--picture", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("pool traffic of a step, placement home", "stage-local:", "replicate", "hybrid of", "rows kept"):
        assert part in shown
    first = file.read_bytes()
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<svg")
    assert main(["plan", TINY, "--parallel.placement", "home", "--picture", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [c["placement"] for c in plan["pool"]["choices"]] == ["replicate", "home", "hybrid"]
    assert file.read_bytes() == first
    assert main(["plan", TINY, "--picture", str(tmp_path / "pool.pdf")]) == 2
    assert "--picture" in capsys.readouterr().err


def test_the_ring_shows_who_holds_what() -> None:
    from moue_dist.parallel.placement.of_config import stages_of_moe_layers
    from moue_dist.report.ring import describe_ring, draw_ring

    config = load_config(TINY, ["--parallel.placement", "home"])
    mesh = build_mesh(4, config.parallel)
    stages, placement = stages_of_moe_layers(config, mesh), place_pool(config, mesh)
    said = describe_ring(config.topology(), stages, placement)
    assert f"{config.moe.pool} copies in all, at most 1 of one" in said
    bare, full = (draw_ring(config.topology(), stages, p).axes[0] for p in (None, placement))
    assert len(full.collections) == len(bare.collections) + 1
    assert len(full.collections[-1].get_paths()) == config.moe.pool
