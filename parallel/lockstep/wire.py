"""The messages of the rounds: all-to-all over the cells of all stages, one communicator a direction, counted.

Two communicators, because a slot's two directions may run side by side. Their calls come in one order on all ranks
(`turns.py`). What a rank has for itself is in no message: everything here is by *other* cells, in their order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.parallel.dispatch.sent import SentBytes
from moue_dist.parallel.groups import Way
from moue_dist.parallel.recording.timeline import OFF, Timeline


class Wire:
    """`groups` hold the cells in the order of stages, then of expert ranks; this rank is `cell` of `cells`."""

    def __init__(self, groups: dict[Way, Any], cell: int, cells: int, expert_parallel: int) -> None:
        self.groups, self.cell, self.cells, self._expert_parallel = groups, cell, cells, expert_parallel
        self.timeline: Timeline = OFF
        self._sent: dict[Way, SentBytes] = {"forward": SentBytes(), "backward": SentBytes()}  # one thread each

    @property
    def sent(self) -> SentBytes:
        """What this rank has sent."""
        return self._sent["forward"] + self._sent["backward"]

    def counts(self, counts_on: Tensor) -> Tensor:
        """Rows of each expert of the other cells that go there, [C - 1, n] -> rows of each expert here that come."""
        one_each = [1] * (self.cells - 1)
        return self.rows("forward", counts_on, one_each, one_each)

    def rows(self, way: Way, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows by other cell: `send[i]` of them go to the i-th, `receive[i]` come from it."""
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        if self.cells == 1:
            return out
        with self.timeline.span("transfer"):
            dist.all_to_all_single(
                out, rows.contiguous(), self._of_all(receive), self._of_all(send), group=self.groups[way]
            )
        size = math.prod(rows.shape[1:]) * rows.element_size()
        stage = self.cell // self._expert_parallel
        self._sent[way].add([n * size for n in self._of_all(send)], stage, self._expert_parallel)
        return out

    def _of_all(self, others: list[int]) -> list[int]:
        return [*others[: self.cell], 0, *others[self.cell :]]


def on_host(numbers: Tensor) -> Tensor:
    """A copy on the host. Waits for the current stream alone: another one may have work issued meanwhile."""
    if numbers.device.type != "cuda":
        return numbers
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return there
