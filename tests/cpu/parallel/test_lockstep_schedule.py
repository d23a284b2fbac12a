"""The lock-step schedule, simulated: how many sub-slots, what passes when, one order of collectives, how much is live.

The pipelines and exchanges below are the real ones; only the wire is not there. Every peer is silent: it sends no rows
and its tensors are zeros. So each stage can run alone, and what it posts is written down and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.parallel.dispatch.routes import order_rows
from moue_dist.parallel.lockstep import pipeline as lockstep_pipeline
from moue_dist.parallel.lockstep import wire as lockstep_wire
from moue_dist.parallel.lockstep.clock import Clock
from moue_dist.parallel.lockstep.exchange import LockstepExchange
from moue_dist.parallel.lockstep.meeting import Counts
from moue_dist.parallel.lockstep.pipeline import LockstepPipeline
from moue_dist.parallel.lockstep.schedule import LockstepError, Schedule
from moue_dist.parallel.placement.placement import Placement

D = 4  # hidden size


# The schedule alone.


@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 4))
def test_every_stage_runs_every_microbatch_once_and_in_time(stages: int, microbatches: int, lag: int) -> None:
    schedule = Schedule(stages, microbatches, lag)
    assert len(schedule.forward_slots) == len(schedule.backward_slots) == microbatches + stages - 1
    assert schedule.slots == range(schedule.backward_slots.stop)
    at: dict[tuple[str, int], list[int]] = {}  # (way, stage) -> slot of each microbatch
    for stage in range(stages):
        for way in ("forward", "backward"):
            ran = [(m, t) for t in schedule.slots if (m := schedule.microbatch(way, t, stage)) is not None]  # type: ignore[arg-type]
            assert [m for m, _ in ran] == list(range(microbatches))
            at[way, stage] = [t for _, t in ran]
    for m in range(microbatches):
        for stage in range(stages - 1):  # one slot to travel in either direction
            assert at["forward", stage + 1][m] == at["forward", stage][m] + 1
            assert at["backward", stage][m] == at["backward", stage + 1][m] + 1
        assert at["backward", stages - 1][m] == at["forward", stages - 1][m] + lag
    for stage in range(stages):
        live = [  # after the forward and before the backward of a slot
            sum(f <= t <= b for f, b in zip(at["forward", stage], at["backward", stage], strict=True))
            for t in schedule.slots
        ]
        assert max(live) == min(microbatches, 2 * (stages - 1 - stage) + 1 + lag) == schedule.in_flight(stage)


def test_without_backward_nothing_is_due_after_the_forward() -> None:
    schedule = Schedule(3, 4, forward_only=True)
    assert schedule.slots == range(6) and not schedule.backward_slots
    assert all(schedule.microbatch("backward", t, s) is None for t in range(20) for s in range(3))
    assert [schedule.in_flight(s) for s in range(3)] == [1, 1, 1]


# The real pipelines, one stage after the other, without a wire.


@dataclass
class Wire:
    """Stands where torch.distributed does: notes what is posted and answers for silent peers."""

    stage: int = 0
    collectives: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # group, shape but for the rows
    posted: list[list[tuple[str, int]]] = field(default_factory=list)  # for each exchange: (send or receive, peer)
    isend = "send"
    irecv = "receive"

    def all_to_all_single(self, out: Tensor, rows: Tensor, *splits: list[int], group: str) -> None:
        out.zero_()
        self.collectives.append((group, tuple(rows.shape[1:])))

    def P2POp(self, what: str, tensor: Tensor, peer: int, group: Any) -> tuple[str, int]:  # noqa: N802
        if what == "receive":
            tensor.zero_()
        return what, peer

    def batch_isend_irecv(self, operations: list[tuple[str, int]]) -> list[Any]:
        self.posted.append(operations)
        return [SimpleNamespace(wait=lambda: None) for _ in operations]

    def get_global_rank(self, group: Any, stage: int) -> int:
        return stage


class Watched(Clock):
    """Notes the sub-slots and rounds as they are entered, and how many microbatches are live before each backward."""

    entered: list[tuple[str, int, int | None]]  # set by `exchange_of`
    live: list[int]
    pipeline: Any

    def begin(self, way: Any, slot: int) -> None:
        super().begin(way, slot)
        self.entered.append((way, slot, None))
        self.live.append(len(self.pipeline._live))

    def enter(self, way: Any, j: int) -> None:
        super().enter(way, j)
        self.entered.append((way, self.slot, j))


class Stage:
    """What a pipeline asks of megatron-core's wrapped model; `n` MoE layers, x + moe(x)."""

    def __init__(self, exchange: LockstepExchange, n: int) -> None:
        self.exchange, self.n, self.module = exchange, n, self
        self.weight = torch.ones(1, 1, D, requires_grad=True)
        self.experts = [exchange.layer(range(exchange.placement.pool), j) for j in range(n)]

    def set_is_first_microbatch(self) -> None: ...

    def set_input_tensor(self, received: Tensor | None) -> None:
        self.received = received

    def layer(self, x: Tensor, j: int) -> Tensor:
        chosen = self.experts[j].chosen_before()
        ids = torch.zeros(1, 1, dtype=torch.int64) if chosen is None else chosen
        y = self.experts[j](x.view(1, D), ids, x.new_ones(1, 1))
        return x + y.view_as(x)

    def __call__(self) -> Tensor:
        x = self.weight if self.received is None else self.received + self.weight
        for j in range(self.n):
            x = checkpoint(self.layer, x, j, use_reentrant=True) if self.exchange.recompute else self.layer(x, j)
        return x


