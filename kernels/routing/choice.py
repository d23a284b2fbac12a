"""What a choice of experts is told and what it gives: plain data, shared by the reference and the kernels.

Legend: t token, w column of the window, p expert of the pool, k choice of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighed.

    Kinds by logits z: `softmax` p = softmax(z), weights p, or with `topk_first` the softmax over the chosen logits;
    `sigmoid` weights that sum to 1; `norm` relu(z / |z|). `renormalise` (softmax) divides by the sum of the chosen.
    `random` draws the choice instead, from the device's generator: for benchmarks.
    """

    kind: Literal["softmax", "sigmoid", "norm"]
    top_k: int
    topk_first: bool = False
    renormalise: bool = False
    scale: float = 1.0  # multiplies the weights at the very end
    random: bool = False


class Auxiliary(NamedTuple):
    """A layer's loss: sum_e weights_p[e] * (mean score of e) + z * (mean of logsumexp ** 2), with gradient `scale`.

    Means are over `tokens`, those of the whole microbatch, also where this rank has a part of them.
    """

    weights_p: Tensor  # fp32
    z: float
    scale: float
    tokens: int


class Choice(NamedTuple):
    """A choice to make, beside the logits. `window_w` are the visible experts' ids, ascending (int64)."""

    rule: Rule
    window_w: Tensor
    bias_p: Tensor | None = None  # loss-free balance: moves the choice, never the weights
    chosen_tk: Tensor | None = None  # ids to take instead of choosing
    auxiliary: Auxiliary | None = None  # None: nothing hangs on the weights, and nothing is counted
    mask_w: Tensor | None = None  # added to the logits before anything else, fp32


class Tally(NamedTuple):
    """What a choice adds to the statistics, fp64: assignments, and means of scores and (0-dim) of logsumexp ** 2."""

    count_w: Tensor
    score_w: Tensor
    z: Tensor


class Chosen(NamedTuple):
    """`ids_tk` are the window's expert ids (int64), best first; `weights_tk` have the logits' type."""

    ids_tk: Tensor
    weights_tk: Tensor
    tally: Tally | None  # None without a loss
