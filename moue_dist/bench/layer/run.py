"""`moue bench dispatch` and `moue bench layer`: one MoE layer on the ranks of one stage, several ways in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.layer.one import one_layer
from moue_dist.bench.options import BenchOptions, Form
from moue_dist.bench.record.about import describe
from moue_dist.bench.record.file import earlier_runs, write
from moue_dist.bench.record.tables import tell
from moue_dist.bench.timing.contest import Contest, measure
from moue_dist.config import Config
from moue_dist.parallel.device import this_device
from moue_dist.parallel.megatron import cpu_host
from moue_dist.parallel.mesh import Mesh, build_mesh
from moue_dist.refusals.machine import Resolved
from moue_dist.training.run import Place, process_group, resolve_here


@dataclass(frozen=True)
class Here:
    """This rank of the grid. `config` is the whole model's; the layer's own is `one_layer` of it."""

    config: Config
    mesh: Mesh
    rank: int
    resolved: Resolved  # of one layer
    world: Any  # a group of all ranks

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.config.train.timeout_seconds)

    @property
    def tokens(self) -> int:
        """Of a microbatch, on this rank."""
        return self.config.model.sequence_length * self.config.train.micro_batch_size // self.mesh.tensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.config.train.precision == "fp32" else torch.bfloat16


def run(form: Form, config: Config, place: Place, options: BenchOptions) -> int:
    """Measure in this process, one of `place.world_size`; exit code 0 if all ways agree.

    Raises ConfigError for what the user can mend. torch.distributed's variables (MASTER_ADDR ...) are set.
    """
    alone = one_layer(config)
    resolved, _ = resolve_here(alone, place)
    cpu_host.install()
    path = Path(options.output) if options.output else None
    with process_group(config, place):
        from moue_dist.parallel.megatron import adapter as megatron

        leader = place.rank == 0
        earlier = earlier_runs(path, options.append) if path and leader else []
        mesh = build_mesh(place.world_size, alone.parallel)
        megatron.initialise(mesh, config.train.seed, config.train.timeout_seconds / 60)
        world = dist.new_group(timeout=timedelta(seconds=config.train.timeout_seconds))
        here = Here(config, mesh, place.rank, resolved, world)
        record = describe(form, config, options, resolved, place.world_size)
        for name, contest in contests(form, here):
            record["parts"][name] = measure(contest, options.samples, this_device(), world)
            del contest
            if path and leader:
                write(path, [*earlier, record])
        if leader:
            tell(record, options)
        dist.barrier(group=world)
    return int(not all(part["agree"] for part in record["parts"].values()))


def contests(form: Form, here: Here) -> Iterator[tuple[str, Contest]]:
    """What is measured, by name, one after the other. Collective; megatron-core's groups are those of `here.mesh`."""
    if form == "dispatch":
        yield "movement", _movement(here)
    else:
        raise ValueError(form)


def _movement(here: Here) -> Contest:
    from moue_dist.bench.layer.movement import Inputs, movement
    from moue_dist.parallel.groups import build_groups
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.placement.of_config import place_pool
    from moue_dist.parallel.pool.pool import ExpertPool

    config = one_layer(here.config)
    placement = place_pool(config, here.mesh)
    groups = build_groups(here.mesh, here.rank, placement.stage_sets(), here.timeout)
    hidden, device = config.model.hidden_size, this_device()
    # experts as narrow as can be: they only say where rows go
    pool = ExpertPool(placement, here.mesh, here.rank, groups, hidden=hidden, width=1, dtype=here.dtype, device=device)
    inputs = Inputs.draw(
        here.tokens, hidden, config.moe.pool, config.moe.top_k, here.dtype, config.train.seed + here.rank
    )
    return movement(pool, inputs, megatron.expert_group(), here.world, config.moe.headroom)