def exchange_of(stage: int, layers: tuple[int, ...], *, ep: int = 1, recompute: bool = False) -> LockstepExchange:
    cells = len(layers) * ep
    home = Placement(len(layers), ep, tuple((e // ep,) for e in range(cells)), tuple(e % ep for e in range(cells)))
    slab = ExpertSlab(torch.ones(1, 3 * D), torch.zeros(1, 3 * D), D, 1, ((0, 1),))
    pool: Any = SimpleNamespace(placement=home, ep_rank=0, ids=home.rows(stage, 0), slab=lambda ids: slab)
    exchange = LockstepExchange(
        pool,
        stage,
        layers,
        {"forward": "forward", "backward": "backward"},
        backend="loop",
        recompute=recompute,
        device=torch.device("cpu"),
    )
    clock: Any = exchange.clock
    clock.__class__ = Watched
    clock.entered, clock.live, clock.pipeline = [], [], SimpleNamespace(_live={})
    return exchange


def run_stage(stage: int, layers: tuple[int, ...], microbatches: int, lag: int, recompute: bool, ep: int) -> Any:
    exchange = exchange_of(stage, layers, ep=ep, recompute=recompute)
    clock: Any = exchange.clock
    pipeline = LockstepPipeline(
        model=Stage(exchange, layers[stage]),
        exchange=exchange,
        stage=stage,
        stages=len(layers),
        lag=lag,
        group=None,
        shape=(1, 1, D),
        dtype=torch.float32,
        device=torch.device("cpu"),
        overlap_grad_reduce=False,
        side_by_side=lag % 2 == 1,
    )
    clock.pipeline = pipeline

    def forward_step(batch: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        return model(), lambda output: (output.sum(), {"loss": output.sum().detach()})

    results = pipeline.run(forward_step, [None] * microbatches)
    assert len(results) == (microbatches if stage == len(layers) - 1 else 0)
    assert not pipeline._live
    return clock


@pytest.mark.parametrize(
    ("layers", "microbatches", "lag", "recompute", "ep"),
    [
        ((2,), 3, 0, False, 1),
        ((1, 1), 1, 0, False, 1),
        ((1, 1), 5, 1, False, 2),
        ((2, 1), 2, 0, True, 1),
        ((0, 2), 5, 0, False, 1),
        ((1, 3, 2), 2, 0, False, 1),
        ((1, 3, 2), 3, 2, True, 2),
        ((2, 0, 1), 7, 1, False, 1),
        ((1, 3, 2, 1), 1, 0, True, 1),
        ((1, 3, 2, 1), 3, 0, False, 1),
        ((1, 1, 1, 1), 4, 1, True, 1),
        ((2, 0, 3, 1), 9, 0, True, 1),
        ((1, 2, 1, 0, 1), 11, 3, False, 1),
    ],
)
def test_all_stages_post_the_same_collectives_in_the_same_order(
    layers: tuple[int, ...], microbatches: int, lag: int, recompute: bool, ep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, rounds = len(layers), max(layers)
    clocks, wires = [], []
    for stage in range(stages):
        wire = Wire(stage)
        monkeypatch.setattr(lockstep_wire, "dist", wire)
        monkeypatch.setattr(lockstep_pipeline, "dist", wire)
        clocks.append(run_stage(stage, layers, microbatches, lag, recompute, ep))
        wires.append(wire)

    slots = microbatches + stages - 1
    expected = []
    for t in range(slots + stages - 1 + lag):
        if t < slots:
            expected += [("forward", t, j) for j in (None, *range(rounds))]
        if t >= stages - 1 + lag:
            expected += [("backward", t, j) for j in (None, *reversed(range(rounds)))]
    for stage, (clock, wire) in enumerate(zip(clocks, wires, strict=True)):
        for way in ("forward", "backward"):  # side by side, which thread enters first is not fixed; what they send is
            mine = [x for x in clock.entered if x[0] == way]
            assert mine == [x for x in expected if x[0] == way], f"stage {stage}"
        assert lag % 2 or clock.entered == expected, f"stage {stage}"
        assert wire.collectives == wires[0].collectives, f"stage {stage}"
        for way in ("forward", "backward"):
            assert sum(w == way and j is None for w, _, j in clock.entered) == slots
            posted = sum(group == way for group, _ in wire.collectives)
            a_round = 3 if way == "forward" else 2  # counts, rows, outputs; gradients there and back
            assert posted == (slots * rounds * a_round if stages * ep > 1 else 0)
        in_flight = min(microbatches, 2 * (stages - 1 - stage) + 1 + lag)
        assert in_flight - lag % 2 <= max(clock.live) <= in_flight
    _pair_up(wires)


def test_a_layer_that_runs_again_takes_the_experts_of_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may choose otherwise the second time, and then sizes and rows would not be those that were sent."""

    class Fickle(Stage):
        def layer(self, x: Tensor, j: int) -> Tensor:
            taken = self.experts[j].chosen_before()
            if taken is None:
                choice = torch.tensor([[len(self.chosen) % 2]])
                self.chosen.append(choice)
            else:
                choice = taken
                self.again.append(taken)
            y = self.experts[j](x.view(1, D), choice, x.new_ones(1, 1))
            return x + y.view_as(x)

        chosen: list[Tensor] = []  # noqa: RUF012  one test, one stage
        again: list[Tensor] = []  # noqa: RUF012

    monkeypatch.setattr(lockstep_wire, "dist", Wire(1))
    monkeypatch.setattr(lockstep_pipeline, "dist", Wire(1))
    monkeypatch.setattr(__name__ + ".Stage", Fickle)
    run_stage(1, (1, 1), 5, 1, True, 1)
    assert [int(c) for c in Fickle.chosen] == [0, 1, 0, 1, 0]
    assert Fickle.again == Fickle.chosen


def _pair_up(wires: list[Wire]) -> None:
    """Between neighbours, what one sends the other receives, the same number of times."""
    for a, b in zip(range(len(wires) - 1), range(1, len(wires)), strict=True):
        for sender, receiver in ((a, b), (b, a)):
            sent = sum(("send", receiver) in posted for posted in wires[sender].posted)
            received = sum(("receive", sender) in posted for posted in wires[receiver].posted)
            assert sent == received > 0
    assert all(0 <= peer < len(wires) for wire in wires for posted in wire.posted for _, peer in posted)


# Faults are named at their cause.


def opened(way: Any, *, layers: tuple[int, ...] = (2, 3), microbatches: int = 2) -> Any:
    exchange = exchange_of(0, layers)
    exchange.begin_schedule(Schedule(len(layers), microbatches))
    exchange.clock.begin(way, 1)
    return exchange


def enter(exchange: LockstepExchange, way: str, j: int) -> None:
    """A round without tokens, of whatever layer."""
    none, weight = torch.empty(0, D), torch.empty(0, 1)
    order = order_rows(torch.empty(0, 1, dtype=torch.int64), exchange.layer(range(2), 0).table)
    if way == "forward":
        exchange.forward_round(j, none, weight, order)
    else:
        exchange.backward_round(j, none, none, weight, order, [0])


@pytest.mark.parametrize(
    ("due", "way", "j", "message"),
    [
        ("forward", "forward", 1, "slot 1, stage 0: forward of layer 1 entered, but forward of layer 0 is due"),
        ("forward", "backward", 2, "slot 1, stage 0: backward of layer 2 entered, but forward of layer 0 is due"),
        ("backward", "backward", 0, "slot 1, stage 0: backward of layer 0 entered, but backward of layer 2 is due"),
    ],
)
def test_a_round_that_is_not_due_is_named_before_anything_is_sent(
    due: str, way: str, j: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire()
    monkeypatch.setattr(lockstep_wire, "dist", wire)
    exchange = opened(due)
    with pytest.raises(LockstepError, match=message):
        enter(exchange, way, j)
    assert not wire.collectives


def test_a_round_more_or_less_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep_wire, "dist", Wire())
    exchange = opened("forward")
    enter(exchange, "forward", 0)
    with pytest.raises(LockstepError, match=r"slot 1, stage 0: forward rounds \[1, 2\] were left"):
        exchange.clock.finish("forward")
    exchange.serve("forward")
    exchange.clock.finish("forward")
    with pytest.raises(LockstepError, match="forward of layer 3 entered, but nothing is due"):
        enter(exchange, "forward", 3)


def test_rows_from_a_stage_that_is_idle_are_refused() -> None:
    exchange = opened("forward", microbatches=1)  # in slot 1 stage 1 is at microbatch 0, stage 0 is through
    with pytest.raises(LockstepError, match="cell 0 sent rows of layer 0, but is idle by schedule"):
        counts = torch.tensor([[1], [1]])
        exchange.owner.keep(0, torch.ones(1, D), Counts(counts, counts))


def test_a_microbatch_without_its_backward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep_wire, "dist", Wire())
    exchange = opened("forward")
    exchange.serve("forward")
    with pytest.raises(LockstepError, match="never had their backward"):
        exchange.end_schedule()
    exchange.begin_schedule(Schedule(2, 1))  # a step that broke off is forgotten
    exchange.end_schedule()
