"""After which steps of a run something is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Every:
    """Every `steps` finished steps (0: never), and what holds for the last step of the run.

    `last`: "as any" step, "always", also where the interval does not fall on it, or "never", also where it does.
    """

    steps: int
    last: Literal["as any", "always", "never"] = "as any"

    def due(self, finished: int, total: int) -> bool:
        """Whether it is due after `finished` steps, from 1, of a run of `total`."""
        if finished == total and self.last != "as any":
            return self.last == "always"
        return self.steps > 0 and finished % self.steps == 0
