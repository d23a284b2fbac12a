"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from moue_dist.config import OptimizerConfig


def learning_rate(o: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of 0-based step `step` of `steps`: linear warm-up, then the schedule down to `min_lr`.

    cosine: half a cosine over what remains. wsd (warm-up, stable, decay; MiniCPM, arXiv 2404.06395): constant, then
    linear over the last `decay_steps` (0: a tenth of the run). power (Power Scheduler, arXiv 2408.13359, without its
    batch-size terms): lr * ((step + 1) / max(warmup, 1)) ** -power, never below min_lr.
    """
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "power":
        return max(o.min_lr, o.lr * ((step + 1) / max(o.warmup_steps, 1)) ** -o.power)
    if o.schedule == "wsd":
        length = min(o.decay_steps or max(1, steps // 10), max(steps - o.warmup_steps, 1))
        done = max(0.0, (step + 1 - (steps - length)) / length)
        return o.min_lr + (o.lr - o.min_lr) * (1.0 - min(done, 1.0))
    done = min(1.0, (step - o.warmup_steps) / max(1, steps - o.warmup_steps))
    return o.min_lr + (o.lr - o.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
