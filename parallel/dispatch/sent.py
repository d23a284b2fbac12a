"""What a rank has sent for the pool, by how far it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class SentBytes:
    """Bytes that this rank sent to others, by where they went. Counts and routing weights are included."""

    same_stage: int = 0
    other_stage: int = 0

    def add(self, send_bytes: Sequence[int], stage: int, expert_parallel: int) -> None:
        """`send_bytes` to each cell; those of a stage stand side by side."""
        for other, n in enumerate(send_bytes):
            if other // expert_parallel == stage:
                self.same_stage += n
            else:
                self.other_stage += n

    def __add__(self, other: SentBytes) -> SentBytes:
        return SentBytes(self.same_stage + other.same_stage, self.other_stage + other.other_stage)
