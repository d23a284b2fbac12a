"""Experts in FP8 over layouts: the reference of `kernels/fp8/experts.py` in the place of the GPU's products.

Rounding to e4m3 is by row, so a layout changes nothing but the order of sums. Where that is the same, not a bit
differs; where it is not, runs agree as closely as in fp32, but that a number now and then rounds to its neighbour,
1/16 away. Dispatch row by row stands apart: there the gradient of a routing weight comes from the outputs and not, as
with tokens once a rank and at home, from the activations, and rounding to FP8 tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moue_dist.config import Config
from tests.host_adam import needs_operator
from tests.ranks import parity
from tests.ranks.spawn import RankPool
from tests.ranks.test_placement_parity import PlacedCase
from tests.ranks.test_replacement import home, rotated

Ranks = Callable[[int], RankPool]
SEED = 0
SAME = 5e-5  # a weight or two may round to the other neighbour; 2e-7 where none does
NOISE = 1e-3  # of losses that differ by roundings to FP8; FP8 against fp32 is 6e-4
ALONE, ROWS = "replicate m4", "replicate m4 rows"


def config_of(layout: str, model: str = "moue", **parallel: object) -> Config:
    config = PlacedCase(layout, model).config
    return replace(config, parallel=replace(config.parallel, **parallel))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(ranks: Ranks) -> Callable[..., list[parity.Trained]]:
    """The run of a layout, once."""
    known: dict[tuple[str, str], list[parity.Trained]] = {}

    def get(layout: str, experts: str = "fp8") -> list[parity.Trained]:
        if (layout, experts) not in known:
            case = PlacedCase(layout, "moue")
            known[layout, experts] = ranks(case.world).run(parity.train, case.config, SEED, experts=experts)
        return known[layout, experts]

    return get


def apart(run: list[parity.Trained], other: list[parity.Trained]) -> tuple[float, float]:
    """The largest relative difference of a loss or gradient norm, and of a weight tensor's norm."""
    like = [*other[0].losses, *other[0].norms]
    numbers = [abs(a / b - 1) for part in run for a, b in zip([*part.losses, *part.norms], like, strict=True)]
    mine, theirs = parity.merge(run, "final"), parity.merge(other, "final")
    assert mine.keys() == theirs.keys()
    return max(numbers), max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in mine)


@pytest.mark.parametrize(
    ("layout", "like"),
    [
        ("replicate m4 full", ALONE),
        ("replicate m2 dp2", ALONE),
        ("pp2 replicate m4", ALONE),
        ("pp2 replicate m4 rows", ROWS),
        ("replicate m2 ep2 dp2", ALONE),
        ("pp2 replicate m2 ep2 dp2 tight merge2", ALONE),  # a step that finds no room runs again
        ("pp2 home m4 lag1", ALONE),
        ("pp2 hybrid m4", ALONE),
        ("pp2 home m2 ep2 dp2 full", ALONE),
    ],
)
def test_layouts_train_the_same(layout: str, like: str, trained: Callable[..., list[parity.Trained]]) -> None:
    numbers, weights = apart(trained(layout), trained(like))
    assert numbers < SAME and weights < SAME


@pytest.mark.parametrize(("layout", "like"), [(ROWS, ALONE), ("replicate m2 ep2 dp2 rows", ROWS)])
def test_others_agree_to_the_noise_of_fp8(layout: str, like: str, trained: Callable[..., list[parity.Trained]]) -> None:
    assert trained(layout)[0].losses[0] == pytest.approx(trained(like)[0].losses[0], rel=1e-6)
    numbers, weights = apart(trained(layout), trained(like))
    assert numbers < 4 * NOISE and weights < 2e-2


@pytest.mark.parametrize(
    ("layout", "like"), [("home m4", ALONE), ("replicate m4 selective", ALONE), ("replicate m4 rows selective", ROWS)]
)
def test_in_the_same_order_not_a_bit_differs(
    layout: str, like: str, trained: Callable[..., list[parity.Trained]]
) -> None:
    assert apart(trained(layout), trained(like)) == (0, 0)


