"""The schedule of lock step: which microbatch a stage is at in which slot.

Two stages, three microbatches, lag 0 (F2: forward of microbatch 2, -: only serving):

    slot       0     1     2       3     4
    stage 0    F0    F1    F2 B0   B1    B2
    stage 1    -     F0 B0 F1 B1   F2 B2 -
"""

from __future__ import annotations

from dataclasses import dataclass

from moue_dist.parallel.groups import Way


@dataclass(frozen=True)
class Schedule:
    """Which microbatch a stage is at in a slot; None: nothing of its own, it serves.

    Example, 2 stages, 2 microbatches: forward at slots 0..2, stage 1 starts at slot 1; backward at slots 1..3.
    """

    stages: int
    microbatches: int
    lag: int = 0
    forward_only: bool = False

    @property
    def forward_slots(self) -> range:
        return range(self.microbatches + self.stages - 1)

    @property
    def backward_slots(self) -> range:
        if self.forward_only:
            return range(0)
        start = self.stages - 1 + self.lag
        return range(start, start + self.microbatches + self.stages - 1)

    @property
    def slots(self) -> range:
        return range(max(self.forward_slots.stop, self.backward_slots.stop))

    def microbatch(self, way: Way, slot: int, stage: int) -> int | None:
        m = slot - stage if way == "forward" else slot - 2 * (self.stages - 1) - self.lag + stage
        in_range = slot in (self.forward_slots if way == "forward" else self.backward_slots)
        return m if in_range and 0 <= m < self.microbatches else None

    def in_flight(self, stage: int) -> int:
        """The most microbatches whose forward is done and whose backward is not, on a stage."""
        if self.forward_only:
            return 1
        return min(self.microbatches, 2 * (self.stages - 1 - stage) + 1 + self.lag)


class LockstepError(RuntimeError):
    """A rank is about to run a round that is not due: named at its cause, where a collective would only hang."""
