"""Two threads that issue one common order of work: a slot's forward and backward, side by side.

Collectives of two communicators must be issued in the same order on all ranks, or two GPUs may each wait with one that
the other has behind another. So the threads take turns by a list that follows from the schedule alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from moue_dist.parallel.groups import Way

Turn = tuple[Way, int, Literal["counts", "rows"]]  # direction, MoE layer of the stage, part of its round


class TurnBroken(RuntimeError):
    """The other thread failed: its turns will not come."""


class Turns:
    """Turns in a fixed order. A thread that asks for its next one waits until all before it are over."""

    def __init__(self, order: Sequence[Turn]) -> None:
        self._order, self._at, self._broken = tuple(order), 0, False
        self._moved = threading.Condition()

    @contextmanager
    def take(self, turn: Turn) -> Iterator[None]:
        """`with turns.take(("forward", 0, "rows")): ...`; raises TurnBroken after `give_up`."""
        with self._moved:
            self._moved.wait_for(lambda: self._broken or self._order[self._at : self._at + 1] == (turn,))
            if self._broken:
                raise TurnBroken(f"{turn} will not come")
        yield
        with self._moved:
            self._at += 1
            self._moved.notify_all()

    def give_up(self) -> None:
        """Let whoever waits fail."""
        with self._moved:
            self._broken = True
            self._moved.notify_all()


def side_by_side(rounds: int) -> list[Turn]:
    """The order of a slot with both directions, `rounds` layers each.

    A backward round is issued while the host waits for the counts of the forward round before it, and gives the
    device work for that time. Example, 2 rounds: counts of forward 0, backward 1, rows of forward 0, counts of forward
    1, backward 0, rows of forward 1.
    """
    order: list[Turn] = []
    for j in range(rounds):
        order += [("forward", j, "counts"), ("backward", rounds - 1 - j, "rows"), ("forward", j, "rows")]
    return order
