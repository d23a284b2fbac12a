"""Triton kernels of `choose.py`, where the contract and the reference stand. Import this file only where Triton is.

A warp has whole rows of logits in registers, so that no reduction leaves it, and goes over them once: softmax, the top
k by k rounds of a maximum, the weights, and sums for the balance. Sums over tokens are deterministic: each program adds
up its own rows, and a second kernel adds the programs' sums in fp64, in one order; counts are integers. Backward stands
in `choose_backward_triton.py`.

Scores are compared as integers of the same order: one instruction reduces integers over a warp, and a column that is
taken or padding has a value of its own. NaN is the largest, as for torch.topk. Runs in Triton's interpreter
(TRITON_INTERPRET=1) on CPU tensors.

Legend: t token, w column of the window, k choice of a token, n program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moue_dist.kernels.routing.choice import Choice

TILE = 1024  # logits that a warp has in registers: 32 a thread
COPIES: tl.constexpr = tl.constexpr(64)  # of the counts, so that few programs add to one number at a time
PROGRAMS = 2048  # of the forward kernel, since each writes sums of its own: what an H200 runs at a time, by registers
PROGRAMS_OF_ONE_ROW = 1536
TAKEN: tl.constexpr = tl.constexpr(-(2**31))  # the key of a column that is chosen, or beyond the window


class Forward(NamedTuple):
    """What the forward kernel gives, and what its backward reads again (columns, lse, the loss's weights)."""

    ids_tk: Tensor  # int64
    weights_tk: Tensor  # fp32
    tally: Tensor | None  # fp64 [2W + 1]: counts, mean scores, mean logsumexp ** 2
    columns_tk: Tensor  # int32
    lse_t: Tensor  # fp32
    auxiliary_w: Tensor | None  # fp32: gradient of the loss with respect to a token's scores


def tile(window: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile. Example: window 96 -> (8, 128, 1); 2000 -> (1, 2048, 2)."""
    columns = triton.next_power_of_2(window)
    rows = max(TILE // columns, 1)
    return rows, columns, max(rows * columns // TILE, 1)


def choose(logits_tw: Tensor, choice: Choice) -> Forward:
    """See `choose.choose`; `logits_tw` is fp32 and contiguous, and has the mask already."""
    rule, window_w, bias_p, chosen_tk, auxiliary, _ = choice
    (tokens, w), k, device = logits_tw.shape, rule.top_k, logits_tw.device
    rows, columns, warps = tile(w)
    blocks = triton.cdiv(tokens, rows)
    most = PROGRAMS if rows > 1 else PROGRAMS_OF_ONE_ROW // warps
    steps = 1 if auxiliary is None else max(triton.cdiv(blocks, most), 1)
    programs = triton.cdiv(blocks, steps)
    ids = torch.empty(tokens, k, dtype=torch.int64, device=device)
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=device)
    weights, lse = torch.empty(tokens, k, device=device), torch.empty(tokens, device=device)
    counts = scores = squares = logits_tw  # stands for what is not there
    softmax = rule.kind == "softmax"
    if auxiliary is not None:
        counts = torch.zeros(COPIES.value, w, dtype=torch.int32, device=device)
        scores, squares = torch.empty(programs, w, device=device), torch.empty(programs, device=device)
    seed = torch.randint(2**31, (1,), device=device) if rule.random and chosen_tk is None else ids
    given = ids if chosen_tk is None else torch.searchsorted(window_w, chosen_tk)
    if tokens:
        _choose[(programs,)](
            logits_tw, window_w, ids if bias_p is None else bias_p, given, seed,
            ids, chosen, weights, lse, counts, scores, squares, tokens, steps, rule.scale,
            w, k, rule.kind, rule.topk_first and softmax, rule.renormalise and softmax, bias_p is not None,
            chosen_tk is not None, rule.random, auxiliary is not None, rows, columns, triton.next_power_of_2(k),
            num_warps=warps,
        )  # fmt: skip
    if auxiliary is None:
        return Forward(ids, weights, None, chosen, lse, None)
    tally = torch.empty(2 * w + 1, dtype=torch.float64, device=device)
    auxiliary_w = torch.empty(w, device=device)
    _finish[(triton.cdiv(w, 16),)](
        counts, scores, squares, auxiliary.weights_p, window_w, tally, auxiliary_w,
        auxiliary.tokens, auxiliary.scale / auxiliary.tokens, programs, w, 64, 16, num_warps=8,
    )  # fmt: skip
    return Forward(ids, weights, tally, chosen, lse, auxiliary_w)


@triton.jit
def _key(x):
    """Integers in the order of the numbers, above TAKEN; -0 and 0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), TAKEN + 1)


