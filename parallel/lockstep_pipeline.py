"""The lock-step 1F1B schedule: megatron-core's stages, driven slot by slot so that all of them dispatch together.

megatron-core's own 1F1B warms up differently on every stage (schedules.py:2093), so a stage-spanning all-to-all cannot
live in it. Here all stages run the same sub-slots; what passes between neighbours is exchanged at the end of a slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep import ExpertService, Schedule
from moue_dist.parallel.timeline import OFF, Timeline

LossOf = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Any, Any], tuple[Tensor, LossOf]]


@dataclass
class _Live:
    """A microbatch between its forward and its backward: what came in (None on the first stage), what went out."""

    received: Tensor | None
    output: Tensor


@dataclass
class LockstepPipeline:
    """One rank's stage. `shape` and `dtype` are those of the tensor between stages, [s, b, d + lanes]."""

    model: Any  # megatron-core's DistributedDataParallel over one GPTModel
    service: ExpertService
    stage: int
    stages: int
    lag: int
    group: Any  # the pipeline group, ranks in the order of stages
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    overlap_grad_reduce: bool
    _live: dict[int, _Live] = field(default_factory=dict)

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
        self.service.timeline = timeline
        self.service.begin_step(schedule)
        results: list[Any] = []
        inbox: dict[Way, Tensor | None] = {"forward": None, "backward": None}
        for slot in schedule.slots:
            outbox: dict[Way, Tensor | None] = {"forward": None, "backward": None}
            if slot in schedule.forward_slots:
                outbox["forward"] = self._forward(schedule, slot, inbox["forward"], forward_step, microbatches, results)
            if slot in schedule.backward_slots:
                outbox["backward"] = self._backward(schedule, slot, inbox["backward"])
            inbox = self._shift(schedule, slot, outbox)
        self.service.end_step()
        return results

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
        self.service.begin("forward", slot)
        m = schedule.microbatch("forward", slot, self.stage)
        output = None
        if m is not None:
            with self.service.timeline.span("forward", m):
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
        self.service.serve()
        self.service.finish()
        return None if output is None or self.stage == self.stages - 1 else output.detach()

    def _backward(self, schedule: Schedule, slot: int, gradient: Tensor | None) -> Tensor | None:
        """One backward sub-slot, the mirror image: serve the longer stages' last layers first, then own layers."""
        self.service.begin("backward", slot)
        m = schedule.microbatch("backward", slot, self.stage)
        if m is None:
            self.service.serve()
            self.service.finish()
            return None
        self.service.serve(down_to=self.service.layers[self.stage])
        live = self._live.pop(m)
        last = m == schedule.microbatches - 1
        hold = self.model.no_sync() if self.overlap_grad_reduce and not last else contextlib.nullcontext()
        with hold, self.service.timeline.span("backward", m):
            torch.autograd.backward(live.output, gradient)  # ONE call: everything of the stage hangs on `output`
        self.service.finish()
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
            with self.service.timeline.span("transfer"):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        return inbox

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.group, self.stage + step)
