"""When a rank did what within a training step: spans of forward, backward, expert service, transfers, optimizer.

A timeline records only between `begin_step` and `finish_step`; otherwise `span` hands out one shared empty context. On
a GPU a span is a pair of CUDA events on the current stream, read after the step's end, so that nothing waits inside
the step; on the CPU it is a pair of readings of the host's clock. A span on a GPU is therefore the time between two
points of a stream: it also holds the gaps in which the stream had nothing to do because the host was late.

Spans may nest and, on two streams, overlap: whoever reads them sorts that out (moue_dist/measuring/slots.py).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moue_dist.parallel.recording.spans import Kind, Span

_NOTHING: AbstractContextManager[None] = nullcontext()


class Clock(Protocol):
    """Takes marks that cost nearly nothing, and tells afterwards how far apart two of them are."""

    def mark(self) -> Any: ...
    def settle(self) -> None: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The host's clock: exact where work is done by the time that a call returns, as on CPU ranks."""

    def mark(self) -> float:
        return time.perf_counter()

    def settle(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """CUDA events on whatever stream is current where a mark is taken."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of the device that does the work."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class Timeline:
    """One rank's recorder. Marks may come from autograd's threads: spans are kept in order of their ends."""

    def __init__(self, enabled: bool, clock: Clock) -> None:
        self.enabled = enabled
        self._clock = clock
        self._zero: Any = None
        self._marks: list[tuple[str, Any, Any, int | None, int | None]] = []
        self._step: int = 0
        self._spans: list[Span] = []

    @property
    def recording(self) -> bool:
        """Whether a step is being recorded now."""
        return self._zero is not None

    def span(self, kind: Kind, microbatch: int | None = None, layer: int | None = None) -> AbstractContextManager[None]:
        """`with timeline.span("forward", microbatch=3): ...` records the block, or does nothing."""
        if self._zero is None:
            return _NOTHING
        return _Open(self._clock, self._marks, kind, microbatch, layer)

    def begin_step(self, group: Any = None) -> None:
        """Start recording. Collective over `group` (default: all ranks) where the timeline is enabled.

        All ranks take their zero right after a barrier, so lanes of different ranks are out of line by no more than
        what ranks need to leave it: tens of microseconds on one machine, far below a slot.
        """
        if not self.enabled:
            return
        self._clock.settle()
        if dist.is_initialized():
            dist.barrier(group=group)
            self._clock.settle()  # NCCL's barrier is work on the device
        self._marks = []
        self._zero = self._clock.mark()

    def finish_step(self, step: int) -> list[Span]:
        """Stop recording and give the spans of `step`, by start; waits for the device. Empty if nothing was begun."""
        zero, self._zero = self._zero, None
        if zero is None:
            return []
        self._clock.settle()
        seconds = self._clock.seconds
        spans = [Span(kind, seconds(zero, a), seconds(zero, b), m, layer) for kind, a, b, m, layer in self._marks]
        self._marks = []
        self._step, self._spans = step, sorted(spans, key=lambda s: (s.start, -s.end))
        return self._spans

    def gather(self, group: Any = None, *, tell: bool = True) -> list[list[Span]] | None:
        """The last finished step's spans of all ranks of `group`, by rank, on its first rank; None on the others.

        Collective. A rank with `tell=False` sends an empty list, so that a large job's file stays small.
        """
        mine = (self._step, self._spans if tell else [])
        if not dist.is_initialized():
            return [mine[1]]
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        everyone: list[Any] | None = [None] * size if rank == 0 else None
        dist.gather_object(mine, everyone, group=group, group_dst=0)
        if everyone is None:
            return None
        steps = {step for step, _ in everyone}
        if len(steps) > 1:
            raise RuntimeError(f"ranks recorded different steps: {sorted(steps)}")
        return [spans for _, spans in everyone]


class _Open:
    """A span under way."""

    __slots__ = ("_clock", "_kind", "_layer", "_marks", "_microbatch", "_start")

    def __init__(self, clock: Clock, marks: list[Any], kind: str, microbatch: int | None, layer: int | None) -> None:
        self._clock, self._marks, self._kind = clock, marks, kind
        self._microbatch, self._layer = microbatch, layer

    def __enter__(self) -> None:
        self._start = self._clock.mark()

    def __exit__(self, *_: object) -> None:
        self._marks.append((self._kind, self._start, self._clock.mark(), self._microbatch, self._layer))


OFF = Timeline(False, HostClock())  # for callers that record nothing; it can never start
