"""What a timed training step says: the numbers of a part, and the ratio of two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any

from moue_dist.config import Config
from moue_dist.measuring.metrics import StepMeter
from moue_dist.planning.flops import flops_per_token

PARTS = ("ours", "baseline")
PLACEMENTS = ("replicate", "home", "hybrid")


def numbers(config: Config, world: int, device_name: str, step_ms: list[float], **more: Any) -> dict[str, Any]:
    """A part's entry: rates of the median step, by `config`'s own FLOPs, beside the raw numbers in `more`."""
    meter = StepMeter(
        flops_per_token=flops_per_token(config).total,
        tokens_per_step=config.train.global_batch_size * config.model.sequence_length,
        gpus=world,
        device_name=device_name,
        precision=config.train.precision,
    )
    rates = dataclasses.asdict(meter.rates(median(step_ms) / 1e3))
    rates.pop("step_seconds")
    return {
        "step_ms": median(step_ms),
        "step_ms_all": step_ms,
        **rates,
        "flops_per_token": meter.flops_per_token,
    } | more


def ratio(parts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Ours over the baseline, in tokens/s/GPU (or CPU rank); None unless both were measured."""
    ours, theirs = (parts.get(name, {}).get("tokens_per_s_per_gpu") for name in PARTS)
    return ours / theirs if ours and theirs else None
