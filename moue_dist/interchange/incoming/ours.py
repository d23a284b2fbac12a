"""A MoUE folder, which `moue export` wrote, comes back: the same numbers under our names.

What such a folder does not say, as the precision and the coefficients of balance, are defaults again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from moue_dist.config import BalanceConfig, Config, ConfigError, ModelConfig, MoEConfig, TrainConfig
from moue_dist.interchange.incoming.entries import Entry, of_part, refuse_left_over
from moue_dist.interchange.incoming.folder import Folder
from moue_dist.interchange.names import POOL, parts
from moue_dist.model.balance import BalanceState

KIND = "moue"
BIAS_RATE = 1e-3  # of the loss-free bias, which is used where its rate is not 0; DeepSeek-V3's


@dataclass(frozen=True)
class Back:
    """A model that has come back; `balance` as `BalanceState` has it."""

    config: Config
    entries: list[Entry]
    balance: dict[str, Tensor]


def read(folder: Folder, name: str, dtype: torch.dtype) -> Back:
    """Raises ConfigError for a folder that is not whole or whose windows are no topology of ours."""
    if folder.key("router_masks", default=False):
        raise ConfigError(
            f"{folder.path} was exported before its mask had become 0: name the run itself in train.start_from, or "
            "train it on and export it again"
        )
    config = _config(folder, name, dtype)
    entries = [of_part(folder, config, part, dtype) for part in parts(config)]
    entries += [*_pool(folder, config, dtype), *_shared_router(folder, config, dtype)]
    balance = BalanceState.initial(config.topology()).state_dict()
    if config.balance.bias:
        folder.check("model.shared_router.bias", (config.moe.pool,))
        balance["bias"] = folder.get("model.shared_router.bias").float()
    refuse_left_over(folder, KIND, config.model)
    return Back(config, entries, balance)


def _config(folder: Folder, name: str, dtype: torch.dtype) -> Config:
    number, key = folder.number, folder.key
    heads, hidden, width = number("num_attention_heads"), number("hidden_size"), number("head_dim")
    keys, dense, ffn = number("num_key_value_heads"), key("num_dense_layers"), number("intermediate_size")
    model = ModelConfig(
        layers=number("num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=0 if keys == heads else keys,
        head_dim=0 if width * heads == hidden else width,
        vocab_size=number("vocab_size"),
        sequence_length=number("max_position_embeddings"),
        ffn_hidden_size=0 if ffn == 4 * hidden else ffn,
        dense_layers=dense,
        qk_norm=key("qk_norm"),
        clip_qkv=float(key("clip_qkv", default=0.0)),
        tied_head=bool(key("tie_word_embeddings")),
        rope_base=float(key("rope_base")),
        norm_eps=float(key("rms_norm_eps")),
        init_std=float(key("initializer_range", default=0.02)),
    )
    state = key("router_state_size", default=0)
    moe = MoEConfig(
        pool=number("num_experts"),
        top_k=number("num_experts_per_tok"),
        expert_width=number("moe_intermediate_size"),
        router=key("router"),
        score=key("router_score"),
        renormalise=bool(key("norm_topk_prob")),
        route_scale=float(key("routed_scaling_factor")),
        **({"state_width": state} if state else {}),
        state_decay=float(key("router_state_decay")),
        shared_expert_width=key("shared_expert_intermediate_size", default=0),
        **_topology(folder, number("num_experts")),
    )
    train = TrainConfig(precision="fp32" if dtype == torch.float32 else "bf16", start_from=".")
    balance = BalanceConfig(bias=BIAS_RATE if key("expert_bias", default=False) else 0.0)
    return Config(name=f"{name}-trained", model=model, moe=moe, balance=balance, train=train)


def _topology(folder: Folder, pool: int) -> dict[str, Any]:
    """The options under which layers have these windows, each [first, width] on the ring of the pool."""
    windows = [tuple(window) for window in folder.key("windows")]
    widths, runs = {width for _, width in windows}, [len(list(same)) for _, same in groupby(windows)]
    window, firsts = windows[0][1], [first for first, _ in windows]
    group = runs[0]
    if widths == {pool}:
        return {"topology": "full"}
    stride = (firsts[group] - firsts[0]) % pool if group < len(firsts) else window
    if len(widths) != 1 or firsts != [i // group * stride % pool for i in range(len(firsts))]:
        raise ConfigError(f"{folder.path}: windows={folder.key('windows')} follow none of our topologies")
    if stride == window and window * len(windows) == pool * group and len(windows) % group == 0:
        return {"topology": "private"} if group == 1 else {"topology": "block", "group": group}
    return {"topology": "rotational", "window": window, "stride": stride, "group": group}


def _pool(folder: Folder, config: Config, dtype: torch.dtype) -> list[Entry]:
    p, f, d = config.moe.pool, config.moe.expert_width, config.model.hidden_size
    fused, down = "model.experts.gate_up_proj", "model.experts.down_proj"
    folder.check(fused, (p, 2 * f, d))
    folder.check(down, (p, d, f))

    def row(e: int) -> Tensor:
        return torch.cat([folder.get(fused, e).flatten(), folder.get(down, e).flatten()])[None].to(dtype)

    return [Entry(POOL, (p, 3 * f * d), partial(row, e), e, 1) for e in range(p)]


def _shared_router(folder: Folder, config: Config, dtype: torch.dtype) -> list[Entry]:
    """What all layers' routers share stands in one row, in the order of `SharedRouter`."""
    e, r = config.moe, config.moe.state_width
    shapes = {
        "universal": {"keys": (e.pool, r), "transition": (r, r)},
        "recurrent": {"w_ih": (3 * r, r), "w_hh": (3 * r, r)},
    }.get(e.router, {})
    names = [f"model.shared_router.{name}" for name in shapes]
    for name, shape in zip(names, shapes.values(), strict=True):
        folder.check(name, shape)
    size = sum(a * b for a, b in shapes.values())

    def row() -> Tensor:
        return torch.cat([folder.get(name).flatten() for name in names])[None].to(dtype)

    return [Entry("shared_router.weight", (1, size), row)] if names else []
