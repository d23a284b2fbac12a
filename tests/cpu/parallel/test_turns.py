"""A slot's two directions in two threads: one order of work, and a failure that is told by its cause."""

from __future__ import annotations

import threading

import pytest
import torch

from moue_dist.parallel.lockstep.pipeline import LockstepPipeline
from moue_dist.parallel.lockstep.turns import TurnBroken, Turns, side_by_side
from tests.cpu.parallel.test_lockstep_schedule import D, Stage, exchange_of


def test_the_order_of_a_slot():
    assert side_by_side(2) == [
        ("forward", 0, "counts"),
        ("backward", 1, "rows"),
        ("forward", 0, "rows"),
        ("forward", 1, "counts"),
        ("backward", 0, "rows"),
        ("forward", 1, "rows"),
    ]


@pytest.mark.timeout(60)
def test_threads_take_turns_in_the_order_whoever_comes_first():
    order = side_by_side(40)
    turns, seen = Turns(order), []

    def run(way):
        for turn in order:
            if turn[0] == way:
                with turns.take(turn):
                    seen.append(turn)

    threads = [threading.Thread(target=run, args=(way,), daemon=True) for way in ("backward", "forward")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == order


@pytest.mark.timeout(60)
def test_who_waits_for_a_thread_that_failed_fails_too():
    turns = Turns(side_by_side(1))
    threading.Timer(0.1, turns.give_up).start()
    with pytest.raises(TurnBroken):
        with turns.take(("backward", 0, "rows")):
            pass


class Fails(Exception):
    pass


class Broken(Stage):
    """Its third microbatch fails, in forward or in backward; one slot has both directions by then."""

    at: str
    seen = 0

    def layer(self, x, j):
        self.seen += 1
        if self.seen == 3 and self.at == "forward":
            raise Fails
        y = super().layer(x, j)
        if self.seen == 2 and self.at == "backward":
            y.register_hook(self.fail)
        return y

    def fail(self, gradient):
        raise Fails


@pytest.mark.timeout(60)
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_failure_in_one_direction_ends_the_other_and_is_the_one_told(at, monkeypatch):
    from moue_dist.parallel.lockstep import wire as lockstep
    from tests.cpu.parallel.test_lockstep_schedule import Wire

    monkeypatch.setattr(lockstep, "dist", Wire())
    exchange = exchange_of(0, (1,))
    model = Broken(exchange, 1)
    model.at = at
    pipeline = LockstepPipeline(
        model=model,
        exchange=exchange,
        stage=0,
        stages=1,
        lag=1,
        group=None,
        shape=(1, 1, D),
        dtype=torch.float32,
        device=torch.device("cpu"),
        overlap_grad_reduce=False,
        side_by_side=True,
    )
    with pytest.raises(Fails):
        pipeline.run(lambda batch, model: (model(), lambda out: (out.sum(), {"loss": out.sum()})), [None] * 5)


def test_side_by_side_needs_an_odd_lag():
    with pytest.raises(ValueError, match="odd"):
        LockstepPipeline(None, None, 0, 1, 0, None, (1, 1, 1), torch.float32, torch.device("cpu"), False, True)