@triton.jit
def _mix(h):
    """A hash of 32 bits, murmur3's last steps."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _choose(
    logits_ptr, window_ptr, bias_ptr, given_ptr, seed_ptr, ids_ptr, chosen_ptr, weights_ptr, lse_ptr,
    counts_ptr, scores_ptr, squares_ptr, tokens, steps, scale,
    W: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, TOPK_FIRST: tl.constexpr, RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr, GIVEN: tl.constexpr, RANDOM: tl.constexpr, TALLY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_W)
    seen = c < W
    j = tl.arange(0, BLOCK_K)
    if BIASED:
        bias = tl.load(bias_ptr + tl.load(window_ptr + c, mask=seen, other=0), mask=seen, other=0.0)
    if RANDOM and not GIVEN:
        seed = tl.load(seed_ptr).to(tl.uint32)
    if TALLY:
        score = tl.zeros([BLOCK_W], dtype=tl.float32)
        square = tl.zeros([BLOCK_T], dtype=tl.float32)
    step = 0
    while step < steps:
        t = (n * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        ok = t < tokens
        inside = ok[:, None] & seen[None, :]
        at = t[:, None] * W
        z = tl.load(logits_ptr + at + c[None, :], mask=inside, other=float("-inf"))
        top = tl.where(ok, tl.max(z, 1), 0.0)
        e = tl.exp(z - top[:, None])
        total = tl.where(ok, tl.sum(e, 1), 1.0)
        lse = top + tl.log(total)
        tl.store(lse_ptr + t, lse, mask=ok)
        # s: scores before they are made to sum to 1 by 1 / whole
        if KIND == "softmax":
            s, whole = e, total
        elif KIND == "sigmoid":
            s = tl.sigmoid(z)
            whole = tl.where(ok, tl.sum(s, 1), 1.0)
        else:
            zeros = tl.where(inside, z, 0.0)
            inverse = 1.0 / (tl.sqrt(tl.sum(zeros * zeros, 1)) + 1e-6)
            s = tl.maximum(zeros, 0.0) * inverse[:, None]
            whole = tl.sum(s, 1) + 1e-6
        if TALLY:
            score += tl.sum(s * (1.0 / whole)[:, None], 0)
            square += tl.where(ok, lse * lse, 0.0)

        if GIVEN:
            key = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.int32)
        elif RANDOM:
            line = _mix(seed + t.to(tl.uint32) * 0x9E3779B9)
            drawn = _mix(line[:, None] ^ (c.to(tl.uint32) * 0x9E3779B9)[None, :])
            key = tl.maximum(drawn.to(tl.int32, bitcast=True), TAKEN + 1)
        elif BIASED:
            if TOPK_FIRST:
                key = _key(z + bias[None, :])
            elif KIND == "softmax":
                key = _key(e * (1.0 / total)[:, None] + bias[None, :])
            elif KIND == "sigmoid":
                key = _key(s + bias[None, :])
            else:
                key = _key(zeros * inverse[:, None] + bias[None, :])
        else:
            key = _key(z)  # scores have the order of the logits
        key = tl.where(seen[None, :], key, TAKEN)
        chosen = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
        for r in tl.static_range(K):
            if GIVEN:
                best = tl.load(given_ptr + t * K + r, mask=ok, other=0).to(tl.int32)
            else:
                best = tl.min(tl.where(key == tl.max(key, 1)[:, None], c[None, :], BLOCK_W), 1)
            key = tl.where(c[None, :] == best[:, None], TAKEN, key)
            chosen = tl.where(j[None, :] == r, best[:, None], chosen)

        real = ok[:, None] & (j < K)[None, :]
        z = tl.load(logits_ptr + at + chosen, mask=real, other=float("-inf"))
        if TOPK_FIRST:
            v = tl.exp(z - tl.where(ok, tl.max(z, 1), 0.0)[:, None])
        elif KIND == "softmax":
            v = tl.exp(z - top[:, None]) * (1.0 / total)[:, None]
        elif KIND == "sigmoid":
            v = tl.sigmoid(z)
        else:
            v = tl.maximum(z, 0.0) * inverse[:, None]
        if TOPK_FIRST or RENORMALISE or KIND == "sigmoid":
            v = v / tl.where(ok, tl.sum(v, 1) + (1e-20 if KIND == "sigmoid" else 0.0), 1.0)[:, None]
        to = t[:, None] * K + j[None, :]
        tl.store(weights_ptr + to, v * scale, mask=real)
        tl.store(chosen_ptr + to, chosen, mask=real)
        tl.store(ids_ptr + to, tl.load(window_ptr + chosen, mask=real, other=0), mask=real)
        if TALLY:
            tl.atomic_add(counts_ptr + (n % COPIES) * W + chosen, 1, mask=real, sem="relaxed")
        step += 1
    if TALLY:
        tl.store(scores_ptr + n * W + c, score, mask=seen)
        tl.store(squares_ptr + n, tl.sum(square, 0))


@triton.jit
def _finish(
    counts_ptr, scores_ptr, squares_ptr, loss_ptr, window_ptr, tally_ptr, auxiliary_ptr, tokens, factor,
    N: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    seen = c < W
    count = tl.load(counts_ptr + tl.arange(0, COPIES)[:, None] * W + c[None, :], mask=seen[None, :], other=0)
    score = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float64)
    square = tl.zeros([BLOCK_N], dtype=tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & seen[None, :]
        at = n[:, None] * W + c[None, :]
        score += tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float64)
        square += tl.load(squares_ptr + n, mask=n < N, other=0.0).to(tl.float64)
    tl.store(tally_ptr + c, tl.sum(count, 0).to(tl.float64), mask=seen)
    tl.store(tally_ptr + W + c, tl.sum(score, 0) / tokens, mask=seen)
    tl.store(tally_ptr + 2 * W, tl.sum(square, 0) / tokens)
    loss = tl.load(loss_ptr + tl.load(window_ptr + c, mask=seen, other=0), mask=seen, other=0.0)
    tl.store(auxiliary_ptr + c, loss * factor, mask=seen)
