"""What the counts of bytes have in common: a rank's part of the work, and the sizes of numbers and batches."""

from __future__ import annotations

from dataclasses import dataclass

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh

GIB = 2**30


@dataclass(frozen=True)
class Share:
    """One rank's part of the work: its pipeline stage, the layers of its chunks (0-based), its expert rank."""

    stage: int
    chunks: tuple[tuple[int, ...], ...]
    expert_rank: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk)


def number_bytes(config: Config) -> int:
    """Bytes of a number in the model's type."""
    return 4 if config.train.precision == "fp32" else 2


def tokens_of(config: Config) -> int:
    """Tokens of a microbatch on one data rank."""
    return config.model.sequence_length * config.train.micro_batch_size


def visible_experts(config: Config, mesh: Mesh) -> int:
    """Visible experts of one layer on one expert rank, rounded up."""
    return -(-config.topology().window // mesh.expert)
