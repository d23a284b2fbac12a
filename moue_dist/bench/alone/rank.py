"""`moue bench rank`: one rank of a larger layout, measured alone on the one device here (parallel/rehearsal.py).

It answers, without the other GPUs: does this rank fit, how long is it busy in a step, and how does that change with the
layout? Memory and compute are measured, transfers are modelled, waiting for other ranks is missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moue_dist.bench.options import BenchOptions
from moue_dist.bench.record.about import describe
from moue_dist.bench.record.file import earlier_runs, write
from moue_dist.bench.record.numbers import ratio
from moue_dist.bench.record.tables import tell
from moue_dist.bench.step.parts import guarded
from moue_dist.bench.step.placements import variant
from moue_dist.bench.step.setting import Setting
from moue_dist.config import Config, ConfigError
from moue_dist.parallel.device import this_device
from moue_dist.parallel.megatron import cpu_host
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.rehearsal import Link, rehearse
from moue_dist.training.run import Place, resolve_here


@dataclass(frozen=True)
class Rehearsed:
    """The place that is played: rank `rank` of `world_size`, on this process's first device."""

    rank: int
    world_size: int
    local_rank: int = 0


def run(config: Config, options: BenchOptions) -> int:
    """Measure in this process; exit code 0 if it was. Raises ConfigError for what the user can mend."""
    place = Rehearsed(options.rank, options.world)
    if place.rank >= place.world_size:
        raise ConfigError(f"--rank {place.rank} is none of --world {place.world_size}; ranks count from 0")
    total = options.warmup + options.steps
    config = replace(config, train=replace(config.train, steps=max(config.train.steps, total)))
    resolved, device = resolve_here(variant(config, options.parts[0], place.world_size), place)
    cpu_host.install()
    path = Path(options.output) if options.output else None
    earlier = earlier_runs(path, options.append or options.join) if path else []
    link = Link(options.gbps * 1e9, options.latency_us * 1e-6)
    with rehearse(place.rank, place.world_size, link):
        batches = _random_batches(config, place, total)
        setting = Setting(config, place, resolved, device, options, batches, torch.distributed.group.WORLD)
        mine = describe("rank", config, options, resolved, place.world_size) | {
            "rank": place.rank,
            "link": asdict(link),
        }
        record = earlier.pop() if options.join and earlier else mine
        for name in options.parts:
            record["parts"][name] = guarded(name, setting, None)
            record["ratio"] = ratio(record["parts"])
            if path:
                write(path, [*earlier, record])
        tell(record, options)
    return int(any("error" in part for part in record["parts"].values()))


def _random_batches(config: Config, place: Place, steps: int) -> list[list[dict[str, Tensor]]]:
    """Random tokens: what neighbours send is random, too, so text would teach nothing."""
    b, s, device = config.train.micro_batch_size, config.model.sequence_length, this_device()
    mesh = build_mesh(place.world_size, config.parallel)
    generator = torch.Generator().manual_seed(config.train.seed)

    def batch() -> dict[str, Tensor]:
        tokens = torch.randint(config.model.vocab_size, (b, s + 1), generator=generator).to(device)
        position = torch.arange(s, device=device).expand(b, s)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": position}

    return [[batch() for _ in range(config.train.global_batch_size // (b * mesh.data))] for _ in range(steps)]
