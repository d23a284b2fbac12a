"""The baseline of `moue bench` trains the plain model: its losses are the one-process reference's, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import BalanceConfig, Config, ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, TrainConfig
from moue_dist.parallel.mesh import build_mesh
from moue_dist.training.schedules import learning_rate
from tests.ranks.parity import ON_CPU, microbatches, tokens_of
from tests.reference import Reference
from tests.reference import train as train_reference

STEPS = 4
CONFIG = Config(
    model=ModelConfig(layers=3, dense_layers=1, hidden_size=16, heads=4, kv_heads=2, vocab_size=23, sequence_length=8),
    moe=MoEConfig(pool=8, top_k=2, expert_width=8, shared_expert_width=12),
    balance=BalanceConfig(z_loss=0.01),
    parallel=ParallelConfig(expert_parallel=2),
    optim=OptimizerConfig(lr=0.02, warmup_steps=2, clip_grad=0.5),
    train=TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=2),
)


def train_baseline(config: Config) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses of STEPS steps, this rank's initial weights by the reference's names, and the last batch's load."""
    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    from moue_dist.bench.baseline.model import Baseline, mean_losses
    from moue_dist.parallel.megatron import adapter as megatron

    mesh = build_mesh(dist.get_world_size(), config.parallel)
    dp = mesh.coords(dist.get_rank()).dp
    megatron.initialise(mesh, config.train.seed, 1.0)
    try:
        stock = Baseline(config, mesh, 0, ON_CPU, "bf16")
        initial = {name: p.detach().clone() for name, p in stock.chunks[0].module.named_parameters()}
        batches = [microbatches(config, tokens, dp, mesh.data) for tokens in tokens_of(config, STEPS, seed=7)]
        losses = mean_losses([stock.step(batch, i) for i, batch in enumerate(batches)], dist.group.WORLD)
        return losses, initial, stock.counts_of(lambda: stock.step(batches[-1], STEPS - 1), dist.group.WORLD)
    finally:
        megatron.shut_down()


def as_reference(config: Config, parts: list[dict[str, Tensor]], reference: Reference) -> dict[str, Tensor]:
    """The ranks' weights under the reference's names: the same but for the experts, which are rows of the pool."""
    window, d, f = config.topology().window, config.model.hidden_size, config.moe.expert_width
    weights = {name: torch.zeros_like(p) for name, p in reference.weights.items()}
    for ep, part in enumerate(parts):
        for name, value in part.items():
            if ".local_experts." not in name:
                weights[name.replace("shared_experts", "shared_expert")].copy_(value)
                continue
            words = name.split(".")
            layer, expert = int(words[2]) - config.model.dense_layers, int(words[6]) + ep * window // len(parts)
            columns = slice(0, 2 * f * d) if "linear_fc1" in name else slice(2 * f * d, None)
            weights["pool.weight"][layer * window + expert, columns] = value.flatten()
    return weights


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_baseline_trains_the_plain_model(ranks, router: str) -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, router=router))
    (losses, *_), other = answers = ranks(2).run(train_baseline, config)
    assert losses == other[0]
    reference = Reference(config)
    reference.load(as_reference(config, [part[1] for part in answers], reference))
    batches = [
        [[(m["tokens"], m["labels"]) for m in microbatches(config, tokens, dp, 2)] for dp in range(2)]
        for tokens in tokens_of(config, STEPS, seed=7)
    ]
    rates = [learning_rate(config.optim, step, STEPS) for step in range(STEPS)]
    expected = train_reference(reference, batches, config.optim, rates)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert abs(losses[-1] - losses[0]) > 0.01, "the weights never moved, so only the first loss was tested"
    counts_lp = other[2]
    each = config.train.global_batch_size * config.model.sequence_length * config.moe.top_k
    assert counts_lp.sum(1).tolist() == [each, each]
    assert not counts_lp[0, 4:].any() and not counts_lp[1, :4].any()  # a layer's experts are its own
