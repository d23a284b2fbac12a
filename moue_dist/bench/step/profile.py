"""One more step under torch's profiler, on every rank: its kernels, how long the device is busy, where the host waits.

On a GPU the events are the device's kernels and copies. On the ranks of a CPU they are PyTorch's operators, so that the
command is the same there; `of` says which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moue_dist.bench.timing.quiet import no_garbage_collection
from moue_dist.parallel.device import has_cuda, settle

MOST = 40  # rows of the table of kernels
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "aten::item")
EXCHANGES = ("nccl", "gloo:", "c10d::")  # in the names of what moves data between ranks
COPIES = ("Memcpy", "Memset")  # begin the names of what a GPU does besides kernels


class Event(NamedTuple):
    """Something that took from `start` to `end`, `own` of it without what it called; microseconds."""

    name: str
    start: float
    end: float
    own: float
    on_device: bool


def profile_step(step: Callable[[], Any], world: Any) -> dict[str, Any]:
    """A part's `profile`: rank 0 in full, the slowest rank too, the busy times of all. Collective over `world`.

    The slowest is the rank whose device is busy longest without moving data: others wait for it in exchanges. `world`
    is None where one rank plays alone.
    """
    cuda = has_cuda()
    with no_garbage_collection():
        settle()
        if world is not None:
            dist.barrier(group=world)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as recorded:
            step()
            settle()
    mine = summary(_events(recorded), cuda=cuda)
    if world is None:
        return together([mine], cuda=cuda)
    everyone: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(everyone, mine, group=world)
    return together(everyone, cuda=cuda)


def _events(recorded: profile) -> Iterable[Event]:
    for e in recorded.events() or []:
        on_device = e.device_type != DeviceType.CPU
        if on_device and e.is_user_annotation:  # a name over kernels, that are there themselves
            continue
        own = 0.0 if on_device else e.self_cpu_time_total
        yield Event(e.name, e.time_range.start, e.time_range.end, own, on_device)


def summary(events: Iterable[Event], *, cuda: bool) -> dict[str, Any]:
    """A rank's numbers: span, busy times (as unions of intervals), the table by total time, the host's waits; ms."""
    seen = list(events)
    work = [e for e in seen if e.on_device == cuda]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for e in work:
        row = totals[e.name]
        row[0] += 1
        row[1] += e.end - e.start if cuda else e.own  # operators call each other, kernels do not
    waits = {name: [e.end - e.start for e in seen if e.name == name and not e.on_device] for name in WAITS}
    copies = sum(e.name.startswith(COPIES) for e in work)
    return {
        "span_ms": _ms(max((e.end for e in work), default=0) - min((e.start for e in work), default=0)),
        "busy_ms": _ms(union([(e.start, e.end) for e in work])),
        "busy_without_exchange_ms": _ms(union([(e.start, e.end) for e in work if not _is_exchange(e.name)])),
        "kernels": len(work) - copies,
        "copies": copies,
        "waits": {name: {"count": len(times), "ms": _ms(sum(times))} for name, times in waits.items()},
        "table": [
            {"name": name, "count": int(count), "ms": _ms(total)}
            for name, (count, total) in sorted(totals.items(), key=lambda item: -item[1][1])[:MOST]
        ],
    }


def together(ranks: Sequence[dict[str, Any]], *, cuda: bool) -> dict[str, Any]:
    """The entry of all ranks from their summaries, by rank."""
    busy = [rank["busy_without_exchange_ms"] for rank in ranks]
    slowest = busy.index(max(busy))
    return {
        "of": "kernels" if cuda else "CPU operators",
        "slowest": slowest,
        "ranks": [{"rank": rank, **ranks[rank]} for rank in sorted({0, slowest})],
        "busy_ms_by_rank": [rank["busy_ms"] for rank in ranks],
        "busy_without_exchange_ms_by_rank": busy,
    }


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length that intervals cover together. Example: (0, 2), (1, 4), (6, 7) -> 5."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered


def _is_exchange(name: str) -> bool:
    return any(word in name.lower() for word in EXCHANGES)


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 4)
