"""Small models and layouts of them, by name: what the tests on ranks train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moue_dist.config import (
    BalanceConfig,
    Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

STEPS = 5

# eps: Adam moves a weight by m / (sqrt(v) + eps). With a tiny eps a gradient that is only rounding (1e-9 where others
# are 1e-2) moves it by a full step in a random direction; 1e-6 lets it move by what it is.
BASE = Config(
    model=ModelConfig(layers=4, hidden_size=32, heads=4, kv_heads=2, vocab_size=256, sequence_length=16, init_std=0.1),
    moe=MoEConfig(pool=16, top_k=2, expert_width=16, topology="private", state_width=8),
    optim=OptimizerConfig(lr=3e-3, eps=1e-6, clip_grad=0.5, warmup_steps=1, schedule="cosine"),
    train=TrainConfig(global_batch_size=4, micro_batch_size=1, steps=STEPS),
)
BLOCK: dict[str, Any] = {"topology": "block", "group": 2}
RING: dict[str, Any] = {"topology": "rotational", "window": 8, "stride": 4}
ODD = (1, 3, 5, 7, 9, 11, 13, 15)

# Name: what differs from BASE. "dead": the odd experts get no token, with expert parallelism a whole rank of them.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "switch": {"balance": {"layer": 0.05, "z_loss": 0.01}},
    "all of the window": {"moe": {"top_k": 4}, "balance": {"layer": 0.05}},
    "mixtral": {"moe": {**BLOCK, "score": "topk_softmax", "route_scale": 2.5}, "balance": {"uelb": 0.05, "bias": 0.01}},
    "qwen": {"moe": {**RING, "renormalise": True, "shared_expert_width": 16}, "balance": {"uelb": 0.05}},
    "deepseek": {"moe": {**BLOCK, "router": "sigmoid", "route_scale": 1.5}, "balance": {"bias": 0.02, "pool": 0.02}},
    "unipool": {"moe": {"topology": "full", "router": "norm"}, "balance": {"pool": 0.05}},
    "moue": {"moe": {**RING, "router": "universal"}, "balance": {"uelb": 0.05, "z_loss": 0.01}},
    "moue, full": {"moe": {"topology": "full", "router": "universal"}, "balance": {"uelb": 0.05, "layer": 0.02}},
    "recurrent": {"moe": {**RING, "router": "recurrent"}, "balance": {"uelb": 0.05, "pool": 0.02, "layer": 0.02}},
    # Stages share experts in several runs, between which one stage or the other holds more.
    "skipping ring": {
        "moe": {"topology": "rotational", "window": 8, "stride": 10, "router": "universal", "experts": "torch"},
        "balance": {"uelb": 0.05},
    },
    "dead": {"moe": {**RING, "router": "softmax"}, "balance": {"bias": 0.01, "z_loss": 0.01}},
    "dense first": {  # of two stages the first has no MoE layer, of four two have none
        "model": {"dense_layers": 2},
        "moe": {"topology": "rotational", "window": 12, "stride": 8, "router": "universal"},
        "balance": {"uelb": 0.05},
    },
    "five layers": {
        "model": {"layers": 5, "dense_layers": 1, "kv_heads": 0},
        "moe": {**RING, "router": "universal"},
        "balance": {"uelb": 0.05},
    },
    "olmoe": {"model": {"qk_norm": "all", "clip_qkv": 0.9}, "balance": {"layer": 0.05}},
    "qwen3": {"model": {"head_dim": 12}, "moe": {"topology": "full", "renormalise": True}, "balance": {"uelb": 0.05}},
    "converted": {  # a mask that goes to 0 in the middle of the run
        "moe": {**RING, "mask_start": -6.0, "mask_steps": 4},
        "balance": {"uelb": 0.05, "z_loss": 0.01},
        "train": {"start_from": "elsewhere"},
    },
    "converted, sigmoid": {
        "moe": {**RING, "router": "sigmoid", "mask_start": -4.0, "mask_steps": 8},
        "balance": {"pool": 0.05, "bias": 0.01},
        "train": {"start_from": "elsewhere"},
    },
    "tied head": {"model": {"tied_head": True, "qk_norm": "none"}, "moe": {**BLOCK, "router": "recurrent"}},
}
PAIRS = {
    "norm": ("private", "block", "rotational"),
    "recurrent": ("private", "full"),
    "sigmoid": ("private", "full", "rotational"),
    "softmax": ("full",),
    "universal": ("private", "block"),
}
SHAPES: dict[str, dict[str, Any]] = {"block": BLOCK, "rotational": RING}
MODELS |= {
    f"{router} on {topology}": {
        "moe": {"topology": topology, "router": router, **SHAPES.get(topology, {})},
        "balance": {"uelb": 0.03, "pool": 0.02, "z_loss": 0.01},
    }
    for router, topologies in PAIRS.items()
    for topology in topologies
}
MODELS["softmax on full"]["moe"]["pool"] = 15  # two replicas cannot share it evenly


@dataclass(frozen=True)
class Case:
    """`layout` is words: pp2 ep2 dp2 tp2 v2 (virtual stages), full or selective (recompute), overlap, mb2 (sequences
    a microbatch), merge2 (layers' weight gradients at a time), plain (no distributed optimizer), 1-3 (layers of each
    stage), rows or tokens (what dispatch sends, where it is not picked), tight (no room but for an even share)."""

    layout: str
    model: str

    def degree(self, name: str) -> int:
        return next((int(w[len(name) :]) for w in self.layout.split() if w.rstrip("0123456789") == name), 1)

    @property
    def world(self) -> int:
        return self.degree("pp") * self.degree("dp") * self.degree("tp")

    @cached_property
    def config(self) -> Config:
        words = self.layout.split()
        parts = MODELS[self.model]
        return replace(
            BASE,
            model=replace(BASE.model, **parts.get("model", {})),
            moe=replace(
                BASE.moe,
                **parts.get("moe", {}),
                merge_wgrad=self.degree("merge"),
                dispatch="all_to_all" if "rows" in words else "gathered" if "tokens" in words else "auto",
                headroom=1.0 if "tight" in words else BASE.moe.headroom,
            ),
            balance=BalanceConfig(**parts.get("balance", {})),
            parallel=ParallelConfig(
                pipeline_parallel=self.degree("pp"),
                virtual_stages=self.degree("v"),
                expert_parallel=self.degree("ep"),
                tensor_parallel=self.degree("tp"),
                stage_layers=tuple(int(n) for w in words if "-" in w for n in w.split("-")),
                overlap_grad_reduce="overlap" in words,
                recompute=next((w for w in ("full", "selective") if w in words), "none"),  # type: ignore[arg-type]
                distributed_optimizer="plain" not in words,
            ),
            train=replace(BASE.train, micro_batch_size=self.degree("mb"), **parts.get("train", {})),
        )

    @property
    def kill(self) -> tuple[int, ...]:
        return ODD if self.model == "dead" else ()
