"""Wherever the experts live, a layout trains the model that one process trains: the parity proof of home and hybrid.

As `test_parity.py`, with tokens that travel across stages in lock step. `mN` in a layout is the number of microbatches
of a step: 1, fewer than stages, as many, and more than two rounds of the pipeline. With `--matrix` all combinations run
besides (`matrix`), which takes some six minutes on two cores; with `--random N` so do N layouts of all that may meet,
of all models (`at_random`), some two seconds each.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import pytest
import torch

from moue_dist.config import Config, ConfigError
from moue_dist.refusals.validate import validate
from tests.ranks import parity
from tests.ranks.cases import MODELS, Case
from tests.ranks.spawn import RankPool

TOLERANCE = 1e-5
LOOSE = 5e-5  # at random: some model and batch are 2e-5 from the reference on one rank already
GIB = 2**30
PLACEMENTS = ("replicate", "home", "hybrid")


class PlacedCase(Case):
    """A case with words for the placement (replicate, home, hybrid), lag1 and mN."""

    @cached_property
    def config(self) -> Config:
        words = self.layout.split()
        plain = Case(" ".join(w for w in words if w not in PLACEMENTS), self.model).config
        row_bytes = 3 * plain.moe.expert_width * plain.model.hidden_size * (4 + 4 + 12)
        rows_at_home = math.ceil(plain.moe.pool / (self.degree("pp") * self.degree("ep")))
        parallel = replace(
            plain.parallel,
            placement=next(w for w in words if w in PLACEMENTS),
            pool_budget_gib=1.5 * rows_at_home * row_bytes / GIB if "hybrid" in words else 0.0,
            lag=int("lag1" in words) if "replicate" not in words else -1,
        )
        batch = self.degree("m") * plain.train.micro_batch_size * self.degree("dp")
        return replace(plain, parallel=parallel, train=replace(plain.train, global_batch_size=batch))


CASES = [
    ("home m2", "moue"),
    ("pp2 home m1", "moue"),
    ("pp2 home m2 full", "recurrent"),
    ("pp2 home m5 merge3", "unipool"),
    ("pp2 hybrid m5 full overlap", "moue"),
    ("pp2 hybrid m2 lag1", "moue, full"),
    ("pp2 home m2 3-1", "qwen"),
    ("pp2 home m5 1-3 full lag1", "moue"),
    ("pp2 home m2", "dense first"),
    ("pp2 home m2 dp2", "tied head"),
    ("pp2 home m1 ep2 dp2", "dead"),
    ("pp2 hybrid m5 ep2 dp2 full merge4", "moue"),
    ("pp2 home m2 ep2 tp2", "moue"),
    ("home m3 lag1", "moue"),
    ("pp2 home m4 lag1 merge3", "recurrent"),
    ("pp4 home m9 lag1 ep2 dp2 overlap", "moue"),
    ("pp4 home m3", "moue"),
    ("pp4 hybrid m4 full", "unipool"),
    ("pp4 home m9 overlap merge2", "moue"),
    ("pp4 home m1 1-2-1-1", "five layers"),
    ("pp4 home m4 ep2 dp2", "moue"),
    ("pp2 home m4 ep2 dp2 lag1", "converted"),
    ("pp2 hybrid m5 full", "converted, sigmoid"),
    ("pp2 home m2 ep2 tp2", "olmoe"),
]


def matrix() -> list[tuple[str, str]]:
    """Placement x PP {1, 2, 4} x EP {1, 2} x microbatches {1, PP - 1, PP, 2 PP + 1} x recompute x lag, whole."""
    cases = []
    for placement, pp, ep in itertools.product(PLACEMENTS, (1, 2, 4), (1, 2)):
        if placement == "hybrid" and pp == 1:
            continue  # a copy for every stage is the one home
        for m in sorted({1, pp - 1, pp, 2 * pp + 1} - {0}):
            for recompute, lag in itertools.product(("", "full"), ("", "lag1") if placement != "replicate" else ("",)):
                degrees = (f"pp{pp}" * (pp > 1), placement, f"m{m}", "ep2 dp2" * (ep > 1), recompute, lag)
                cases.append((" ".join(word for word in degrees if word), "moue"))
    return cases


def at_random(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """`number` cases of home and hybrid on up to eight ranks, from all that a layout and a model may have; the same for
    the same seed."""
    draw, cases = random.Random(seed), {}
    while len(cases) < number:
        pp, ep, tp = draw.choice((1, 2, 4)), draw.choice((1, 2)), draw.choice((1, 1, 2))
        dp = draw.choice((1, 2)) * max(1, ep // tp)
        words = [f"{name}{n}" for name, n in (("pp", pp), ("ep", ep), ("dp", dp), ("tp", tp)) if n > 1]
        words += [draw.choice(("home", "hybrid")), f"m{draw.choice((1, max(1, pp - 1), pp, pp + 1, 2 * pp + 1))}"]
        extras = ("full", "lag1", "overlap", "plain", "mb2", f"merge{draw.choice((2, 3, 4))}")
        words += [word for word in extras if draw.random() < 0.4]
        case = PlacedCase(" ".join(words), draw.choice(list(MODELS)))
        try:
            validate(case.config, case.world, cuda=False)
        except ConfigError:
            continue
        if case.world <= 8:
            cases[case.layout, case.model] = None
    return list(cases)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = {*CASES, *(matrix() if option("matrix") else ()), *at_random(option("random"))}
        in_order = sorted(cases, key=lambda case: (PlacedCase(*case).world, case))
        metafunc.parametrize(("layout", "model"), in_order, ids=lambda word: word.replace(" ", "_"))


@pytest.fixture(scope="module")
def yardstick(ranks: Callable[[int], RankPool]) -> Callable[[Case], parity.Yardstick]:
    """The reference's run of a case's model and batch; it starts from the weights that one rank draws."""
    known: dict[tuple[str, int], parity.Yardstick] = {}

    def get(case: Case) -> parity.Yardstick:
        key = case.model, case.config.train.global_batch_size
        if key not in known:
            config = parity.one_process(case.config)
            initial = parity.merge(ranks(1).run(parity.initial_weights, config), "initial")
            known[key] = parity.run_reference(config, initial, case.kill)
        return known[key]

    return get


def test_a_placement_trains_what_one_process_trains(
    layout: str, model: str, ranks: Callable[[int], RankPool], yardstick: Callable[[Case], parity.Yardstick]
) -> None:
    case = PlacedCase(layout, model)
    validate(case.config, case.world, cuda=False)
    chosen = (layout, model) in CASES or (layout, model) in matrix()
    try:
        truth = yardstick(case)
    except parity.NearTies:
        assert not chosen
        pytest.skip("no data on which every choice of an expert is clear")
    tolerance = TOLERANCE if chosen else LOOSE
    parts = ranks(case.world).run(parity.train, case.config, truth.seed, kill=case.kill)
    for part in parts:
        assert part.losses == pytest.approx(truth.losses, rel=tolerance)
        assert part.norms == pytest.approx([r["grad_norm"] for r in truth.record], rel=tolerance)
        for step, counts in enumerate(part.counts):
            assert torch.equal(counts.long(), truth.record[step]["counts_lp"]), f"counts of step {step}"
    final = parity.merge(parts, "final")
    assert final.keys() == truth.final.keys()
    errors = {n: float((w - truth.final[n]).norm() / truth.final[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < tolerance} == {}
