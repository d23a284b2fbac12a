"""The form that a foreign model takes here: its pool, its topology, its router, and what a layer does not see at first.

Legend: L MoE layers, E experts of a layer (its own), P = L E the pool, W window. Layer l's own are l E .. l E + E - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moue_dist.config import BalanceConfig, Config, ConfigError, MoEConfig, TrainConfig
from moue_dist.interchange.incoming.families import Foreign


@dataclass(frozen=True)
class Form:
    """What the user asks for. Zeros pick: window 2 E, stride E; top_k the source's."""

    topology: Literal["private", "block", "full", "rotational"] = "private"
    window: int = 0
    stride: int = 0
    group: int = 1
    mask_start: float = -16.0
    mask_steps: int = 1000
    upcycle: int = 0  # experts that each dense FFN becomes; 0: it stays one
    split: bool = False  # upcycle: cut the FFN into them instead of copying it
    top_k: int = 0


@dataclass(frozen=True)
class Formed:
    """A configuration, the E experts of each layer, and which part of the source's FFN or expert each one is."""

    config: Config
    own: int
    parts: int  # an FFN is cut into so many experts; 1: an expert is a whole one

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        return self.config.topology().windows

    def hidden_lw(self) -> Tensor:
        """fp32 [L, W]: 1 for the experts that are another layer's."""
        rows = [[float(e // self.own != layer) for e in window] for layer, window in enumerate(self.windows)]
        return torch.tensor(rows)

    def router(self, layer: int, own_ed: Tensor) -> Tensor:
        """[W, d]: a layer's router over its window. An expert of another layer starts near the mean of its own ones.

        The mask then hides it whatever the logits have in common: its logit is about the mean of theirs.
        """
        window, d = self.windows[layer], own_ed.shape[1]
        if len(window) == self.own:
            return own_ed
        wide_wd = own_ed.float().mean(0) + _small(len(window), d, layer)
        at = [window.index(e) for e in range(layer * self.own, (layer + 1) * self.own)]
        wide_wd[at] = own_ed.float()
        return wide_wd.to(own_ed.dtype)

    def new_router(self, layer: int) -> Tensor:
        """[E, d] for a dense model's layer, which has none: 0 where the experts are to have equal weights."""
        d = self.config.model.hidden_size
        return torch.zeros(self.own, d) if self.own == 1 or self.parts > 1 else _small(self.own, d, layer)


def _small(rows: int, hidden: int, layer: int) -> Tensor:
    """Rows that tell tokens apart: logits of about 0.5 from normed hidden states, the same on every machine."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(layer)) * (0.5 / hidden**0.5)


def form(foreign: Foreign, asked: Form, name: str, dtype: torch.dtype) -> Formed:
    """Raises ConfigError where what is asked does not fit the model, by the option of `moue convert`."""
    layers = foreign.model.layers - foreign.model.dense_layers
    own, parts, moe = _experts(foreign, asked)
    moe = replace(moe, pool=layers * own, topology=asked.topology, **_window(asked, own, layers))
    pooled = asked.topology != "private"
    if pooled:
        if not asked.mask_start < 0 or asked.mask_steps < 1:
            raise ConfigError("--mask-start must be below 0 and --mask-steps at least 1: else step 0 is another model")
        moe = replace(moe, mask_start=asked.mask_start, mask_steps=asked.mask_steps)
    balance = BalanceConfig(uelb=foreign.balance) if pooled else BalanceConfig(layer=foreign.balance if own > 1 else 0)
    train = TrainConfig(precision="fp32" if dtype == torch.float32 else "bf16", start_from=".")
    config = Config(name=f"{name}-trained", model=foreign.model, moe=moe, balance=balance, train=train)
    for layer, window in enumerate(config.topology().windows):
        unseen = [e for e in range(layer * own, (layer + 1) * own) if e not in window]
        if unseen:
            raise ConfigError(
                f"--window {moe.window} --stride {moe.stride} --group {moe.group}: MoE layer {layer} would not see its "
                f"own experts {unseen[0]} to {unseen[-1]}; leave them out, or take a stride of {own} x --group"
            )
    return Formed(config, own, parts)


def _experts(foreign: Foreign, asked: Form) -> tuple[int, int, MoEConfig]:
    """(E, parts of an FFN, the router's options)."""
    width, n = foreign.expert_width, asked.upcycle
    if foreign.experts:
        if n or asked.split:
            raise ConfigError(f"--upcycle is for dense models; this one ({foreign.kind}) has experts; leave it out")
        top_k = asked.top_k or foreign.top_k
        if top_k != foreign.top_k:
            raise ConfigError(f"--top-k {top_k} is another model than the source's top {foreign.top_k}; leave it out")
        renormalise = foreign.renormalise
        return foreign.experts, 1, MoEConfig(top_k=top_k, expert_width=width, renormalise=renormalise)
    if asked.split and not n:
        raise ConfigError("--split cuts FFNs into the experts of --upcycle N; name N")
    if not n:
        # Alone, an expert has weight 1. With others that the mask hides, weights that sum to 1 keep it so.
        pooled = asked.topology != "private"
        top_k = asked.top_k or (2 if pooled else 1)
        if not pooled and top_k > 1:
            raise ConfigError(f"--top-k {top_k}: a dense model's layer has one expert; take --upcycle or a topology")
        return 1, 1, MoEConfig(top_k=top_k, expert_width=width, renormalise=pooled)
    if not asked.split:
        top_k = asked.top_k or min(2, n)
        if top_k > n:
            raise ConfigError(f"--top-k {top_k} is more than the experts of --upcycle {n}")
        return n, 1, MoEConfig(top_k=top_k, expert_width=width, renormalise=True)
    if width % n:
        raise ConfigError(f"--upcycle {n} --split does not divide the FFN's width {width}")
    if asked.top_k not in (0, n):
        raise ConfigError(f"--top-k {asked.top_k}: --split gives the source's function with all {n} parts alone")
    return n, n, MoEConfig(top_k=n, expert_width=width // n, route_scale=float(n))


def _window(asked: Form, own: int, layers: int) -> dict[str, Any]:
    if asked.topology == "rotational":
        group = asked.group
        window = asked.window or min(2 * own * group, layers * own)
        return {"window": window, "stride": asked.stride or own * group, "group": group}
    if asked.window or asked.stride:
        raise ConfigError(f"--window and --stride are for --topology rotational, not {asked.topology}; leave them out")
    if asked.group != 1 and asked.topology != "block":
        raise ConfigError(f"--group is for --topology block or rotational, not {asked.topology}; leave it out")
    return {"group": asked.group}
