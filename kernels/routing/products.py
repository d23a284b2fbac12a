"""A router's products: logits = x W^T in fp32, and their gradients. Also a router's query, which is one too.

On CUDA, where x and W are bf16, tensor cores multiply: a product of two bf16 numbers is exact in fp32, and sums are
kept in fp32, so the logits differ from those of fp32 arithmetic by the order of additions alone. The gradient dl of the
logits is fp32. It is split into two bf16 numbers, hi + lo, which lose about 2**-17 of it, and dx = dl W and dW = dl^T x
are one GEMM each over both halves. No fp32 copy of x or W is made or kept. Elsewhere everything is plain fp32.

Legend: t token, w column (an expert, or a number of the state), d hidden; `pair_t2w` [T, 2W] bf16 is [hi | lo].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def router_logits(x_td: Tensor, weight_wd: Tensor, tensor_cores: bool | None = None) -> Tensor:
    """x W^T, [T, W] fp32; the gradients have the types of x and W.

    `tensor_cores` None asks `on_tensor_cores`; True needs bf16 and runs on a CPU as well, with the same roundings.
    Example: x = [[1, 2]], W = [[3, 4], [0, 1]] -> [[11, 2]].
    """
    if on_tensor_cores(x_td, weight_wd) if tensor_cores is None else tensor_cores:
        logits_tw: Tensor = _Products.apply(x_td, weight_wd)
        return logits_tw
    return F.linear(x_td.float(), weight_wd.float())


def on_tensor_cores(x_td: Tensor, weight_wd: Tensor) -> bool:
    """Are both bf16, on CUDA?"""
    return x_td.is_cuda and x_td.dtype == weight_wd.dtype == torch.bfloat16


def multiply(x_td: Tensor, weight_wd: Tensor) -> Tensor:
    """x W^T of bf16 numbers with fp32 sums, [T, W] fp32; no autograd."""
    return _mm(x_td, weight_wd.t())


def split(dl_tw: Tensor) -> Tensor:
    """fp32 [T, W] -> [hi | lo], [T, 2W] bf16: hi is dl rounded to bf16, lo what that left over, rounded."""
    hi_tw = dl_tw.bfloat16()
    return torch.cat([hi_tw, (dl_tw - hi_tw).bfloat16()], 1)


def gradients(
    pair_t2w: Tensor, x_td: Tensor, weight_wd: Tensor, needed: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [T, d], dW [W, d]) in bf16 from the split gradient of the logits; None for what is not `needed`.

    dx is one sum over 2W products in fp32. dW is two over T, hi's and lo's, which are added before it is rounded.
    """
    dx_td = dweight_wd = None
    if needed[0]:
        dx_td = torch.mm(pair_t2w, torch.cat([weight_wd, weight_wd]))
    if needed[1]:
        halves_2wd = _mm(pair_t2w.t(), x_td)
        dweight_wd = torch.empty_like(weight_wd)
        torch.add(*halves_2wd.chunk(2), out=dweight_wd)
    return dx_td, dweight_wd


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # PyTorch's CPU has no such product; these are the same numbers


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, weight_wd: Tensor) -> Tensor:
        ctx.save_for_backward(x_td, weight_wd)
        return multiply(x_td, weight_wd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dl_tw: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_td, weight_wd = ctx.saved_tensors
        return gradients(split(dl_tw), x_td, weight_wd, ctx.needs_input_grad)