def test_it_is_fp8_and_it_learns_what_fp32_learns(trained: Callable[..., list[parity.Trained]]) -> None:
    fp8, fp32 = trained(ALONE), trained(ALONE, "loop")
    first = abs(fp8[0].losses[0] / fp32[0].losses[0] - 1)
    assert 1e-5 < first < NOISE
    numbers, weights = apart(fp8, fp32)
    assert numbers < 8 * NOISE and 1e-3 < weights < 3e-2


@pytest.mark.parametrize("layout", ["pp2 replicate m2 ep2 dp2", "pp2 home m2 ep2 dp2"])
def test_it_resumes_exactly(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    """The weights of a checkpoint are quantised before they are used, those of the start are forgotten."""
    config, pool = config_of(layout), ranks(4)
    whole = pool.run(parity.train, config, SEED, stop=4, experts="fp8")
    pool.run(parity.train, config, SEED, stop=2, save=tmp_path, experts="fp8")
    resumed = pool.run(parity.train, config, SEED, start=2, stop=4, load=tmp_path, experts="fp8")
    assert resumed[0].losses == whole[0].losses[2:] and resumed[0].norms == whole[0].norms[2:]
    want, got = parity.merge(whole, "final"), parity.merge(resumed, "final")
    assert [n for n in want if n.startswith("pool") and not torch.equal(want[n], got[n])] == []


def steps(config: Config, moves: bool, evaluates: bool = False) -> tuple[list[float], list[int], dict[str, Tensor]]:
    """Inside a rank: losses of six steps, steps after which FP8 weights were not those of the pool, and the pool.

    `moves` takes the pool to another placement and back; `evaluates` evaluates after every step, whatever of the step
    is still under way.
    """
    from moue_dist.kernels.fp8.pool import QuantisedPool
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training.move_pool import move_pool
    from moue_dist.training.step import evaluate, train_step

    system = parity.build(config, "fp8")
    try:
        losses, stale = [], []
        at_home = home(config, system.mesh)
        for i, tokens in enumerate(parity.tokens_of(config, 6, SEED)):
            batch = parity.microbatches(config, tokens, system.coord.dp, system.mesh.data)
            losses.append(train_step(system, batch, i).loss)
            if evaluates:
                losses.append(evaluate(system, [batch]))
            if moves and i in (1, 3):
                move_pool(system, rotated(at_home) if i == 1 else at_home, i + 1)
            system.shared.finish()
            pool = system.context.pool
            pool.ready()
            fresh = QuantisedPool(pool.buffer, pool.hidden, pool.width)
            fresh.refresh()
            if not all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(pool.fp8.tensors(), fresh.tensors(), strict=True)
            ):
                stale.append(i)
        rows = {f"pool.{e}": row.clone() for e, row in zip(pool.ids, pool.buffer.weight, strict=True)}
        return losses, stale, rows
    finally:
        system.shared.finish()
        megatron.shut_down()


@pytest.mark.parametrize("layout", ["pp2 home m4", "pp2 home m2 ep2 dp2 full"])
def test_a_moved_pool_is_quantised_where_it_arrives(layout: str, ranks: Ranks) -> None:
    """Experts compute the same rows in the same order wherever they live: not a bit changes."""
    config = config_of(layout)
    stayed, moved = (ranks(PlacedCase(layout, "moue").world).run(steps, config, way) for way in (False, True))
    assert [part[1] for part in stayed + moved] == [[]] * len(stayed + moved)
    assert [part[0] for part in moved] == [part[0] for part in stayed]
    before, after = ({n: w for part in run for n, w in part[2].items()} for run in (stayed, moved))
    assert before.keys() == after.keys()
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


@pytest.mark.parametrize("layout", ["pp2 replicate m2 ep2 dp2", "replicate m1 dp4"])
def test_replicas_are_quantised_after_every_step(layout: str, ranks: Ranks) -> None:
    for _, stale, _ in ranks(4).run(steps, config_of(layout), False, True):
        assert stale == []


@needs_operator
@pytest.mark.timeout(900)
def test_the_hosts_late_update_is_quantised(ranks: Ranks) -> None:
    layout = "pp2 replicate m2 dp2"
    device = ranks(4).run(steps, config_of(layout), False, True)
    host = ranks(4).run(steps, config_of(layout, pool_optimizer="host"), False, True, timeout=900)
    for part, like in zip(host, device, strict=True):
        assert part[0] == pytest.approx(like[0], rel=NOISE) and part[1] == []
