"""AdamW over a rank's shares of one buffer: what it must offer, and the one on the device.

`host_adam.HostAdam` is the other one. Shares are flat views of the model's weights, one a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moue_dist.kernels.adam import Hyper, adamw_step
from moue_dist.parallel.pool.host_adam import Pending


class ShareAdam(Protocol):
    """AdamW over this rank's shares of one buffer, wherever its state lives."""

    masters: list[Tensor]

    def states(self) -> dict[str, list[Tensor]]: ...
    def set_steps(self, step: int) -> None: ...
    def adopt(self) -> None:
        """Weights -> masters."""

    def publish(self) -> None:
        """Masters -> weights of this rank's shares."""

    def step(self, grads: Sequence[Tensor], lr: float, clip: float = 1.0) -> Pending | None:
        """One step from `clip` times the gradients, and `publish`; the handle of what is still under way, if any."""


class DeviceAdam:
    """AdamW on `weights`, flat views: fp32 masters, which fp32 weights are themselves, and fp32 moments beside them."""

    def __init__(
        self, weights: Sequence[Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.weights = list(weights)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.masters = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        # Made here, not at the first step, so that memory is known and checkpoints can load.
        self._moments = {n: [torch.zeros_like(m) for m in self.masters] for n in ("exp_avg", "exp_avg_sq")}
        self._steps = 0

    def states(self) -> dict[str, list[Tensor]]:
        return {"weight": list(self.masters), **self._moments}

    def set_steps(self, step: int) -> None:
        self._steps = step

    def adopt(self) -> None:
        self._copy(self.masters, self.weights)

    def publish(self) -> None:
        self._copy(self.weights, self.masters)

    def step(self, grads: Sequence[Tensor], lr: float, clip: float = 1.0) -> None:
        self._steps += 1
        hyper = Hyper(lr, *self.betas, self.eps, self.weight_decay, self._steps)
        firsts, seconds = self._moments.values()
        for p, g, m, v, w in zip(self.masters, grads, firsts, seconds, self.weights, strict=True):
            adamw_step(p, g, m, v, w, hyper, clip)

    @staticmethod
    def _copy(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
        for t, o in zip(to, of, strict=True):
            if t.data_ptr() != o.data_ptr():
                t.copy_(o)
