"""The MoUE folder: the pool stored once, and a modeling file that comes along (`trust_remote_code`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moue_dist.config import Config, ConfigError
from moue_dist.interchange.outgoing.entries import Entry, Weights
from moue_dist.interchange.outgoing.saved import Saved
from moue_dist.model.router import norm_constant

CODE = ("configuration_moue.py", "routing_moue.py", "modeling_moue.py")  # of hub/, written into the folder


def moue_form(saved: Saved, *, masters: bool) -> tuple[dict[str, Any], list[Entry]]:
    """config.json without what all forms share, and the tensors. Raises ConfigError for what it cannot hold."""
    config, bias = saved.config, saved.expert_bias
    if config.moe.force_balance:
        raise ConfigError(
            f"{saved.path} was trained with moe.force_balance, which draws the experts at random: its routers have "
            "learned nothing that could be exported"
        )
    weights = Weights(saved, masters=masters)
    # fp32 first: behind an odd number of 16-bit ones it would stand askew
    entries = _shared_router(weights, bias) + _masks(saved)
    entries += weights.dense() + (weights.pool("model.experts.") if config.moe_layers else [])
    return _about(config, bias is not None, saved.mask_lw is not None), entries


def _masks(saved: Saved) -> list[Entry]:
    """What each layer's router adds to its logits, where the run was stopped before that had become 0."""
    if saved.mask_lw is None:
        return []
    first = saved.config.model.dense_layers
    return [
        Entry(f"model.layers.{first + i}.mlp.gate.mask", tuple(mask_w.shape), lambda m=mask_w: iter([m]), exact=True)  # type: ignore[misc]
        for i, mask_w in enumerate(saved.mask_lw)
    ]


def _shared_router(weights: Weights, bias: Tensor | None) -> list[Entry]:
    """What all layers share: one row in the checkpoint, its parts in the order of `SharedRouter`."""
    e, theirs, entries = weights.moe, "model.shared_router.", []
    r = e.state_width
    parts: dict[str, dict[str, tuple[int, int]]] = {
        "universal": {"keys": (e.pool, r), "transition": (r, r)},
        "recurrent": {"w_ih": (3 * r, r), "w_hh": (3 * r, r)},
    }
    shapes = parts.get(e.router, {})
    whole, at = sum(a * b for a, b in shapes.values()), 0
    for name, (a, b) in shapes.items():

        def cut(row: Tensor, at: int = at, end: int = at + a * b) -> Tensor:
            return row[0, at:end]

        entries.append(weights.made(theirs + name, (a, b), "shared_router.weight", (1, whole), cut, exact=True))
        at += a * b
    if bias is not None:
        entries.append(Entry(theirs + "bias", (e.pool,), lambda: iter([bias]), exact=True))
    return entries


def _about(config: Config, bias: bool, masks: bool) -> dict[str, Any]:
    m, e = config.model, config.moe
    stateful = e.router in ("universal", "recurrent")
    window = config.topology().window
    return {
        "model_type": "moue",
        "architectures": ["MoueForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_moue.MoueConfig",
            "AutoModel": "modeling_moue.MoueModel",
            "AutoModelForCausalLM": "modeling_moue.MoueForCausalLM",
        },
        "head_dim": m.head_width,
        "qk_norm": m.qk_norm,
        "clip_qkv": m.clip_qkv or None,
        "rope_base": m.rope_base,
        "num_dense_layers": m.dense_layers,
        "num_experts": e.pool,
        "shared_expert_intermediate_size": e.shared_expert_width,
        "windows": windows_on_ring(config),
        "router": e.router,
        "router_score": e.score,
        "norm_topk_prob": e.renormalise,
        "routed_scaling_factor": e.route_scale,
        "router_norm_constant": norm_constant(window, e.top_k) if e.router == "norm" else 1.0,
        "router_state_size": e.state_width if stateful else 0,
        "router_state_decay": e.state_decay,
        "expert_bias": bias,
        "router_masks": masks,
    }


def windows_on_ring(config: Config) -> list[list[int]]:
    """Each MoE layer's window as [first, width] on the ring of the pool."""
    pool, found = config.moe.pool, []
    for window in config.topology().windows:
        ids = set(window)
        first = next((x for x in window if (x - 1) % pool not in ids), 0)
        if {(first + j) % pool for j in range(len(window))} != ids:
            raise ConfigError(f"the window {window} is no run of neighbours on the ring of {pool} experts")
        found.append([first, len(window)])
    return found
