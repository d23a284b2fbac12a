"""`moue bench step`: our training step, and megatron-core's own beside it, timed in one run on the same batches.

Each part builds its model, takes `warmup` steps and `steps` timed ones, and gives back all that it held before the next
part begins, the baseline first (bench/step/parts.py).
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.options import BenchOptions
from moue_dist.bench.record.about import describe
from moue_dist.bench.record.file import earlier_runs, write
from moue_dist.bench.record.numbers import ratio
from moue_dist.bench.record.tables import tell
from moue_dist.bench.step.parts import guarded
from moue_dist.bench.step.placements import variant
from moue_dist.bench.step.setting import Setting
from moue_dist.config import Config
from moue_dist.parallel.device import this_device
from moue_dist.parallel.megatron import cpu_host
from moue_dist.parallel.mesh import build_mesh
from moue_dist.training.run import Place, process_group, resolve_here

STRAGGLER_SECONDS = 120.0  # how long a rank waits for the others to say how a part ended


def run(config: Config, place: Place, options: BenchOptions) -> int:
    """Measure in this process, one of `place.world_size`; exit code 0 if every part was measured.

    Raises ConfigError for what the user can mend. torch.distributed's variables (MASTER_ADDR ...) are set.
    """
    total = options.warmup + options.steps
    config = replace(config, train=replace(config.train, steps=max(config.train.steps, total)))
    resolved, device = resolve_here(variant(config, options.parts[0], place.world_size), place)
    cpu_host.install()
    if "baseline" in options.parts:
        from moue_dist.bench.baseline.model import plain_form

        plain_form(config)  # refuses here, once for both parts
    path = Path(options.output) if options.output else None
    with process_group(config, place):
        leader = place.rank == 0
        earlier = earlier_runs(path, options.append or options.join) if path and leader else []
        world = dist.new_group(timeout=timedelta(seconds=config.train.timeout_seconds))
        answers = dist.new_group(backend="gloo", timeout=timedelta(seconds=STRAGGLER_SECONDS))
        batches = _read_batches(config, place, total, world)
        setting = Setting(config, place, resolved, device, options, batches, world)
        record = (
            earlier.pop() if options.join and earlier else describe("step", config, options, resolved, place.world_size)
        )
        for name in options.parts:
            record["parts"][name] = guarded(name, setting, answers)
            record["ratio"] = ratio(record["parts"])
            if path and leader:
                write(path, [*earlier, record])
        if leader:
            tell(record, options)
        dist.barrier(group=world)
    return int(any("error" in part for part in record["parts"].values()))


def _read_batches(config: Config, place: Place, steps: int, world: Any) -> list[list[dict[str, torch.Tensor]]]:
    """The first steps' microbatches of this data rank, as training reads them, all on the device."""
    from moue_dist.data.batches import Batches
    from moue_dist.data.corpus import data_folder, prepare_corpus
    from moue_dist.data.datasets import build_datasets

    mesh = build_mesh(place.world_size, config.parallel)
    folder = data_folder(config, Path(config.output).expanduser() / "bench")
    if place.rank == 0 and not config.data.blend:
        prepare_corpus(config.data, folder)
    dist.barrier(group=world)
    train, _ = build_datasets(config, folder, steps * config.train.global_batch_size, 0)
    batches = Batches(train, None, config, this_device())
    read = [batches.microbatches(i, mesh.coords(place.rank).dp, mesh.data) for i in range(steps)]
    batches.close()
    return read
