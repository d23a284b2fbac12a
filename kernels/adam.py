"""One AdamW step over flat tensors, the clip factor and the weight's rounding inside: the reference and its dispatcher.

With the factor outside, a clipped step reads and writes every gradient once more; with the rounding outside, every
master is read once more. The Triton kernel with the same contract stands in `adam_triton.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl


class Hyper(NamedTuple):
    """AdamW's numbers in one step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def corrections(self) -> tuple[float, float]:
        """(lr over the first moment's bias correction, root of the second's)."""
        return self.lr / (1 - self.beta1**self.step), (1 - self.beta2**self.step) ** 0.5


@torch.no_grad()
def adamw_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    hyper: Hyper,
    clip: float = 1.0,
    impl: Impl | None = None,
) -> None:
    """Take the step in place; all flat, of one length, fp32 but for `weight`, which gets the rounded master.

    With g = clip * grad: m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- (1 - lr wd) p - lr / c1 * m /
    (sqrt(v) / sqrt(c2) + eps), c the bias corrections (Loshchilov and Hutter, arXiv 1711.05101; torch.optim.AdamW's
    order). `grad` is not changed. `weight` may be `master` itself.
    """
    if not master.numel():
        return
    rate, root = hyper.corrections
    keep = 1 - hyper.lr * hyper.weight_decay
    if (impl or default_impl(master.device)) == "triton":
        from moue_dist.kernels import adam_triton

        betas = hyper.beta1, hyper.beta2
        adam_triton.adamw_step(master, grad, exp_avg, exp_avg_sq, weight, clip, keep, rate, root, *betas, hyper.eps)
        return
    g = grad if clip == 1.0 else grad * clip
    master.mul_(keep)
    exp_avg.lerp_(g, 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    master.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root).add_(hyper.eps), value=-rate)
    if weight.data_ptr() != master.data_ptr():
        weight.copy_(master)
