"""What the parts of a benchmark of steps share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.options import BenchOptions
from moue_dist.bench.step.placements import variant
from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.parallel.rehearsal import BACKEND
from moue_dist.refusals.machine import Resolved
from moue_dist.training.run import Place, resolve_here


@dataclass(frozen=True)
class Setting:
    """What both parts share: the configuration on this rank's place of the grid, and its batches by step."""

    config: Config
    place: Place
    resolved: Resolved
    device: Device | None
    options: BenchOptions
    batches: list[list[dict[str, torch.Tensor]]]
    world: Any  # a group of all ranks

    @property
    def rehearsed(self) -> bool:
        """One rank is played alone; the others are echoes of it (bench/alone/echoes.py)."""
        return dist.get_backend(self.world) == BACKEND

    @property
    def device_name(self) -> str:
        return self.device.name if self.device else "CPU"


def of_part(setting: Setting, name: str) -> Setting:
    """The setting of a part: under its placement, where the part is named after one. Raises ConfigError."""
    config = variant(setting.config, name, setting.place.world_size)
    if config is setting.config:
        return setting
    return replace(setting, config=config, resolved=resolve_here(config, setting.place)[0])
