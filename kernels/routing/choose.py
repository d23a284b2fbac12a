"""Choosing a token's experts from its logits: the plain-PyTorch reference and its dispatcher. docs/math.md, 3 and 4.

A choice gives expert ids and routing weights, and, where a loss hangs on it, what the balance needs to know: counts and
mean scores by column, and the mean square of the log-sum-exp. The auxiliary loss is hung on the weights: its gradient
joins theirs, so one backward serves both. The Triton kernels with the same contract stand in `choose_triton.py`, their
autograd in `fused.py`; no table [T, W] but the logits leaves them, and none is kept.

Of experts with equal scores the kernel takes those of the lowest columns; torch.topk promises no order.

Legend: t token, w column of the window, p expert of the pool, k choice of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl, default_impl
from moue_dist.kernels.routing.choice import Choice, Chosen, Rule, Tally
from moue_dist.kernels.routing.products import on_tensor_cores, router_logits
from moue_dist.kernels.rows.permute import histogram


def route(x_td: Tensor, weight_wd: Tensor, choice: Choice, impl: Impl | None = None) -> Chosen:
    """`choose` from the logits x W^T; one node in the graph where tensor cores multiply and the kernels run."""
    impl = impl or default_impl(x_td.device)
    if impl == "triton" and on_tensor_cores(x_td, weight_wd):
        from moue_dist.kernels.routing import fused

        return fused.route(x_td, weight_wd, choice)
    return choose(router_logits(x_td, weight_wd), choice, impl)


def choose(logits_tw: Tensor, choice: Choice, impl: Impl | None = None) -> Chosen:
    """Each token's `top_k` experts of the window and their weights, differentiable in the logits.

    `impl` None picks by device (`backend.default_impl`).
    Example: logits [[0, ln 3, 0, ln 4]], softmax, top 2, window [2, 5, 7, 9] -> ids [[9, 5]], weights [[4/9, 3/9]].
    """
    if (impl or default_impl(logits_tw.device)) == "triton":
        from moue_dist.kernels.routing import fused

        return fused.choose(logits_tw, choice)
    rule, window_w, bias_p, chosen_tk, auxiliary, mask_w = choice
    if mask_w is not None:
        logits_tw = logits_tw + mask_w
    bias_w = None if bias_p is None else bias_p[window_w]
    given = None if chosen_tk is None else torch.searchsorted(window_w, chosen_tk)
    weigh = {"softmax": _softmax, "sigmoid": _sigmoid, "norm": _norm}[rule.kind]
    columns_tk, weights_tk, scores_tw = weigh(logits_tw, rule, bias_w, given)
    if rule.scale != 1.0:
        weights_tk = weights_tk * rule.scale
    ids_tk = window_w[columns_tk]
    if auxiliary is None:
        return Chosen(ids_tk, weights_tk, None)
    score_w = scores_tw.sum(0) / auxiliary.tokens
    loss = (auxiliary.weights_p[window_w] * score_w).sum()
    z = logits_tw.logsumexp(-1).square().sum() / auxiliary.tokens
    if auxiliary.z:
        loss = loss + auxiliary.z * z
    count_w = histogram(columns_tk.flatten(), window_w.numel())
    tally = Tally(count_w.double(), score_w.detach().double(), z.detach().double())
    return Chosen(ids_tk, _AttachLoss.apply(weights_tk, loss, auxiliary.scale), tally)


def _softmax(logits: Tensor, rule: Rule, bias_w: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(columns [T, k], weights [T, k], scores [T, W] that sum to 1 over the window), as the two below."""
    scores = logits.softmax(-1)
    columns = _columns(logits if rule.topk_first else scores, rule, bias_w, given)
    weights = logits.gather(1, columns).softmax(-1) if rule.topk_first else scores.gather(1, columns)
    if rule.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return columns, weights, scores


def _sigmoid(logits: Tensor, rule: Rule, bias_w: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    raw = logits.sigmoid()
    columns = _columns(raw, rule, bias_w, given)
    weights = raw.gather(1, columns)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return columns, weights, raw / raw.sum(-1, keepdim=True)


def _norm(logits: Tensor, rule: Rule, bias_w: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    unit = logits / (logits.norm(dim=-1, keepdim=True) + 1e-6)
    columns = _columns(unit, rule, bias_w, given)
    positive = unit.relu()
    return columns, positive.gather(1, columns), positive / (positive.sum(-1, keepdim=True) + 1e-6)


def _columns(basis_tw: Tensor, rule: Rule, bias_w: Tensor | None, given: Tensor | None) -> Tensor:
    """Columns of the top k by basis plus bias, of a random draw, or those that are given."""
    if given is not None:
        return given
    basis_tw = basis_tw.detach()
    if rule.random:
        basis_tw = torch.rand_like(basis_tw)
    elif bias_w is not None:
        basis_tw = basis_tw + bias_w
    return basis_tw.topk(rule.top_k, dim=-1).indices


class _AttachLoss(torch.autograd.Function):
    """Identity on x; the loss gets the gradient `scale` when x's gradient arrives, so no second backward is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
