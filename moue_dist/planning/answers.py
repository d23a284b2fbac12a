"""What a dry run answers: the whole plan and each of its stages, as data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from moue_dist.config.devices import rank_word
from moue_dist.planning.flops import Flops, Parameters
from moue_dist.planning.pool import PoolPlan


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: its layers (0-based), what they see, and the fullest of its ranks."""

    stage: int
    first_rank: int
    last_rank: int
    chunks: tuple[tuple[int, ...], ...]  # layers of each model chunk
    windows: tuple[str, ...]  # experts that each layer sees, as ranges; '' for a dense layer
    experts: int  # held by the stage: the union of its layers' windows
    shared_experts: int  # of these, also held by another stage
    experts_per_rank: int  # on the rank that holds most
    parameters_per_rank: int  # without the pool
    microbatches_in_flight: int  # of chunks
    memory_bytes: dict[str, int]  # by component, on the rank that holds most
    host_bytes: int  # of host memory, on that rank

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())


@dataclass(frozen=True)
class Plan:
    """A dry run's answers. Bytes are per rank (a GPU, or a CPU process); FLOPs per token, forward and backward."""

    name: str
    grid: dict[str, int]
    derived: dict[str, Any]
    parameters: Parameters
    flops: Flops
    stages: tuple[StagePlan, ...]
    pool: PoolPlan
    device: str
    memory_gib: float
    misfit: str | None  # why it does not fit

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda s: s.total_bytes)

    @property
    def per(self) -> str:
        """What one rank is called: 'GPU', or on a CPU 'rank'."""
        return rank_word(self.derived["device"])

    @property
    def fits(self) -> bool:
        return self.misfit is None

    def as_json(self) -> str:
        """The plan with its totals, as JSON."""
        plain = dataclasses.asdict(self)
        plain["parameters"] |= {"total": self.parameters.total, "dense": self.parameters.dense}
        plain["flops"]["total"] = self.flops.total
        for stage, written in zip(self.stages, plain["stages"], strict=True):
            written["total_bytes"] = stage.total_bytes
        return json.dumps({**plain, "fits": self.fits, "worst_stage": self.worst.stage}, indent=2)
