"""AdamW over a rank's shares of one buffer: what it must offer, and PyTorch's on the device.

`host_adam.HostAdam` is the other one. Shares are flat views of the model's weights, one a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

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

    def step(self, grads: Sequence[Tensor], lr: float) -> Pending | None:
        """One step and `publish`; the handle of what is still under way, if anything is."""


class DeviceAdam:
    """PyTorch's AdamW on `weights`, flat views: fp32 masters, which fp32 weights are themselves, and moments beside."""

    def __init__(
        self, weights: Sequence[Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.weights = list(weights)
        self.masters = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        self._flat = [torch.nn.Parameter(m, requires_grad=False) for m in self.masters]
        fused = bool(self._flat) and self._flat[0].is_cuda  # unfused AdamW needs temporaries as large as the pool
        parameters = self._flat or [torch.nn.Parameter(torch.zeros(0))]  # AdamW refuses an empty list
        self._adam = torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        for p in self._flat:  # created here, not at the first step, so that memory is known and checkpoints can load
            self._adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def states(self) -> dict[str, list[Tensor]]:
        moments = {n: [self._adam.state[p][n] for p in self._flat] for n in ("exp_avg", "exp_avg_sq")}
        return {"weight": [p.data for p in self._flat], **moments}

    def set_steps(self, step: int) -> None:
        for p in self._flat:
            self._adam.state[p]["step"].fill_(step)

    def adopt(self) -> None:
        self._copy(self.masters, self.weights)

    def publish(self) -> None:
        self._copy(self.weights, self.masters)

    def step(self, grads: Sequence[Tensor], lr: float) -> None:
        for p, g in zip(self._flat, grads, strict=True):
            p.grad = g
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for p in self._flat:
            p.grad = None
        self.publish()

    @staticmethod
    def _copy(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
        for t, o in zip(to, of, strict=True):
            if t.data_ptr() != o.data_ptr():
                t.copy_(o)
