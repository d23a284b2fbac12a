"""Routers: which experts a token goes to, and with what weight. docs/math.md has the formulas.

One interface: hidden x [T, d] and the trajectory state [T, r] (or None) in; `Routing` out. Everything is computed in
fp32 whatever the model's type. Per-layer weights live here; what all layers share (the key table, the state's
transition, the recurrent cell) lives in `SharedRouter`, whose gradients are summed over pipeline stages.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moue_dist.config import MoEConfig

STATE_EPS = 1e-6


class Routing(NamedTuple):
    """A router's answer. `ids` are global expert ids; `scores` sum to 1 over the window, for the balance."""

    ids_tk: Tensor
    weights_tk: Tensor  # fp32
    state_tr: Tensor | None  # fp32
    scores_tw: Tensor  # fp32, columns in the order of the window
    logits_tw: Tensor  # fp32


@dataclass(frozen=True)
class RouterOptions:
    """What choosing the top k needs to know, split off the configuration."""

    top_k: int
    topk_first: bool
    renormalise: bool
    scale: float


@dataclass(frozen=True)
class _Choice:
    """Columns of the top k by score plus bias, of a random draw, or of ids chosen before."""

    options: RouterOptions
    force_balance: bool
    bias_w: Tensor | None
    window: Tensor
    chosen_tk: Tensor | None

    def __call__(self, basis_tw: Tensor) -> Tensor:
        if self.chosen_tk is not None:
            return torch.searchsorted(self.window, self.chosen_tk)
        basis_tw = basis_tw.detach()
        if self.force_balance:
            basis_tw = torch.rand_like(basis_tw)
        elif self.bias_w is not None:
            basis_tw = basis_tw + self.bias_w
        return basis_tw.topk(self.options.top_k, dim=-1).indices


class SharedRouter(nn.Module):
    """Router parameters that every layer uses, fp32: `keys` [P, r] and `transition` [r, r], or a GRU's weights.

    It is not a submodule of the transformer: `parallel.pool_sync` owns its gradients, which span all stages.
    """

    def __init__(self, moe: MoEConfig, device: torch.device) -> None:
        super().__init__()
        r = moe.state_width

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

        if moe.router == "universal":
            self.keys = parameter(moe.pool, r)
            self.transition = parameter(r, r)
        elif moe.router == "recurrent":
            self.w_ih = parameter(3 * r, r)
            self.w_hh = parameter(3 * r, r)


