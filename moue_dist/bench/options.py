"""The options of `moue bench`; free of torch, since the command line reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Form = Literal["step", "rank", "kernels", "dispatch", "layer"]  # what is measured: moue bench FORM


@dataclass(frozen=True)
class BenchOptions:
    """What to measure and where to write it. `grads` is the type of the baseline's gradient buffers."""

    steps: int = 6
    warmup: int = 3
    baseline: bool = False
    baseline_only: bool = False
    baseline_grads: Literal["bf16", "fp32"] = "bf16"  # bf16 is the faster; ours are always fp32
    output: str | None = None
    append: bool = False
    join: bool = False  # add the part to the file's last run instead of starting another
    note: str | None = None
    profile: bool = False  # one more step under the profiler
    placements: str | None = None  # such as "replicate,home": our step under each, in place of the baseline
    part: str | None = None  # measure this part alone, of those that the other options ask for
    asked: str | None = None  # the command that asked for all of them
    samples: int = 20  # kernels, dispatch, layer: of each way
    # bench rank: who is played, and the link to the others
    world: int = 1
    rank: int = 0
    gbps: float = 278.0  # gigabytes a second out of a GPU
    latency_us: float = 70.0

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured, in order: `ours`, `baseline`, or placements by name."""
        if self.part:
            return (self.part,)
        if self.placements:
            return tuple(name.strip() for name in self.placements.split(","))
        if self.baseline_only:
            return ("baseline",)
        return ("baseline", "ours") if self.baseline else ("ours",)

    def as_words(self) -> list[str]:
        """The same as a command line has them: ["--steps=6", "--baseline", ...]."""
        words = []
        for field in fields(self):
            value, name = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value is True:
                words.append(name)
            elif value is not None and value is not False:
                words.append(f"{name}={value}")
        return words
