"""What the other ranks of a rehearsal ask of the one that is played (parallel/rehearsal.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # megatron-core, which a CPU host prepares for first
    from moue_dist.model.system import System
    from moue_dist.parallel.lockstep.exchange import LockstepExchange


def answer_for_others(system: System) -> None:
    """Where experts live at home, let the cells of all stages ask this one for what balanced routing asks on average.

    An echo of this rank's own counts would not do: the stages see other windows, and idle ones send nothing.
    """
    if system.dense.lockstep is not None:
        exchange = system.dense.lockstep.exchange
        group = exchange.wire.groups["forward"]
        group.answer = _expected_counts(system, exchange)


def _expected_counts(system: System, exchange: LockstepExchange) -> Callable[[Tensor], None]:
    config, p, topology = system.config, exchange.placement, system.context.topology
    clock, width = exchange.clock, exchange.owner.width
    tokens = config.model.sequence_length * config.train.micro_batch_size // system.mesh.tensor
    first = [sum(clock.layers[:stage]) for stage in range(p.pipeline)]
    mine = p.rows(clock.stage, exchange.ep_rank)

    def asked(stage: int, j: int) -> list[int]:
        """Rows for each expert here, from one source of `stage` in its layer j."""
        window = set(topology.windows[first[stage] + j])
        here = [e in window and p.server(e, stage) == clock.stage for e in mine]
        total, shares, given = tokens * config.moe.top_k / len(window), [], 0
        for i in range(1, sum(here) + 1):  # rounded so that the sum is right
            shares.append(int(total * i) - given)
            given = int(total * i)
        counts = iter(shares)
        return [next(counts) if yes else 0 for yes in here] + [0] * (width - len(mine))

    table = {
        (stage, j): torch.tensor(asked(stage, j), dtype=torch.int64, device=system.device)
        for stage in range(p.pipeline)
        for j in range(clock.layers[stage])
    }
    nothing = torch.zeros(width, dtype=torch.int64, device=system.device)

    def answer(out: Tensor) -> None:
        j = max(clock.layers) - len(clock.due["forward"]) - 1  # the round that was just entered
        others = [cell for cell in range(exchange.cells) if cell != exchange.owner.cell]
        for row, cell in zip(out, others, strict=True):
            stage = cell // p.expert_parallel
            busy = clock.schedule.microbatch("forward", clock.slot, stage) is not None
            row.copy_(table[stage, j] if busy and j < clock.layers[stage] else nothing)

    return answer
