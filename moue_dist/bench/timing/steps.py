"""Times steps that all ranks take together.

Times are the device's, from event to event, so that a step that does not wait for the device is not made to; a step's
time is its slowest rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.timing.quiet import no_garbage_collection
from moue_dist.parallel.device import forget_peak, peak_bytes, settle, this_device
from moue_dist.parallel.recording.timeline import clock_of
from moue_dist.planning.memory.sizes import GIB


def time_steps(step: Callable[[int], Any], warmup: int, steps: int, world: Any) -> dict[str, Any]:
    """Milliseconds of each of `steps` steps after `warmup` others, and peak memory by rank, allocated, GiB.

    `step` gets the number of the step, from 0. Collective over `world`, and the same on all its ranks.
    """
    forget_peak()
    for i in range(warmup):
        step(i)
    clock = clock_of(this_device())
    with no_garbage_collection():
        settle()
        dist.barrier(group=world)
        marks = [clock.mark()]
        for i in range(steps):
            step(warmup + i)
            marks.append(clock.mark())
        settle()
    times = [1e3 * clock.seconds(a, b) for a, b in pairwise(marks)]
    device = this_device()
    mine = torch.tensor([*times, peak_bytes() / GIB], device=device, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))]
    dist.all_gather(everyone, mine, group=world)
    table = torch.stack(everyone).cpu()
    memory = [round(x, 3) for x in table[:, -1].tolist()] if device.type == "cuda" else None
    return {
        "step_ms": [round(x, 4) for x in table[:, :-1].amax(0).tolist()],
        "memory_gib": max(memory) if memory else None,
        "memory_gib_by_rank": memory,
    }
