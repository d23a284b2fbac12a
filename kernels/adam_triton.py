"""Triton kernel of `adam.py`. Import this file only where Triton is.

16 bytes read and 12 to 14 written a number. Runs in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def adamw_step(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, clip: float, keep: float,
    rate: float, root: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """See `adam.adamw_step`; `keep` is what weight decay leaves of a weight, `rate` and `root` are the corrections."""
    n = master.numel()
    _adamw_step[(triton.cdiv(n, BLOCK),)](
        master, grad, exp_avg, exp_avg_sq, weight, n, clip, keep, rate, 1 / root,
        beta1, beta2, eps, weight.data_ptr() != master.data_ptr(), BLOCK,
    )  # fmt: skip


@triton.jit
def _adamw_step(
    master_ptr, grad_ptr, m_ptr, v_ptr, weight_ptr, n, clip, keep, rate, inverse_root, beta1, beta2, eps,
    APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0.0) * clip
    m = tl.load(m_ptr + i, mask=inside, other=0.0)
    v = tl.load(v_ptr + i, mask=inside, other=0.0)
    p = tl.load(master_ptr + i, mask=inside, other=0.0)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * keep - rate * m / (tl.sqrt(v) * inverse_root + eps)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)
    tl.store(master_ptr + i, p, mask=inside)
    if APART:
        tl.store(weight_ptr + i, p.to(weight_ptr.dtype.element_ty), mask=inside)
