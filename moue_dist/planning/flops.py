"""Model FLOPs per token and parameter counts, from the configuration alone. Free of torch.

A multiply-add is 2 FLOPs; backward costs twice the forward, so a training step is 3 x forward. Only what the model
asks for is counted: no recompute, no padding, no elementwise work, half of the attention matrix (causal).

Legend: d hidden, h heads, g key-value heads, c head width, s sequence, V vocabulary, F dense FFN width,
P pool, k top-k, f expert width, e shared-expert width, W window, r state width. Forward, per token:

    attention projections   2 d (h + 2g) c + 2 h c d        every layer
    attention matrix        2 s h c                         every layer: scores and values, each 2 s h c, halved
    router                  2 d W                           softmax, sigmoid, norm
                            2 d r + 2 r^2 + 2 r W + 2 k r   universal: query, U s, keys, state update
                            2 d r + 12 r^2 + 2 r W          recurrent: input, GRU, gate
    routed experts          6 k d f                         MoE layers; 6 d e more for the shared expert
    dense FFN               6 d F                           leading dense layers
    head                    2 d V                           once
"""

from __future__ import annotations

from dataclasses import dataclass

from moue_dist.config import Config


@dataclass(frozen=True)
class Flops:
    """Training FLOPs (forward and backward) per token, summed over executed layers."""

    attention: float
    router: float
    experts: float
    dense: float
    head: float

    @property
    def total(self) -> float:
        return self.attention + self.router + self.experts + self.dense + self.head


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of the whole model, each weight once: the pool and a tied head are not counted per use.

    `activated` counts what one token runs through: everything but the pool, and top_k experts in every MoE layer
    (an expert that it meets twice works twice, and counts twice).
    """

    embedding: int  # with the untied head
    attention: int
    norms: int
    dense_ffn: int
    shared_experts: int
    router: int  # per-layer and shared weights
    router_shared: int  # of `router`, what all layers share
    pool: int
    activated: int

    @property
    def dense(self) -> int:
        """All that is not the pool."""
        return self.total - self.pool

    @property
    def total(self) -> int:
        parts = (self.embedding, self.attention, self.norms, self.dense_ffn, self.shared_experts, self.router)
        return sum(parts) + self.pool


def flops_per_token(config: Config) -> Flops:
    """Training FLOPs per token; the formula stands at the top of this file."""
    m, e = config.model, config.moe
    width, groups = m.head_width, m.groups
    attention = 2 * m.hidden_size * (2 * m.heads + 2 * groups) * width + 2 * m.sequence_length * m.heads * width
    state, window = e.state_width, config.topology().window
    router = {
        "universal": 2 * m.hidden_size * state + 2 * state**2 + 2 * state * window + 2 * e.top_k * state,
        "recurrent": 2 * m.hidden_size * state + 12 * state**2 + 2 * state * window,
    }.get(e.router, 2 * m.hidden_size * window)
    experts = 6 * m.hidden_size * (e.top_k * e.expert_width + e.shared_expert_width)
    return Flops(
        attention=3.0 * m.layers * attention,
        router=3.0 * config.moe_layers * router,
        experts=3.0 * config.moe_layers * experts,
        dense=3.0 * m.dense_layers * 6 * m.hidden_size * dense_ffn_width(config),
        head=3.0 * 2 * m.hidden_size * m.vocab_size,
    )


def parameters(config: Config) -> Parameters:
    """Parameter counts; they equal the built model's."""
    m, e = config.model, config.moe
    layer = LayerParameters.of(config)
    shared_router = shared_router_parameters(config)
    pool = e.pool * layer.expert if config.moe_layers else 0
    counts = {
        "embedding": m.vocab_size * m.hidden_size * (1 if m.tied_head else 2),
        "attention": m.layers * layer.attention,
        "norms": m.layers * layer.norms + m.hidden_size,
        "dense_ffn": m.dense_layers * layer.dense_ffn,
        "shared_experts": config.moe_layers * layer.shared_expert,
        "router": config.moe_layers * layer.router + shared_router,
    }
    activated = sum(counts.values()) + config.moe_layers * e.top_k * layer.expert
    return Parameters(**counts, router_shared=shared_router, pool=pool, activated=activated)


@dataclass(frozen=True)
class LayerParameters:
    """Parameter counts of one layer's parts; `expert` is one row of the pool."""

    attention: int
    norms: int
    dense_ffn: int
    shared_expert: int
    router: int
    expert: int

    @classmethod
    def of(cls, config: Config) -> LayerParameters:
        m, e = config.model, config.moe
        d = m.hidden_size
        width, groups = m.head_width, m.groups
        window = config.topology().window
        routers = {
            "norm": window * d + 1,
            "universal": e.state_width * d,
            "recurrent": e.state_width * d + window * e.state_width,
        }
        return cls(
            attention=(m.heads + 2 * groups) * width * d + d * m.heads * width + qk_norm_weights(config),
            norms=2 * d,
            dense_ffn=3 * d * dense_ffn_width(config),
            shared_expert=3 * d * e.shared_expert_width,
            router=routers.get(e.router, window * d),
            expert=3 * d * e.expert_width,
        )


def qk_norm_weights(config: Config) -> int:
    """Weights of a layer's norms of queries and keys."""
    m = config.model
    return {"none": 0, "head": 2 * m.head_width, "all": (m.heads + m.groups) * m.head_width}[m.qk_norm]


def shared_router_parameters(config: Config) -> int:
    """Router weights that all layers share: universal keys [P, r] and U [r, r]; recurrent GRU 2 x [3r, r]."""
    e, r = config.moe, config.moe.state_width
    return {"universal": e.pool * r + r * r, "recurrent": 6 * r * r}.get(e.router, 0)


def dense_ffn_width(config: Config) -> int:
    """Width of a leading dense layer's FFN."""
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size
