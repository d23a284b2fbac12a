"""The lock-step 1F1B schedule: megatron-core's stages, driven slot by slot so that all of them dispatch together.

megatron-core's own 1F1B warms up differently on every stage (schedules.py:2093), so a stage-spanning all-to-all cannot
live in it. Here all stages run the same sub-slots; what passes between neighbours is exchanged at the end of a slot.

With a lag of one slot, forward and backward of a slot are at different microbatches on every stage and need nothing of
each other. They then run side by side: forward in the calling thread, backward in a second one, on two streams. A
microbatch keeps its stream, since autograd runs backward on the stream that forward ran on: with an odd lag a slot's
two microbatches differ by an odd number on every stage, so streams go by even and odd. They meet at a slot's end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.exchange import LockstepExchange
from moue_dist.parallel.lockstep.schedule import Schedule
from moue_dist.parallel.lockstep.turns import TurnBroken
from moue_dist.parallel.recording.timeline import OFF, Timeline

LossOf = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Any, Any], tuple[Tensor, LossOf]]


@dataclass
class _Live:
    """A microbatch between its forward and its backward: what came in (None on the first stage), what went out."""

    received: Tensor | None
    output: Tensor


@dataclass
class LockstepPipeline:
    """One rank's stage. `shape` and `dtype` are those of the tensor between stages, [s, b, d + lanes].

    `side_by_side` needs an odd lag, and that nothing but the rounds talks to other ranks within a slot.
    """

    model: Any  # megatron-core's DistributedDataParallel over one GPTModel
    exchange: LockstepExchange
    stage: int
    stages: int
    lag: int
    group: Any  # the pipeline group, ranks in the order of stages
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    overlap_grad_reduce: bool
    side_by_side: bool = False
    _live: dict[int, _Live] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.side_by_side and self.lag % 2 == 0:
            raise ValueError(f"side by side with a lag of {self.lag}: it must be odd")
        two = self.side_by_side and self.device.type == "cuda"
        self._streams = [torch.cuda.Stream(self.device) for _ in range(2)] if two else None
        # One thread for the whole run. A new thread's current device is GPU 0: without this every rank of a node would
        # open a context there.
        on_device = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        self._second = ThreadPoolExecutor(1, "backward", initializer=on_device)

    def run(
        self,
        forward_step: ForwardStep,
        microbatches: Sequence[Any],
        *,
        forward_only: bool = False,
        timeline: Timeline = OFF,
    ) -> list[Any]:
        """Forward (and backward) of all microbatches; what the loss function returned, on the last stage.

        As in megatron-core, the loss is divided by the number of microbatches before backward.
        """
        schedule = Schedule(self.stages, len(microbatches), self.lag, forward_only)
        self._live.clear()
        self.exchange.begin_step(timeline)
        self.exchange.begin_schedule(schedule)
        results: list[Any] = []
        inbox: dict[Way, Tensor | None] = {"forward": None, "backward": None}
        for slot in schedule.slots:

            def forward(slot: int = slot, received: Tensor | None = inbox["forward"]) -> Tensor | None:
                with self._on_stream("forward", slot):
                    return self._forward(schedule, slot, received, forward_step, microbatches, results)

            def backward(slot: int = slot, gradient: Tensor | None = inbox["backward"]) -> Tensor | None:
                with self._on_stream("backward", slot):
                    return self._backward(schedule, slot, gradient)

            outbox: dict[Way, Tensor | None] = {"forward": None, "backward": None}
            ways = slot in schedule.forward_slots, slot in schedule.backward_slots
            if self.side_by_side and all(ways):
                outbox["forward"], outbox["backward"] = self._together(forward, backward)
            else:
                outbox["forward"] = forward() if ways[0] else None
                outbox["backward"] = backward() if ways[1] else None
            self._meet()
            inbox = self._shift(schedule, slot, outbox)
        self.exchange.end_schedule()
        return results

    def _together(
        self, forward: Callable[[], Tensor | None], backward: Callable[[], Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both directions of a slot, each in its thread. If one fails, the other stops, too; the cause is told."""
        turns = self.exchange.clock.begin_together()

        def in_thread() -> Tensor | None:
            try:
                return backward()
            except BaseException:
                turns.give_up()
                raise

        other: Future[Tensor | None] = self._second.submit(in_thread)
        try:
            there = forward()
        except TurnBroken:
            other.result()  # raises the cause
            raise
        except BaseException:
            turns.give_up()
            raise
        back = other.result()
        self.exchange.clock.end_together()
        return there, back

    def _on_stream(self, way: Way, slot: int) -> contextlib.AbstractContextManager[Any]:
        """The stream of the microbatch that this direction is at in this slot, or would be at."""
        if self._streams is None:
            return contextlib.nullcontext()
        stream = self._streams[(slot - self.stage + (way == "backward")) % 2]
        stream.wait_stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(stream)

    def _meet(self) -> None:
        """What comes after a slot waits for both of its directions."""
        for stream in self._streams or ():
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _forward(
        self,
        schedule: Schedule,
        slot: int,
        received: Tensor | None,
        forward_step: ForwardStep,
        microbatches: Sequence[Any],
        results: list[Any],
    ) -> Tensor | None:
        """One forward sub-slot: own layers first, then serve what longer stages still run."""
        self.exchange.clock.begin("forward", slot)
        m = schedule.microbatch("forward", slot, self.stage)
        output = None
        if m is not None:
            with self.exchange.wire.timeline.span("forward", m):
                if m == 0:
                    self.model.module.set_is_first_microbatch()
                if received is not None:
                    received.requires_grad_(not schedule.forward_only)
                self.model.module.set_input_tensor(received)
                output, loss_of = forward_step(microbatches[m], self.model)
                if self.stage == self.stages - 1:
                    loss, report = loss_of(output)
                    results.append(report)
                    output = loss / schedule.microbatches
            if not schedule.forward_only:
                self._live[m] = _Live(received, output)
        self.exchange.serve("forward")
        self.exchange.clock.finish("forward")
        return None if output is None or self.stage == self.stages - 1 else output.detach()

    def _backward(self, schedule: Schedule, slot: int, gradient: Tensor | None) -> Tensor | None:
        """One backward sub-slot, the mirror image: serve the longer stages' last layers first, then own layers."""
        self.exchange.clock.begin("backward", slot)
        m = schedule.microbatch("backward", slot, self.stage)
        if m is None:
            self.exchange.serve("backward")
            self.exchange.clock.finish("backward")
            return None
        self.exchange.serve("backward", down_to=self.exchange.clock.layers[self.stage])
        live = self._live.pop(m)
        last = m == schedule.microbatches - 1
        hold = self.model.no_sync() if self.overlap_grad_reduce and not last else contextlib.nullcontext()
        with hold, self.exchange.wire.timeline.span("backward", m):
            torch.autograd.backward(live.output, gradient)  # ONE call: everything of the stage hangs on `output`
        self.exchange.clock.finish("backward")
        return None if live.received is None else live.received.grad

    def _shift(self, schedule: Schedule, slot: int, outbox: dict[Way, Tensor | None]) -> dict[Way, Tensor | None]:
        """Hand over to the neighbours; both sides know from the schedule what comes. All posted before any wait."""
        inbox: dict[Way, Tensor | None] = {"forward": None, "backward": None}
        operations = []
        steps: tuple[tuple[Way, int], ...] = (("forward", 1), ("backward", -1))
        for way, step in steps:
            sent = outbox[way]
            if sent is not None:
                operations.append(dist.P2POp(dist.isend, sent.contiguous(), self._peer(step), self.group))
            source = self.stage - step
            if 0 <= source < self.stages and schedule.microbatch(way, slot, source) is not None:
                coming = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                operations.append(dist.P2POp(dist.irecv, coming, self._peer(-step), self.group))
                inbox[way] = coming
        if operations:
            with self.exchange.wire.timeline.span("transfer"):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        return inbox

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.group, self.stage + step)
