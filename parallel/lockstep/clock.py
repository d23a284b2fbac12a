"""What is due on one rank, and when: slots, rounds, and the turns of a slot's two directions.

One collective order on all ranks follows from what is due, which is asserted: a rank about to run another round raises
`LockstepError`, where a collective would only hang.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from moue_dist.parallel.groups import Way
from moue_dist.parallel.lockstep.schedule import LockstepError, Schedule
from moue_dist.parallel.lockstep.turns import Turn, Turns, side_by_side


class Clock:
    """`layers` are the MoE layers of each stage; a sub-slot has as many rounds as the longest stage has layers."""

    def __init__(self, stage: int, layers: tuple[int, ...]) -> None:
        self.stage, self.layers, self.rounds = stage, layers, max(layers)
        self.begin_step(Schedule(len(layers), 1))

    def begin_step(self, schedule: Schedule) -> None:
        """Take the schedule of the next step, whatever became of the last one."""
        self.schedule, self.slot = schedule, 0
        self.due: dict[Way, list[int]] = {"forward": [], "backward": []}
        self._turns: Turns | None = None

    def begin(self, way: Way, slot: int) -> None:
        """Open a sub-slot: list the rounds that are due in it, the same on every rank."""
        self.slot = slot
        self.due[way] = list(range(self.rounds) if way == "forward" else reversed(range(self.rounds)))

    def next(self, way: Way, down_to: int = 0) -> int | None:
        """The layer of the round that is due next; in backward only those of layers >= `down_to`."""
        due = self.due[way][:1]
        return due[0] if due and (way == "forward" or due[0] >= down_to) else None

    def enter(self, way: Way, j: int) -> None:
        """Run the round of layer j now."""
        if self.due[way][:1] != [j]:
            due = " and ".join(f"{w} of layer {rounds[0]}" for w, rounds in self.due.items() if rounds) or "nothing"
            raise LockstepError(f"slot {self.slot}, stage {self.stage}: {way} of layer {j} entered, but {due} is due")
        self.due[way].pop(0)

    def finish(self, way: Way) -> None:
        """Close a sub-slot."""
        if self.due[way]:
            raise LockstepError(f"slot {self.slot}, stage {self.stage}: {way} rounds {self.due[way]} were left out")

    def at(self, way: Way, stage: int, j: int) -> int | None:
        """The microbatch that `stage` is at in this sub-slot's round j, or None."""
        return self.schedule.microbatch(way, self.slot, stage) if j < self.layers[stage] else None

    # Two directions of a slot side by side: forward in the calling thread, backward in another.

    def begin_together(self) -> Turns:
        self._turns = Turns(side_by_side(self.rounds))
        return self._turns

    def end_together(self) -> None:
        self._turns = None

    def turn(self, turn: Turn) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.take(turn)
