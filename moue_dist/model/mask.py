"""The routers' mask: what is added to the logits of experts that a converted model hides from a layer at first.

A model of private experts becomes a pool by showing each layer the experts of others too. Hidden at first, they change
nothing; as the mask goes to 0 in a line, the layers come to use them. It is no parameter, and works on the choice, the
weights and the balance alike. Legend: L MoE layers, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moue_dist.config import MoEConfig
from moue_dist.config.topology import Topology


class RouterMask:
    """`hidden_lw` fp32 [L, W] is 1 where an expert is hidden from a layer, 0 where it is not."""

    def __init__(self, moe: MoEConfig, topology: Topology, device: torch.device) -> None:
        self._start, self._steps = moe.mask_start, moe.mask_steps
        self.hidden_lw = torch.zeros(topology.layers, topology.window, device=device)
        self._now_lw: Tensor | None = None

    def hide(self, hidden_lw: Tensor, step: int) -> None:
        """Take over what is hidden, and the mask of a step. Raises ValueError on a wrong shape."""
        if hidden_lw.shape != self.hidden_lw.shape:
            raise ValueError(f"mask of shape {tuple(hidden_lw.shape)}, expected {tuple(self.hidden_lw.shape)}")
        self.hidden_lw.copy_(hidden_lw)
        self.at_step(step)

    def at_step(self, step: int) -> None:
        """The mask of a step, 0-based."""
        value = mask_value(self._start, self._steps, step)
        self._now_lw = self.hidden_lw * value if value else None

    def of(self, layer: int) -> Tensor | None:
        """What to add to a MoE layer's logits, fp32 [W]; None where that is nothing."""
        return None if self._now_lw is None else self._now_lw[layer]


def mask_value(start: float, steps: int, step: int) -> float:
    """-16 over 4 steps -> -16, -12, -8, -4, 0, 0 ..."""
    return start * (1 - step / steps) if step < steps else 0.0
