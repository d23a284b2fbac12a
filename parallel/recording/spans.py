"""What a recorded span is, for those who record it and for those who draw it; without torch.

A run's recorded steps stand in `timeline.json` in the run folder, one JSON object per line:

    {"step": 5, "pipeline": 2, "virtual": 1, "microbatches": 8, "schedule": "1F1B", "lag": 0,
     "ranks": [{"rank": 0, "stage": 0, "spans": [["forward", 0.0011, 0.0102, 0, null], ...]}, ...]}

A span is [kind, start, end, microbatch, layer] in seconds since the step's zero, which all ranks have in common.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

FILE = "timeline.json"
Kind = Literal["forward", "backward", "serve", "transfer", "optimizer"]
KINDS: tuple[str, ...] = get_args(Kind)


class Span(NamedTuple):
    """Seconds since the step's common zero. `microbatch` 0-based, `layer` 1-based and global, None where unknown.

    forward, backward: a microbatch passes this rank's layers. serve: experts of this rank compute for other stages.
    transfer: an all-to-all or a send and receive, with the wait for the other side. optimizer: all after the schedule.
    """

    kind: str
    start: float
    end: float
    microbatch: int | None = None
    layer: int | None = None
