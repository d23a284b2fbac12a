"""What a choice of experts must give, once more and in float64: the formulas of docs/math.md, sections 3 and 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.routing.choice import Auxiliary, Choice, Chosen, Rule

RULES = {
    "softmax": Rule("softmax", 2),
    "softmax, scaled": Rule("softmax", 2, scale=2.5),
    "renormalised": Rule("softmax", 2, renormalise=True),
    "of the chosen": Rule("softmax", 2, topk_first=True),
    "of the chosen, renormalised": Rule("softmax", 2, topk_first=True, renormalise=True, scale=0.5),
    "sigmoid": Rule("sigmoid", 2, scale=1.5),
    # what these two ignore
    "sigmoid, renormalised": Rule("sigmoid", 2, renormalise=True, topk_first=True),
    "norm": Rule("norm", 2, renormalise=True, topk_first=True),
}


class Exact(NamedTuple):
    """float64, but for the columns."""

    basis_tw: Tensor  # what is compared, with the bias
    columns_tk: Tensor
    weights_tk: Tensor
    count_w: Tensor
    score_w: Tensor
    z: Tensor
    dlogits_tw: Tensor


def exact(logits_tw: Tensor, choice: Choice, dweights_tk: Tensor, columns_tk: Tensor | None = None) -> Exact:
    """By plain autograd; `columns_tk` are columns to take instead of the best."""
    rule, window_w, bias_p, _, auxiliary, mask_w = choice
    z_tw = (logits_tw.detach().double() + (0 if mask_w is None else mask_w.double())).requires_grad_()
    lse_t = z_tw.exp().sum(1).log()
    p_tw = (z_tw - lse_t[:, None]).exp()
    sigma_tw, unit_tw = 1 / (1 + (-z_tw).exp()), z_tw / (z_tw.square().sum(1, keepdim=True).sqrt() + 1e-6)
    positive_tw = unit_tw.where(unit_tw > 0, 0)
    basis = {"softmax": z_tw if rule.topk_first else p_tw, "sigmoid": sigma_tw, "norm": unit_tw}[rule.kind].detach()
    if bias_p is not None:
        basis = basis + bias_p.double()[window_w]
    if columns_tk is None:
        columns_tk = basis.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k]  # ties: the first
    if rule.kind == "softmax":
        weights, scores = p_tw.gather(1, columns_tk), p_tw
        if rule.renormalise or rule.topk_first:  # exp(z) over its sum, either way
            weights = weights / weights.sum(1, keepdim=True)
    elif rule.kind == "sigmoid":
        weights, scores = sigma_tw.gather(1, columns_tk), sigma_tw / sigma_tw.sum(1, keepdim=True)
        weights = weights / weights.sum(1, keepdim=True)
    else:
        weights, scores = positive_tw.gather(1, columns_tk), positive_tw / (positive_tw.sum(1, keepdim=True) + 1e-6)
    weights = weights * rule.scale
    loss = (weights * dweights_tk.double()).sum()
    tokens = logits_tw.shape[0]
    if auxiliary is not None:
        tokens = auxiliary.tokens
        balance = (auxiliary.weights_p.double()[window_w] * scores.sum(0)).sum() / tokens
        loss = loss + auxiliary.scale * (balance + auxiliary.z * lse_t.square().sum() / tokens)
    (dlogits_tw,) = torch.autograd.grad(loss, z_tw)
    count_w = torch.bincount(columns_tk.flatten(), minlength=window_w.numel()).double()
    z = lse_t.square().sum() / tokens
    return Exact(basis, columns_tk, weights.detach(), count_w, scores.detach().sum(0) / tokens, z.detach(), dlogits_tw)


class Case(NamedTuple):
    """Random logits and everything else that a choice is told."""

    logits_tw: Tensor
    choice: Choice
    dweights_tk: Tensor


def case(
    rule: Rule,
    tokens: int,
    window: int,
    *,
    bias: bool = False,
    loss: bool = True,
    mask: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A window in the middle of a larger pool; the loss counts twice the tokens, as with two tensor-parallel shards.

    `mask` hides about a third of the experts.
    """
    g = torch.Generator().manual_seed(seed + 1000 * window + rule.top_k)
    window_w = (torch.randperm(window + 9, generator=g)[:window].sort().values + 3).to(device)
    weights_p = torch.rand(window + 20, generator=g).to(device)
    bias_p = (0.3 * torch.randn(window + 20, generator=g)).to(device) if bias else None
    logits = (1.5 * torch.randn(tokens, window, generator=g) + 0.5).to(device)
    auxiliary = Auxiliary(weights_p, 0.02, 0.25, 2 * max(tokens, 1)) if loss else None
    dweights = torch.randn(tokens, rule.top_k, generator=g).to(device) / max(tokens, 1)
    mask_w = (-6.0 * (torch.rand(window, generator=g) < 1 / 3)).to(device) if mask else None
    return Case(logits, Choice(rule, window_w, bias_p, None, auxiliary, mask_w), dweights)


def cancelling(tokens: int, window: int, hidden: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, dl) for products whose sums nearly cancel: alike rows, and a gradient that adds up to 0 along both axes.

    One bf16 number in the place of an fp32 one would be off by a part of the result that bf16 itself shows.
    """
    g = torch.Generator().manual_seed(tokens)

    def alike(rows: int) -> Tensor:
        near = 1 + 2**-6 * torch.randint(-1, 2, (rows, hidden), generator=g)
        return (torch.randint(1, 3, (hidden,), generator=g) * near).bfloat16().to(device)

    dl = torch.randn(tokens, window, generator=g, dtype=torch.float64)
    dl = dl - dl.mean(1, keepdim=True)
    return alike(tokens), alike(window), (dl - dl.mean(0)).float().to(device)


def check_products(x_td: Tensor, weight_wd: Tensor, dl_tw: Tensor, dx_td: Tensor, dweight_wd: Tensor) -> None:
    """Asserts that gradients in bf16 are the exact ones, rounded, from an fp32 dl that lost no more than 2**-15."""
    assert dx_td.dtype == dweight_wd.dtype == torch.bfloat16
    for got, a, b in ((dx_td, dl_tw, weight_wd), (dweight_wd, dl_tw.T, x_td)):
        want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        limit = 2**-8 * want.abs() + 2**-15 * size
        assert ((got.double() - want).abs() <= limit).all()
        assert ((a.bfloat16().double() @ b.double() - want).abs() > limit).any(), "one half would do: proves nothing"


def check(found: Chosen, dlogits_tw: Tensor, case: Case, want: Exact) -> None:
    """Asserts that a choice in fp32 is the exact one: the same ids, the rest to rounding."""
    assert found.ids_tk.dtype == torch.int64 and found.weights_tk.dtype == torch.float32
    assert torch.equal(found.ids_tk, case.choice.window_w[want.columns_tk])
    torch.testing.assert_close(found.weights_tk.detach().double(), want.weights_tk, rtol=1e-5, atol=1e-7)
    if case.choice.auxiliary is None:
        assert found.tally is None
    else:
        assert found.tally is not None and all(t.dtype == torch.float64 for t in found.tally)
        assert torch.equal(found.tally.count_w, want.count_w)
        torch.testing.assert_close(found.tally.score_w, want.score_w, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.tally.z, want.z, rtol=1e-5, atol=0)
    largest = want.dlogits_tw.abs().max().item() if want.dlogits_tw.numel() else 0.0
    torch.testing.assert_close(dlogits_tw.double(), want.dlogits_tw, rtol=1e-4, atol=1e-6 * largest)
