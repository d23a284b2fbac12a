"""Every layout trains the model that one process trains: losses, gradient norms, counts and all weights of five steps.

The measure is the plain reference in `tests/reference.py`, in fp32 from the same weights on the same tokens. A case is
a layout and a model; the table covers every pair of the values below (`test_the_table_covers_every_pair`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch

from moue_dist.config import (
    BalanceConfig,
    Config,
    ConfigError,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from moue_dist.validate import validate
from tests.ranks import parity
from tests.ranks.spawn import RankPool

TOLERANCE = 1e-5  # norm of the difference over the norm, of every tensor
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
    "dead": {"moe": {**RING, "router": "softmax"}, "balance": {"bias": 0.01, "z_loss": 0.01}},
    "dense first": {"model": {"dense_layers": 2}, "moe": {**RING, "router": "universal"}, "balance": {"uelb": 0.05}},
    "five layers": {
        "model": {"layers": 5, "dense_layers": 1, "kv_heads": 0},
        "moe": {**RING, "router": "universal"},
        "balance": {"uelb": 0.05},
    },
    "tied head": {"model": {"tied_head": True, "qk_norm": False}, "moe": {**BLOCK, "router": "recurrent"}},
}
FORCED = [
    ("pp2 1-3", "moue"),
    ("pp2 3-1 selective", "recurrent"),
    ("pp2 v2 overlap", "tied head"),
    ("pp2 v2 1-2-1-1", "five layers"),
    ("ep2 dp2", "dead"),
    ("dp2 overlap", "moue"),
    ("tp2", "moue"),
    ("pp2 ep2 dp2", "moue"),
    ("pp2 ep2 dp2 full overlap", "moue"),
    ("pp2 ep2 dp2 selective overlap mb2", "moue, full"),
    ("pp2 ep2 dp2", "unipool"),
    ("pp2 ep2 dp2 overlap", "dead"),
    ("pp2 ep2 dp2 overlap", "tied head"),
    ("pp2 ep2 dp2 plain", "recurrent"),
    ("pp2 ep2 dp2 2-3 full", "five layers"),
    ("pp2 ep2 dp2 v2", "recurrent"),
    ("pp2 ep2 tp2", "qwen"),
    ("pp2 ep2 tp2 selective", "moue"),
    ("pp2 tp2 overlap", "tied head"),
    ("pp4 1-2-1-1", "five layers"),
    ("pp2 ep2 dp2 tp2 overlap", "moue"),
    ("pp4 ep2 dp2 full", "recurrent"),
    ("pp2 ep4 dp4", "moue"),
]
CASES: list[tuple[str, str]] = []


@dataclass(frozen=True)
class Case:
    """`layout` is words: pp2 ep2 dp2 tp2 v2 (virtual stages), full or selective (recompute), overlap, mb2 (sequences
    a microbatch), plain (no distributed optimizer), 1-3 (layers of each stage)."""

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
            moe=replace(BASE.moe, **parts.get("moe", {})),
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
            train=replace(BASE.train, micro_batch_size=self.degree("mb")),
        )

    @property
    def kill(self) -> tuple[int, ...]:
        return ODD if self.model == "dead" else ()


def pairs_of(case: Case) -> Iterator[tuple[str, str]]:
    """All pairs of values of this case's axes."""
    c = case.config
    p = c.parallel
    axes = {
        "pipeline": p.pipeline_parallel,
        "expert": p.expert_parallel,
        "data": min(case.degree("dp"), 2),
        "tensor": p.tensor_parallel,
        "recompute": p.recompute,
        "overlap": p.overlap_grad_reduce,
        "accumulation": c.train.global_batch_size > c.train.micro_batch_size * case.degree("dp"),
        "virtual": p.virtual_stages,
        "router": c.moe.router,
        "topology": c.moe.topology,
    }
    for a, b in itertools.combinations([f"{k}={v}" for k, v in axes.items()], 2):
        yield a, b
    yield f"model={case.model}", "pipeline" if p.pipeline_parallel > 1 else "one stage"
    yield f"model={case.model}", "several" if case.world > 1 else "one rank"
    yield f"plain={not p.distributed_optimizer}", f"data={min(case.degree('dp'), 2)}"


@pytest.fixture(scope="module")
def yardstick(ranks: Callable[[int], RankPool]) -> Callable[[Case], parity.Yardstick]:
    """The reference's run of a case's model; it starts from the weights that one rank draws."""
    known: dict[str, parity.Yardstick] = {}

    def get(case: Case) -> parity.Yardstick:
        if case.model not in known:
            config = parity.one_process(case.config)
            initial = parity.merge(ranks(1).run(parity.initial_weights, config), "initial")
            known[case.model] = parity.run_reference(config, initial, case.kill)
        return known[case.model]

    return get


@pytest.mark.parametrize(("layout", "model"), FORCED + CASES, ids=lambda word: word.replace(" ", "_") or "one_rank")
def test_a_layout_trains_what_one_process_trains(
    layout: str, model: str, ranks: Callable[[int], RankPool], yardstick: Callable[[Case], parity.Yardstick]
) -> None:
    case = Case(layout, model)
    validate(case.config, case.world, cuda=False)
    truth = yardstick(case)
    parts = ranks(case.world).run(parity.train, case.config, truth.seed, kill=case.kill)

    for name, weight in parity.merge(parts, "initial").items():
        assert torch.equal(weight, truth.initial[name]), f"{name} starts otherwise than on one rank"
    for part in parts:
        assert part.losses == pytest.approx(truth.losses, rel=TOLERANCE)
        assert part.norms == pytest.approx([r["grad_norm"] for r in truth.record], rel=TOLERANCE)
        for step, (counts, aux) in enumerate(zip(part.counts, part.aux, strict=True)):
            assert torch.equal(counts.long(), truth.record[step]["counts_lp"]), f"counts of step {step}"
            assert aux == pytest.approx({n: truth.record[step]["terms"][n] for n in aux}, rel=TOLERANCE)
        assert torch.equal(part.bias, truth.bias)
    final = parity.merge(parts, "final")
    assert final.keys() == truth.final.keys()
    errors = {n: float((w - truth.final[n]).norm() / truth.final[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < TOLERANCE} == {}
    if case.kill:
        assert all(r["counts_lp"][:, list(case.kill)].sum() == 0 for r in truth.record)
