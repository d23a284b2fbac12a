"""The plain folder: a Qwen3-MoE, whose every layer has its window as experts of its own, for servers as they are.

Experts that several layers see are written once for each. Where weights are scaled at the end (`moe.route_scale`), the
experts' last products carry the scale.
"""

from __future__ import annotations

from typing import Any

from moue_dist.config import Config, refuse
from moue_dist.interchange.outgoing.entries import Entry, Weights
from moue_dist.interchange.outgoing.saved import Saved

_WAY_OUT = "use --form moue"


def size_factor(config: Config) -> float:
    """How much larger the experts become: L W / P."""
    return config.moe_layers * config.topology().window / config.moe.pool


def plain_form(saved: Saved, *, masters: bool) -> tuple[dict[str, Any], list[Entry]]:
    """config.json without what all forms share, and the tensors. Raises ConfigError for what it cannot hold."""
    config = saved.config
    _check(saved)
    m, e, weights = config.model, config.moe, Weights(saved, masters=masters)
    entries = weights.dense()
    for layer, window in enumerate(config.topology().windows, start=m.dense_layers):
        for column, expert in enumerate(window):
            entries += weights.expert(layer, column, expert, e.route_scale)
    return _about(config), entries


def _check(saved: Saved) -> None:
    config = saved.config
    m, e, bias = config.model, config.moe, saved.expert_bias
    refuse(not config.moe_layers, f"--form plain: the model has no MoE layer; {_WAY_OUT}")
    refuse(e.force_balance, "--form plain: moe.force_balance draws experts at random, no router has learned anything")
    why = {
        "sigmoid": "Qwen3-MoE's router is a softmax",
        "norm": "Qwen3-MoE's router is a softmax",
        "universal": "its keys and its state are shared over depth, which no layer of Qwen3-MoE has",
        "recurrent": "its state runs over depth, which no layer of Qwen3-MoE has",
    }
    refuse(e.router != "softmax", f"--form plain cannot hold moe.router={e.router}: {why.get(e.router)}; {_WAY_OUT}")
    refuse(
        bool(e.shared_expert_width),
        f"--form plain cannot hold moe.shared_expert_width={e.shared_expert_width}: Qwen3-MoE has no expert beside the "
        f"routed ones; {_WAY_OUT}",
    )
    refuse(
        bias is not None and bool(bias.any()),
        f"--form plain cannot hold the bias of balance.bias, which moves the choice of experts; {_WAY_OUT}",
    )
    refuse(
        m.qk_norm != "head",
        f"--form plain cannot hold model.qk_norm={m.qk_norm}: Qwen3-MoE norms each head's queries and keys; {_WAY_OUT}",
    )
    refuse(
        m.clip_qkv > 0,
        f"--form plain cannot hold model.clip_qkv={m.clip_qkv}: Qwen3-MoE does not clip; {_WAY_OUT}",
    )
    refuse(
        saved.mask_lw is not None,
        f"--form plain cannot hold the mask of moe.mask_steps={e.mask_steps}, which is not 0 yet at step "
        f"{saved.position.step}; train on, or {_WAY_OUT}",
    )


def _about(config: Config) -> dict[str, Any]:
    m, e = config.model, config.moe
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": m.head_width,
        "num_experts": config.topology().window,
        "norm_topk_prob": e.renormalise or e.score == "topk_softmax",  # a softmax over the chosen is the same
        "rope_theta": m.rope_base,  # its name before transformers 5, and since
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_base},
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(m.dense_layers)),
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
