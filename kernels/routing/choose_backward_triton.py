"""The backward kernel of `choose_triton.py`. Import this file only where Triton is.

Scores are computed again from the logits and each token's log-sum-exp. The gradients of the weights, of the balance
terms and of the z-loss become the logits' gradient in one pass, in fp32 or split into two bf16 as tensor cores want it
(`products.py`): both are four bytes a logit, and splitting later would read and write them once more.

Legend: t token, w column of the window, k choice of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.routing.choice import Rule
from moue_dist.kernels.routing.choose_triton import tile


def choose_backward(
    dweights_tk: Tensor,
    logits_tw: Tensor,
    columns_tk: Tensor,
    lse_t: Tensor,
    auxiliary_w: Tensor | None,
    squares: float,
    rule: Rule,
    pair: bool,
) -> Tensor:
    """The logits' gradient: fp32 [T, W], or with `pair` bf16 [T, 2W], rounded and what rounding left over.

    `squares` is the gradient of the loss with respect to a token's logsumexp ** 2.
    """
    tokens, w = logits_tw.shape
    rows, columns, warps = tile(w)
    softmax = rule.kind == "softmax"
    shape, dtype = ((tokens, 2 * w), torch.bfloat16) if pair else ((tokens, w), torch.float32)
    dl = torch.empty(shape, dtype=dtype, device=logits_tw.device)
    if tokens:
        _choose_backward[(triton.cdiv(tokens, rows),)](
            dweights_tk, logits_tw, columns_tk, lse_t, logits_tw if auxiliary_w is None else auxiliary_w, dl,
            tokens, 2.0 * squares, rule.scale, w, rule.top_k, rule.kind, rule.topk_first and softmax,
            rule.renormalise and softmax, auxiliary_w is not None, pair, rows, columns, num_warps=warps,
        )  # fmt: skip
    return dl


@triton.jit
def _choose_backward(
    dweights_ptr, logits_ptr, chosen_ptr, lse_ptr, auxiliary_ptr, dl_ptr, tokens, squares, scale,
    W: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, TOPK_FIRST: tl.constexpr, RENORMALISE: tl.constexpr,
    AUXILIARY: tl.constexpr, PAIR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_W)
    ok, seen = t < tokens, c < W
    inside = ok[:, None] & seen[None, :]
    z = tl.load(logits_ptr + t[:, None] * W + c[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + t, mask=ok, other=0.0)
    p = tl.where(inside, tl.exp(z - lse[:, None]), 0.0)
    if KIND == "norm":
        length = tl.sqrt(tl.sum(z * z, 1))
        inverse = 1.0 / (length + 1e-6)
    # The chosen: v before normalisation, dv its gradient, of the logit itself where the softmax is over the chosen.
    shift = lse
    if TOPK_FIRST:
        shift = tl.full([BLOCK_T], float("-inf"), tl.float32)
        for r in tl.static_range(K):
            at = tl.load(chosen_ptr + t * K + r, mask=ok, other=0)
            shift = tl.maximum(shift, tl.load(logits_ptr + t * W + at, mask=ok, other=0.0))
    total = tl.full([BLOCK_T], 1e-20 if KIND == "sigmoid" else 0.0, tl.float32)
    dot = tl.zeros([BLOCK_T], dtype=tl.float32)
    if TOPK_FIRST or RENORMALISE or KIND == "sigmoid":
        for r in tl.static_range(K):
            at = tl.load(chosen_ptr + t * K + r, mask=ok, other=0)
            zr = tl.load(logits_ptr + t * W + at, mask=ok, other=0.0)
            v = tl.sigmoid(zr) if KIND == "sigmoid" else tl.exp(zr - shift)
            total += v
            dot += v * tl.load(dweights_ptr + t * K + r, mask=ok, other=0.0) * scale
        dot /= total
    dv = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
    for r in tl.static_range(K):
        at = tl.load(chosen_ptr + t * K + r, mask=ok, other=0)
        dr = tl.load(dweights_ptr + t * K + r, mask=ok, other=0.0) * scale
        if TOPK_FIRST or RENORMALISE or KIND == "sigmoid":
            dr = (dr - dot) / total
        if TOPK_FIRST:
            dr *= tl.exp(tl.load(logits_ptr + t * W + at, mask=ok, other=0.0) - shift)
        dv = tl.where(c[None, :] == at[:, None], dr[:, None], dv)  # no column is chosen twice
    if AUXILIARY:
        a = tl.load(auxiliary_ptr + c, mask=seen, other=0.0)[None, :]
        dl = p * (squares * lse)[:, None]
    else:
        a = tl.zeros([1, BLOCK_W], dtype=tl.float32)
        dl = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
    if KIND == "softmax":
        ds = a + dv if not TOPK_FIRST else a
        dl += p * (ds - tl.sum(p * ds, 1)[:, None])
        if TOPK_FIRST:
            dl += dv
    elif KIND == "sigmoid":
        s = tl.where(inside, tl.sigmoid(z), 0.0)
        whole = tl.where(ok, tl.sum(s, 1), 1.0)
        ds = (a - (tl.sum(s * a, 1) / whole)[:, None]) / whole[:, None] + dv
        dl += ds * s * (1.0 - s)
    else:
        s = tl.maximum(z, 0.0) * inverse[:, None]
        whole = tl.sum(s, 1) + 1e-6
        ds = (a - (tl.sum(s * a, 1) / whole)[:, None]) / whole[:, None] + dv
        du = tl.where(z > 0.0, ds, 0.0)
        # of z / (|z| + eps); a row of zeros has no direction
        along = tl.where(length > 0.0, tl.sum(du * z, 1) * inverse * inverse / length, 0.0)
        dl += du * inverse[:, None] - z * along[:, None]
    if PAIR:
        high = dl.to(tl.bfloat16)
        to = t[:, None] * (2 * W) + c[None, :]
        tl.store(dl_ptr + to, high, mask=inside)
        tl.store(dl_ptr + to + W, (dl - high.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(dl_ptr + t[:, None] * W + c[None, :], dl, mask=inside)
