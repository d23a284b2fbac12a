"""The messages of the rounds: all-to-all over the cells of all stages, one communicator a direction, counted.

Two communicators, because a slot's two directions may run side by side. Their calls come in one order on all ranks
(`turns.py`).
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

    def counts(self, counts_cn: Tensor) -> Tensor:
        """What each cell will send to this one's experts, [C, n]; `counts_cn` is what this one sends to theirs."""
        theirs_cn = torch.empty_like(counts_cn)
        with self.timeline.span("transfer"):
            dist.all_to_all_single(theirs_cn, counts_cn, group=self.groups["forward"])
        self._count("forward", [counts_cn.shape[1] * counts_cn.element_size()] * self.cells)
        return theirs_cn

    def rows(self, way: Way, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows by cell: `send[c]` of them go to cell c, `receive[c]` come from it."""
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        with self.timeline.span("transfer"):
            dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.groups[way])
        size = math.prod(rows.shape[1:]) * rows.element_size()
        self._count(way, [n * size for n in send])
        return out

    def _count(self, way: Way, send_bytes: list[int]) -> None:
        stage = self.cell // self._expert_parallel
        self._sent[way].add(send_bytes, stage, self.cell, self._expert_parallel)


def on_host(numbers: Tensor) -> Tensor:
    """A copy on the host. Waits for the current stream alone: another one may have work issued meanwhile."""
    if numbers.device.type != "cuda":
        return numbers
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return there
