"""What the parts of a benchmark share, and how it is written down."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.options import BenchOptions
from moue_dist.bench.step.placements import variant
from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.measuring.provenance import commit, machine, versions
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


def describe(setting: Setting) -> dict[str, Any]:
    """The run's entry of the result, without parts yet."""
    options = asdict(setting.options)
    asked, _ = options.pop("asked"), options.pop("part")
    return {
        "command": asked or shlex.join(["moue", *sys.argv[1:]]),
        "note": options.pop("note"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(setting.resolved.device == "cuda"),
        "versions": versions(),
        "world": setting.place.world_size,
        "options": options,
        "config": asdict(setting.config),
        "resolved": setting.resolved._asdict(),
        "parts": {},
        "ratio": None,
    }
