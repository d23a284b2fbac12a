"""The pool's optimizer in host memory trains what the device's trains, in layouts; checkpoints change sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moue_dist.config import Config
from moue_dist.refusals.validate import validate
from tests.host_adam import needs_operator
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool

pytestmark = needs_operator

SEED, STEPS, HALF = 3, 4, 2
TOLERANCE = 1e-5  # norm of the difference over the norm, of every tensor
BUILD = 900.0  # seconds: the first run here builds the operator

Ranks = Callable[[int], RankPool]


def config_of(layout: str, model: str, **parallel: Any) -> Config:
    config = Case(layout, model).config
    config = replace(config, parallel=replace(config.parallel, **parallel), train=replace(config.train, steps=STEPS))
    validate(config, Case(layout, model).world, cuda=False)
    return config


def train(ranks: Ranks, layout: str, config: Config, **options: Any) -> list[parity.Trained]:
    return ranks(Case(layout, "moue").world).run(parity.train, config, SEED, timeout=BUILD, **options)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences above the tolerance."""
    errors = {n: float((w - other[n]).norm() / other[n].norm()) for n, w in one.items()}
    return {n: e for n, e in errors.items() if not e < TOLERANCE}


# One rank; replicas over stages and data ranks, whose gather ends the step; 16 holders of 8 rows, so pieces of rows.
@pytest.mark.parametrize(
    ("layout", "model"),
    [("", "moue"), ("pp2 dp2", "unipool"), ("pp2 ep2 dp2 full overlap", "moue"), ("dp4", "dense first")],
)
@pytest.mark.timeout(BUILD)
def test_host_and_device_train_the_same(layout: str, model: str, ranks: Ranks) -> None:
    device = train(ranks, layout, config_of(layout, model), stop=STEPS)
    host = train(ranks, layout, config_of(layout, model, pool_optimizer="host"), stop=STEPS, check_every=1)
    for one, other in zip(device, host, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=TOLERANCE)
        assert one.norms == pytest.approx(other.norms, rel=TOLERANCE)
    assert apart(parity.merge(host, "final"), parity.merge(device, "final")) == {}
    assert apart(parity.merge(host, "final"), parity.merge(device, "initial")), "nothing was trained"


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.timeout(BUILD)
def test_it_resumes_exactly(state: str, ranks: Ranks, tmp_path: Path) -> None:
    layout = "pp2 dp2"
    config = config_of(layout, "moue", pool_optimizer="host", host_state=state)
    whole = train(ranks, layout, config, stop=STEPS)
    train(ranks, layout, config, stop=HALF, save=tmp_path)
    resumed = train(ranks, layout, config, start=HALF, stop=STEPS, load=tmp_path)
    want, got = parity.merge(whole, "final"), parity.merge(resumed, "final")
    assert [n for n in want if n.startswith("pool") and not torch.equal(want[n], got[n])] == []
    assert resumed[0].losses == whole[0].losses[HALF:]


@pytest.mark.parametrize(
    ("saved", "loaded", "exact"),
    [
        ({}, {"pool_optimizer": "host"}, True),
        ({"pool_optimizer": "host"}, {}, True),
        ({"pool_optimizer": "host"}, {"pool_optimizer": "host", "host_state": "bf16"}, False),
        ({"pool_optimizer": "host", "host_state": "bf16"}, {}, False),
    ],
    ids=["device to host", "host to device", "fp32 to bf16", "bf16 to device"],
)
@pytest.mark.timeout(BUILD)
def test_a_checkpoint_changes_sides(
    saved: dict[str, str], loaded: dict[str, str], exact: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """Another layout, too. Moments that pass through bf16 lose 1/256 each, masters nothing."""
    whole = train(ranks, "dp2", config_of("dp2", "plain"), stop=STEPS)
    train(ranks, "dp2", config_of("dp2", "plain", **saved), stop=HALF, save=tmp_path)
    resumed = train(ranks, "", config_of("", "plain", **loaded), start=HALF, stop=STEPS, load=tmp_path)
    tolerance = TOLERANCE if exact else 1e-3
    assert resumed[0].losses == pytest.approx(whole[0].losses[HALF:], rel=tolerance)
    want, got = parity.merge(whole, "final")["pool.weight"], parity.merge(resumed, "final")["pool.weight"]
    assert float((got - want).norm() / want.norm()) < tolerance


def evaluated(config: Config) -> float:
    """In a rank: the loss on the batch of one step, right after that step."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training.step import evaluate, train_step

    system = parity.build(config)
    try:
        tokens = parity.tokens_of(config, 1, SEED)[0]
        batch = parity.microbatches(config, tokens, system.coord.dp, system.mesh.data)
        train_step(system, batch, 0)
        return evaluate(system, [batch])
    finally:
        system.shared.finish()
        megatron.shut_down()


@pytest.mark.timeout(BUILD)
def test_an_evaluation_waits_for_the_update(ranks: Ranks) -> None:
    layout, model = "pp2 dp2", "unipool"
    device = ranks(4).run(evaluated, config_of(layout, model), timeout=BUILD)
    host = ranks(4).run(evaluated, config_of(layout, model, pool_optimizer="host"), timeout=BUILD)
    assert host == pytest.approx(device, rel=1e-7)
