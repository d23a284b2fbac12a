"""Routers: which experts a token goes to, and with what weight. docs/math.md has the formulas.

One interface: hidden x [T, d] and the trajectory state [T, r] (or None) in; `Routing` out. Sums are fp32 whatever the
model's type; products, choice and balance are those of `kernels/routing`. Per-layer weights live here; what all layers
share (the key table, the state's transition, the recurrent cell) lives in `SharedRouter`, whose gradients are summed
over pipeline stages.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moue_dist.config import MoEConfig
from moue_dist.kernels.routing.choice import Auxiliary, Choice, Rule, Tally
from moue_dist.kernels.routing.choose import choose, route
from moue_dist.kernels.routing.products import router_logits

STATE_EPS = 1e-6


class Routing(NamedTuple):
    """A router's answer. `ids` are global expert ids; the auxiliary loss hangs on the weights."""

    ids_tk: Tensor
    weights_tk: Tensor  # fp32
    state_tr: Tensor | None  # fp32
    tally: Tally | None  # what the balance needs to know; None without a loss


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
        last = self.kind in ("norm", "universal")  # what else their weights are needed for comes before the scale
        self.rule = Rule(
            kind=moe.router if moe.router in ("sigmoid", "norm") else "softmax",
            top_k=moe.top_k,
            topk_first=moe.score == "topk_softmax",
            renormalise=moe.renormalise,
            scale=1.0 if last else moe.route_scale,
            random=moe.force_balance,
        )
        self.decay, self.route_scale = moe.state_decay, moe.route_scale
        self.register_buffer("window", torch.tensor(window, dtype=torch.int64, device=device), persistent=False)
        r, w = moe.state_width, len(window)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        if self.kind in ("softmax", "sigmoid", "norm"):
            self.weight = parameter(w, hidden)
        if self.kind == "norm":
            self.scale = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
            self.norm_constant = norm_constant(w, moe.top_k)
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
        auxiliary: Auxiliary | None = None,
        mask_w: Tensor | None = None,
    ) -> Routing:
        """Route T tokens. `bias_p` [P] is the loss-free balance bias: it moves the choice, never the weights.

        `chosen_tk` are expert ids to take instead of choosing: what an earlier run of the same tokens chose.
        `auxiliary` is the loss to hang on the weights, None where nothing is trained or counted. `mask_w` [W] is added
        to the logits.
        """
        choice = Choice(self.rule, self.window, bias_p, chosen_tk, auxiliary, mask_w)
        if self.kind == "universal":
            return self._universal(x_td, state_tr, shared, choice)
        if self.kind == "recurrent":
            hidden = _gru(router_logits(x_td, self.input), state_tr, shared.w_ih, shared.w_hh)
            chosen = choose(F.linear(hidden, self.gate.float()), choice)
            return Routing(chosen.ids_tk, chosen.weights_tk, hidden, chosen.tally)
        chosen = route(x_td, self.weight, choice)
        weights = chosen.weights_tk
        if self.kind == "norm":
            weights = self._scaled(weights * self.scale.float() * self.norm_constant)
        return Routing(chosen.ids_tk, weights, None, chosen.tally)

    def _universal(self, x_td: Tensor, state_tr: Tensor | None, shared: SharedRouter, choice: Choice) -> Routing:
        assert state_tr is not None
        query = router_logits(x_td, self.query) + state_tr @ shared.transition.t()
        keys = shared.keys[self.window]
        chosen = choose(query @ keys.t() / math.sqrt(keys.shape[1]), choice)
        chosen_tkr = shared.keys[chosen.ids_tk]
        moved = self.decay * state_tr + (chosen.weights_tk[:, :, None] * chosen_tkr).sum(1)
        state = F.rms_norm(moved, moved.shape[-1:], eps=STATE_EPS)
        return Routing(chosen.ids_tk, self._scaled(chosen.weights_tk), state, chosen.tally)

    def _scaled(self, weights_tk: Tensor) -> Tensor:
        return weights_tk if self.route_scale == 1.0 else weights_tk * self.route_scale


def _gru(x_tr: Tensor, state_tr: Tensor | None, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """torch.nn.GRUCell without biases, gates in the order reset, update, new."""
    assert state_tr is not None
    x_reset, x_update, x_new = (x_tr @ w_ih.t()).chunk(3, -1)
    h_reset, h_update, h_new = (state_tr @ w_hh.t()).chunk(3, -1)
    reset, update = (x_reset + h_reset).sigmoid(), (x_update + h_update).sigmoid()
    new = (x_new + reset * h_new).tanh()
    return (1 - update) * new + update * state_tr


@functools.cache
def norm_constant(window: int, top_k: int) -> float:
    """1 / E[sum of the top k of relu(g / |g|)], g ~ N(0, I_window), by 4096 draws: weights sum to about 1 at first.

    The inverse of the mean, not the mean of the inverse: for a small window all of g can be negative.
    """
    g = torch.randn(4096, window, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64)
    top = (g / g.norm(dim=-1, keepdim=True)).relu().topk(top_k, dim=-1).values
    return 1.0 / float(top.sum(-1).mean())