class Router(nn.Module):
    """The router of one MoE layer. `window` are the visible expert ids, ascending."""

    window: Tensor

    def __init__(
        self, moe: MoEConfig, hidden: int, window: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.kind = moe.router
        self.options = RouterOptions(moe.top_k, moe.score == "topk_softmax", moe.renormalise, moe.route_scale)
        self.decay, self.force_balance = moe.state_decay, moe.force_balance
        self.register_buffer("window", torch.tensor(window, dtype=torch.int64, device=device), persistent=False)
        r, w = moe.state_width, len(window)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        if self.kind in ("softmax", "sigmoid", "norm"):
            self.weight = parameter(w, hidden)
        if self.kind == "norm":
            self.scale = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
            self.norm_constant = _norm_constant(w, moe.top_k)
        if self.kind == "universal":
            self.query = parameter(r, hidden)
        if self.kind == "recurrent":
            self.input = parameter(r, hidden)
            self.gate = parameter(w, r)

    def forward(
        self,
        x_td: Tensor,
        state_tr: Tensor | None,
        shared: SharedRouter,
        bias_p: Tensor | None,
        chosen_tk: Tensor | None = None,
    ) -> Routing:
        """Route T tokens. `bias_p` [P] is the loss-free balance bias: it moves the choice, never the weights.

        `chosen_tk` are expert ids to take instead of choosing: what an earlier run of the same tokens chose.
        """
        bias_w = None if bias_p is None else bias_p[self.window]
        choose = _Choice(self.options, self.force_balance, bias_w, self.window, chosen_tk)
        if self.kind == "universal":
            return self._universal(x_td, state_tr, shared, choose)
        if self.kind == "recurrent":
            hidden = _gru(_fp32_linear(x_td, self.input), state_tr, shared.w_ih, shared.w_hh)
            routing = self._softmax(_fp32_linear(hidden, self.gate), choose)
            return routing._replace(state_tr=hidden)
        score = {"softmax": self._softmax, "sigmoid": self._sigmoid, "norm": self._norm}[self.kind]
        return score(_fp32_linear(x_td, self.weight), choose)

    def _universal(self, x_td: Tensor, state_tr: Tensor | None, shared: SharedRouter, choose: _Choice) -> Routing:
        assert state_tr is not None
        query = _fp32_linear(x_td, self.query) + state_tr @ shared.transition.t()
        keys = shared.keys[self.window]
        routing = self._softmax(query @ keys.t() / math.sqrt(keys.shape[1]), choose)
        chosen_tkr = shared.keys[routing.ids_tk]
        moved = self.decay * state_tr + (routing.weights_tk[:, :, None] * chosen_tkr).sum(1)
        state = F.rms_norm(moved, moved.shape[-1:], eps=STATE_EPS)
        return self._scaled(routing)._replace(state_tr=state)

    def _softmax(self, logits: Tensor, choose: _Choice) -> Routing:
        scores = logits.softmax(-1)
        basis = logits if self.options.topk_first else scores
        columns = choose(basis)
        weights = logits.gather(1, columns).softmax(-1) if self.options.topk_first else scores.gather(1, columns)
        if self.options.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        routing = Routing(self.window[columns], weights, None, scores, logits)
        return routing if self.kind == "universal" else self._scaled(routing)

    def _sigmoid(self, logits: Tensor, choose: _Choice) -> Routing:
        raw = logits.sigmoid()
        columns = choose(raw)
        weights = raw.gather(1, columns)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return self._scaled(Routing(self.window[columns], weights, None, raw / raw.sum(-1, keepdim=True), logits))

    def _norm(self, logits: Tensor, choose: _Choice) -> Routing:
        unit = logits / (logits.norm(dim=-1, keepdim=True) + 1e-6)
        columns = choose(unit)
        positive = unit.relu()
        weights = positive.gather(1, columns) * self.scale.float() * self.norm_constant
        scores = positive / (positive.sum(-1, keepdim=True) + 1e-6)
        return self._scaled(Routing(self.window[columns], weights, None, scores, logits))

    def _scaled(self, routing: Routing) -> Routing:
        scale = self.options.scale
        return routing if scale == 1.0 else routing._replace(weights_tk=routing.weights_tk * scale)


def _fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float())


def _gru(x_tr: Tensor, state_tr: Tensor | None, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """torch.nn.GRUCell without biases, gates in the order reset, update, new."""
    assert state_tr is not None
    x_reset, x_update, x_new = (x_tr @ w_ih.t()).chunk(3, -1)
    h_reset, h_update, h_new = (state_tr @ w_hh.t()).chunk(3, -1)
    reset, update = (x_reset + h_reset).sigmoid(), (x_update + h_update).sigmoid()
    new = (x_new + reset * h_new).tanh()
    return (1 - update) * new + update * state_tr


@functools.cache
def _norm_constant(window: int, top_k: int) -> float:
    """1 / E[sum of the top k of relu(g / |g|)], g ~ N(0, I_window), by 4096 draws: weights sum to about 1 at first.

    The inverse of the mean, not the mean of the inverse: for a small window all of g can be negative.
    """
    g = torch.randn(4096, window, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64)
    top = (g / g.norm(dim=-1, keepdim=True)).relu().topk(top_k, dim=-1).values
    return 1.0 / float(top.sum(-1).mean())
