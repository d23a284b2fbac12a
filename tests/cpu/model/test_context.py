"""What layers share during a step: the loss that a router hangs on its weights, and what it counts."""

from __future__ import annotations

import math

import torch

from moue_dist.config import BalanceConfig, Config, ModelConfig, MoEConfig
from moue_dist.kernels.routing.choice import Choice, Rule
from moue_dist.kernels.routing.choose import choose
from moue_dist.model.balance import BalanceState
from moue_dist.model.context import MoEContext


def context_of(balance: BalanceConfig, shards: int) -> MoEContext:
    """Only what balances: the rest of a rank is not there."""
    config = Config(model=ModelConfig(layers=2), moe=MoEConfig(pool=8, topology="full"), balance=balance)
    topology = config.topology()
    nothing: dict[str, None] = dict.fromkeys(("pool", "exchange", "shared_router"))
    return MoEContext(
        config,
        topology,
        **nothing,  # type: ignore[arg-type]
        balance=BalanceState.initial(topology),
        token_shards=shards,
        device=torch.device("cpu"),
    )


def test_statistics_count_only_where_gradients_are_wanted():
    context = context_of(BalanceConfig(uelb=0.5, z_loss=0.3), shards=4)
    context.begin_step(5)
    with torch.no_grad():
        assert context.auxiliary(1, 10) is None
    context.observe(1, torch.tensor([2, 5]), None)
    assert context.tallies.flat().eq(0).all()
    loss = context.auxiliary(1, 10)
    assert loss is not None and (loss.z, loss.scale, loss.tokens) == (0.15, 0.2, 40)
    # two experts of eight, in equal shares: 0.5 / L * F_e / pi_e, which is 1 before the first batch
    torch.testing.assert_close(loss.weights_p, torch.full((8,), 0.25))
    window, logits = torch.tensor([1, 6]), torch.tensor([[0.0, math.log(3)]] * 10)
    for _ in range(2):
        chosen = choose(logits, Choice(Rule("softmax", 1), window, auxiliary=loss))
        context.observe(1, window, chosen.tally)
    assert context.tallies.counts_lp.tolist() == [[0] * 8, [0, 0, 0, 0, 0, 0, 20, 0]]
    torch.testing.assert_close(context.tallies.scores_lp[1, [1, 6]].tolist(), [2 * 0.25 / 4, 2 * 0.75 / 4])
    torch.testing.assert_close(context.tallies.z_l.tolist(), [0.0, 2 * math.log(4) ** 2 / 4])
