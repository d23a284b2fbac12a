"""Every shipped configuration is dry-run on grids of up to 1024 ranks."""

from __future__ import annotations

import pytest

from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.config.load import load_config
from moue_dist.parallel.mesh import build_mesh, smallest_world
from moue_dist.planning.flops import flops_per_token, parameters
from moue_dist.planning.plan import build_plan
from tests.ranks.spawn import ROOT

FOLDER = ROOT / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EXPECTED = {
    *("tiny", "plain_tiny", "unipool_tiny", "rexmoe_tiny", "debug_gpu", "moue_1b"),
    *("moue_7b", "plain_7b", "unipool_7b", "rexmoe_7b"),
}
H200 = Device("H200", (9, 0), 139.8)


def shipped(name: str, *words: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", list(words))


def test_none_is_missing() -> None:
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_files(name: str) -> None:
    assert shipped(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_it_is_on_its_smallest_grid(name: str) -> None:
    config = shipped(name)
    plan = build_plan(config, smallest_world(config.parallel), H200)
    assert plan.fits, plan.misfit


@pytest.mark.parametrize("world", [8, 64, 512, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_dry_run_up_to_1024_ranks(name: str, world: int) -> None:
    config = shipped(name)
    batch = max(config.train.global_batch_size, config.train.micro_batch_size * build_mesh(world, config.parallel).data)
    plan = build_plan(shipped(name, "--train.global-batch-size", str(batch)), world, H200)
    assert plan.fits, plan.misfit
    assert plan.grid["world"] == world
    last = plan.stages[-1].last_rank
    assert last == world - 1
    assert plan.derived["tokens per step"] == batch * config.model.sequence_length


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("7b", "1b"))])
def test_large_ones_take_1024_ranks_as_they_are(name: str) -> None:
    assert build_plan(shipped(name), 1024, H200).fits


@pytest.mark.parametrize("name", ["moue_7b", "plain_7b", "rexmoe_7b"])
@pytest.mark.parametrize(("pp", "ep"), [(1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_7b_fits_four_gpus_in_every_layout(name: str, pp: int, ep: int, precision: str) -> None:
    grid = ("--parallel.pipeline-parallel", str(pp), "--parallel.expert-parallel", str(ep))
    plan = build_plan(shipped(name, *grid, "--train.precision", precision), 4, H200)
    assert plan.fits, plan.misfit


@pytest.mark.parametrize(
    ("moue", "relatives"),
    [("tiny", ("plain_tiny", "unipool_tiny", "rexmoe_tiny")), ("moue_7b", ("plain_7b", "unipool_7b", "rexmoe_7b"))],
)
def test_relatives_differ_in_sharing_alone(moue: str, relatives: tuple[str, ...]) -> None:
    """The same pool, the same experts a token, the same data: totals differ by the routers' few weights only."""
    ours = shipped(moue)
    for name in relatives:
        theirs = shipped(name)
        assert (theirs.model, theirs.optim, theirs.train, theirs.data) == (
            ours.model,
            ours.optim,
            ours.train,
            ours.data,
        )
        assert (theirs.moe.pool, theirs.moe.top_k, theirs.moe.expert_width) == (
            ours.moe.pool,
            ours.moe.top_k,
            ours.moe.expert_width,
        )
        a, b = parameters(ours), parameters(theirs)
        assert (a.total - a.router, a.activated - a.router) == (b.total - b.router, b.activated - b.router)
        assert flops_per_token(ours).experts == flops_per_token(theirs).experts


def test_the_7b_has_olmoes_size() -> None:
    """OLMoE (arXiv 2409.02060): 6.9 billion parameters, 1.3 activated."""
    counts = parameters(shipped("plain_7b"))
    assert round(counts.total / 1e9, 1) == 6.9
    assert round(counts.activated / 1e9, 1) == 1.3
    assert shipped("plain_7b").topology().window == 64


def test_tiny_is_what_the_first_command_promises() -> None:
    config = shipped("tiny")
    assert (config.parallel.pipeline_parallel, config.parallel.expert_parallel) == (2, 2)
    assert (config.moe.topology, config.moe.router, config.data.source) == ("rotational", "universal", "stdlib")
    assert smallest_world(config.parallel) == 4
