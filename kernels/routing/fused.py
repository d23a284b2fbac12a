"""Autograd of the routing kernels: one node from logits, or from x and the router's weight, to ids, weights and tally.

For backward are kept: the logits, the chosen columns, each token's log-sum-exp, and of a whole router x and its weight,
which others keep anyway. Import this file only where Triton is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moue_dist.kernels.routing import choose_backward_triton, choose_triton
from moue_dist.kernels.routing.choice import Choice, Chosen, Tally
from moue_dist.kernels.routing.products import gradients, multiply


def choose(logits_tw: Tensor, choice: Choice) -> Chosen:
    """See `choose.choose`; fp32 logits."""
    if logits_tw.dtype != torch.float32:
        raise ValueError(f"the routing kernels take fp32 logits, got {logits_tw.dtype}; pass impl='torch'")
    return _chosen(*_Choose.apply(logits_tw, choice))


def route(x_td: Tensor, weight_wd: Tensor, choice: Choice) -> Chosen:
    """See `choose.route`; bf16 x and weight."""
    return _chosen(*_Route.apply(x_td, weight_wd, choice))


def _chosen(ids_tk: Tensor, weights_tk: Tensor, tally: Tensor | None) -> Chosen:
    if tally is None:
        return Chosen(ids_tk, weights_tk, None)
    w = tally.numel() // 2
    count_w, score_w, z = tally.split([w, w, 1])
    return Chosen(ids_tk, weights_tk, Tally(count_w, score_w, z[0]))


def _forward(ctx: Any, logits_tw: Tensor, choice: Choice, *kept: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if choice.mask_w is not None:
        logits_tw = logits_tw + choice.mask_w  # kept in the place of those without: the gradient is the same
    logits_tw = logits_tw.contiguous()
    found = choose_triton.choose(logits_tw, choice)
    a = choice.auxiliary
    ctx.rule, ctx.squares = choice.rule, 0.0 if a is None else a.z * a.scale / a.tokens
    ctx.save_for_backward(logits_tw, found.columns_tk, found.lse_t, found.auxiliary_w, *kept)
    ctx.mark_non_differentiable(*(t for t in (found.ids_tk, found.tally) if t is not None))
    ctx.set_materialize_grads(False)
    return found.ids_tk, found.weights_tk, found.tally


def _backward(ctx: Any, dweights_tk: Tensor | None, pair: bool) -> Tensor:
    logits_tw, columns_tk, lse_t, auxiliary_w, *_ = ctx.saved_tensors
    if dweights_tk is None:
        dweights_tk = torch.zeros(columns_tk.shape, device=columns_tk.device)
    return choose_backward_triton.choose_backward(
        dweights_tk.float().contiguous(), logits_tw, columns_tk, lse_t, auxiliary_w, ctx.squares, ctx.rule, pair
    )


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_tw: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor | None]:
        return _forward(ctx, logits_tw, choice)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ids: None, dweights_tk: Tensor | None, _tally: None) -> tuple[Tensor, None]:
        return _backward(ctx, dweights_tk, pair=False), None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, weight_wd: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor | None]:
        return _forward(ctx, multiply(x_td, weight_wd), choice, x_td, weight_wd)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _ids: None, dweights_tk: Tensor | None, _tally: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        pair_t2w, (x_td, weight_wd) = _backward(ctx, dweights_tk, pair=True), ctx.saved_tensors[-2:]
        return *gradients(pair_t2w, x_td, weight_wd, ctx.needs_input_grad[:2]), None
