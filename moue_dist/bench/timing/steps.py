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
from moue_dist.parallel.megatron import cpu_host
from moue_dist.planning.memory.sizes import GIB


def time_steps(step: Callable[[int], Any], warmup: int, steps: int, world: Any) -> dict[str, Any]:
    """Milliseconds of each of `steps` steps after `warmup` others, and peak memory by rank, allocated, GiB.

    `step` gets the number of the step, from 0. Collective over `world`, and the same on all its ranks.
    """
    torch.cuda.reset_peak_memory_stats()
    for i in range(warmup):
        step(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    with no_garbage_collection():
        torch.cuda.synchronize()
        dist.barrier(group=world)
        marks[0].record()
        for i in range(steps):
            step(warmup + i)
            marks[i + 1].record()
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    device = cpu_host.device()
    mine = torch.tensor([*times, torch.cuda.max_memory_allocated() / GIB], device=device, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))]
    dist.all_gather(everyone, mine, group=world)
    table = torch.stack(everyone).cpu()
    memory = [round(x, 3) for x in table[:, -1].tolist()] if device.type == "cuda" else None
    return {
        "step_ms": [round(x, 4) for x in table[:, :-1].amax(0).tolist()],
        "memory_gib": max(memory) if memory else None,
        "memory_gib_by_rank": memory,
    }
