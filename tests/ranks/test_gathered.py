"""Dispatch of tokens once a rank: a step that finds too little room runs again, and then has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moue_dist.config import Config
from tests.ranks import parity
from tests.ranks.cases import ODD, Case
from tests.ranks.spawn import RankPool


def steps(config: Config, kill: tuple[int, ...]) -> tuple[list[float], list[float], int]:
    """In a rank: the headroom before and after each step and an evaluation, the losses, schedules that ran."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training import step

    system = parity.build(config)
    try:
        system.context.balance.bias[list(kill)] = -1e9
        exchange, ran = system.context.exchange, 0
        run = system.dense.run_schedule

        def counted(*args: object, **kwargs: object) -> list[object]:
            nonlocal ran
            ran += 1
            return run(*args, **kwargs)  # type: ignore[arg-type]

        object.__setattr__(system.dense, "run_schedule", counted)
        tokens = parity.tokens_of(config, 2, seed=1)
        rooms, losses = [exchange.headroom], []
        for i in range(2):
            mine = parity.microbatches(config, tokens[i], system.coord.dp, system.mesh.data)
            losses.append(step.train_step(system, mine, i).loss)
            rooms.append(exchange.headroom)
        losses.append(step.evaluate(system, [mine]))
        return rooms, losses, ran
    finally:
        megatron.shut_down()


def test_a_step_without_room_runs_again_and_the_next_ones_have_it(ranks: Callable[[int], RankPool]) -> None:
    """The odd experts, one of two ranks, get no token: the other gets twice an even share."""
    case = Case("pp2 ep2 dp2 tokens tight", "dead")
    found = ranks(4).run(steps, case.config, ODD)
    for rooms, _, ran in found:
        assert rooms[0] == 1.0 and rooms[1] == rooms[2] > 2.0
        assert ran == 4, "two runs of the first step, one of the second, one evaluation"
    roomy = ranks(4).run(steps, replace(case.config, moe=replace(case.config.moe, headroom=2.0)), ODD)
    assert all(ran == 3 for _, _, ran in roomy)
    assert [losses for _, losses, _ in found] == [losses for _, losses, _ in roomy]


def test_an_evaluation_without_room_runs_again(ranks: Callable[[int], RankPool]) -> None:
    config = Case("ep2 dp2 tokens tight", "dead").config
    before, after = ranks(2).run(evaluation, config, 1.0), ranks(2).run(evaluation, config, 2.0)
    assert [loss for loss, _ in before] == [loss for loss, _ in after]
    assert all(room > 2.0 for _, room in before) and all(room == 2.0 for _, room in after)


def evaluation(config: Config, headroom: float) -> tuple[float, float]:
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training import step

    system = parity.build(replace(config, moe=replace(config.moe, headroom=headroom)))
    try:
        system.context.balance.bias[list(ODD)] = -1e9
        tokens = parity.tokens_of(config, 1, seed=1)
        mine = parity.microbatches(config, tokens[0], system.coord.dp, system.mesh.data)
        return step.evaluate(system, [mine]), system.context.exchange.headroom
    finally:
        megatron.shut_down()
