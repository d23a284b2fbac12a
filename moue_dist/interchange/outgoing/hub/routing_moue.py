"""The routers of MoUE, for transformers: which experts of the pool a token goes to, and with what weight.

An exported folder holds this file. It imports torch and nothing else. Everything is computed in fp32, whatever the
model's type. Legend: T tokens, d hidden, P pool, W window, k experts a token, r state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moue_dist.interchange.outgoing.hub.configuration_moue import MoueConfig

STATE_EPS = 1e-6


class MoueSharedRouter(nn.Module):
    """What the routers of all layers share: keys and transition, or a GRU without biases, and the choice's bias."""

    bias: Tensor
    keys: Tensor
    transition: Tensor
    w_ih: Tensor
    w_hh: Tensor

    def __init__(self, config: MoueConfig) -> None:
        super().__init__()
        p, r = config.num_experts, config.router_state_size
        shapes: dict[str, tuple[int, ...]] = {"bias": (p,)} if config.expert_bias else {}
        if config.router == "universal":
            shapes |= {"keys": (p, r), "transition": (r, r)}
        if config.router == "recurrent":
            shapes |= {"w_ih": (3 * r, r), "w_hh": (3 * r, r)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))


class MoueRouter(nn.Module):
    """The router of one layer; it has those of these weights that its kind needs."""

    weight: Tensor
    scale: Tensor
    query: Tensor
    input: Tensor
    gate: Tensor
    mask: Tensor

    def __init__(self, config: MoueConfig, moe_layer: int) -> None:
        super().__init__()
        c, r = config, config.router_state_size
        self.config, self.ids = c, c.window_of(moe_layer)
        shapes: dict[str, tuple[int, ...]] = {"mask": (len(self.ids),)} if c.router_masks else {}
        if c.router == "universal":
            shapes["query"] = (r, c.hidden_size)
        elif c.router == "recurrent":
            shapes |= {"input": (r, c.hidden_size), "gate": (len(self.ids), r)}
        else:
            shapes["weight"] = (len(self.ids), c.hidden_size)
        if c.router == "norm":
            shapes["scale"] = (1,)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x_td: Tensor, state_tr: Tensor, shared: MoueSharedRouter) -> tuple[Tensor, Tensor, Tensor]:
        """Expert ids of the pool [T, k], their weights [T, k] fp32, the next state [T, r]."""
        c, x, window = self.config, x_td.float(), torch.tensor(self.ids, device=x_td.device)
        if c.router == "universal":
            query = F.linear(x, self.query.float()) + F.linear(state_tr, shared.transition.float())
            logits = query @ shared.keys.float()[window].t() / math.sqrt(c.router_state_size)
        elif c.router == "recurrent":
            state_tr = gru(F.linear(x, self.input.float()), state_tr, shared.w_ih.float(), shared.w_hh.float())
            logits = F.linear(state_tr, self.gate.float())
        else:
            logits = F.linear(x, self.weight.float())
        if c.router_masks:
            logits = logits + self.mask.float()
        columns, weights = self.choose(logits, shared.bias.float()[window] if c.expert_bias else 0.0)
        ids = window[columns]
        if c.router == "universal":
            moved = c.router_state_decay * state_tr + (weights[..., None] * shared.keys.float()[ids]).sum(1)
            state_tr = F.rms_norm(moved, moved.shape[-1:], eps=STATE_EPS)
        if c.router == "norm":
            weights = weights * self.scale.float() * c.router_norm_constant
        return ids, weights * c.routed_scaling_factor, state_tr

    def choose(self, logits: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        """Columns of the window [T, k] and their weights."""
        c, k = self.config, self.config.num_experts_per_tok
        if c.router == "sigmoid":
            scores = logits.sigmoid()
            columns = (scores + bias).topk(k, -1).indices
            weights = scores.gather(1, columns)
            return columns, weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if c.router == "norm":
            unit = logits / (logits.norm(dim=-1, keepdim=True) + 1e-6)
            columns = (unit + bias).topk(k, -1).indices
            return columns, unit.relu().gather(1, columns)
        if c.router_score == "topk_softmax":
            columns = (logits + bias).topk(k, -1).indices
            return columns, logits.gather(1, columns).softmax(-1)
        scores = logits.softmax(-1)
        columns = (scores + bias).topk(k, -1).indices
        weights = scores.gather(1, columns)
        return columns, weights / weights.sum(-1, keepdim=True) if c.norm_topk_prob else weights


def gru(x: Tensor, state: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """torch.nn.GRUCell without biases."""
    x_reset, x_update, x_new = F.linear(x, w_ih).chunk(3, -1)
    h_reset, h_update, h_new = F.linear(state, w_hh).chunk(3, -1)
    reset, update = (x_reset + h_reset).sigmoid(), (x_update + h_update).sigmoid()
    return (1 - update) * (x_new + reset * h_new).tanh() + update * state
