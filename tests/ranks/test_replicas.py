"""Copies of the pool: their gradients are one sum, they stay equal to the bit, and one that differs is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import Config
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool
from tests.reference import Reference

Gradients = dict[str, dict[tuple[int, int], Tensor]]  # buffer -> (global row, piece) -> gradient


def first_gradients(config: Config, seed: int) -> Gradients:
    """Inside a rank: this rank's shares of the first step's gradients as the optimizer takes them, before clipping."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.training.step import train_step

    system = parity.build(config)
    try:
        tokens = parity.tokens_of(config, 1, seed)[0]
        train_step(system, parity.microbatches(config, tokens, system.coord.dp, system.mesh.data), 0)
        found: Gradients = {}
        for buffer in system.shared.buffers:
            shares, mine = buffer.shares(buffer.grad), found.setdefault(buffer.name, {})
            for segment, offset, length, row, piece in buffer.share_units():
                mine[row, piece] = shares[segment][offset : offset + length] * buffer.grad_scale
        return found
    finally:
        megatron.shut_down()


class Untied(Reference):
    """A copy of the pool for every layer: `copies[l]` gets the gradient of layer l's uses alone."""

    def forward(self, tokens_bs: Tensor, documents_bs: Tensor | None = None):  # type: ignore[no-untyped-def]
        self.__dict__["copies"] = []
        return super().forward(tokens_bs, documents_bs)

    def experts(self, x_td: Tensor, weight_tp: Tensor) -> Tensor:
        tied = self.weights["pool.weight"]
        self.weights["pool.weight"] = tied.detach().clone().requires_grad_()
        self.__dict__["copies"].append(self.weights["pool.weight"])
        out = super().experts(x_td, weight_tp)
        self.weights["pool.weight"] = tied
        return out


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("pp2 ep2 dp2", "moue, full"),
        ("pp2 ep2 dp2 full overlap", "moue"),
        ("pp2 ep2 dp2 v2 selective", "moue"),
        ("pp2 dp2", "recurrent"),
        ("pp4", "moue, full"),
        ("ep2 tp2 dp2", "moue"),
    ],
)
def test_the_pools_gradient_is_the_sum_of_untied_copies(
    layout: str, model: str, ranks: Callable[[int], RankPool]
) -> None:
    case, seed = Case(layout, model), 3
    config = replace(case.config, optim=replace(case.config.optim, clip_grad=0.0))
    alone = parity.one_process(config)
    reference = Untied(alone)
    reference.load(parity.merge(ranks(1).run(parity.initial_weights, alone), "initial"))
    (batch,) = parity.microbatches(alone, parity.tokens_of(alone, 1, seed)[0], 0, 1)
    reference.loss(batch["tokens"], batch["labels"]).total.backward()
    copies = [copy.grad for copy in reference.__dict__["copies"]]
    visible = reference.visible_lp.bool()
    assert len(copies) == config.moe_layers > 1
    assert all(
        grad[see].abs().sum() > 0 and grad[~see].abs().sum() == 0 for grad, see in zip(copies, visible, strict=True)
    )
    shared = [p.grad.flatten() for n, p in reference.weights.items() if n.startswith("shared_router.")]
    expected = {"pool": sum(copies), "shared_router": torch.cat(shared)[None]}

    found: Gradients = {}
    for part in ranks(case.world).run(first_gradients, config, seed):
        for name, units in part.items():
            known = found.setdefault(name, {})
            assert not known.keys() & units.keys(), f"{name}: two ranks own a share"
            known.update(units)
    assert found.keys() == expected.keys()
    for name, units in found.items():
        rows = {row for row, _ in units}
        pieces = len(units) // len(rows)
        whole = torch.stack([torch.cat([units[row, i] for i in range(pieces)]) for row in sorted(rows)])
        assert whole.shape == expected[name].shape
        assert float((whole - expected[name]).norm() / expected[name].norm()) < 1e-5, name


@pytest.mark.parametrize("model", ["moue", "moue, full"])
def test_replicas_stay_equal_to_the_bit_over_50_steps(model: str, ranks: Callable[[int], RankPool]) -> None:
    case = Case("pp2 ep2 dp2 overlap", model)
    config = replace(case.config, train=replace(case.config.train, steps=50))
    parts = ranks(4).run(parity.train, config, 0, stop=50, check_every=10)
    copies: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, weight, _ in part.final:
            copies.setdefault(name, []).append(weight)
    shared_between_stages = [name for name, held in copies.items() if name.startswith("pool.") and len(held) == 2]
    assert len(shared_between_stages) == {"moue": 8, "moue, full": 16}[model]
    assert all(len(held) == 4 for name, held in copies.items() if name.startswith("shared_router."))
    for name, held in copies.items():
        assert all(torch.equal(held[0], other) for other in held[1:]), name
    before = {name: weight for part in parts for name, weight, _ in part.initial}
    assert all(not torch.equal(before[name], held[0]) for name, held in copies.items())


def flip(config: Config, rank: int, buffer: str, row: int) -> str | None:
    """Inside a rank: what the check says after the lowest bit of one weight of `row` changed on `rank`."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.pool.synced import UnequalReplicas, check_replicas

    system = parity.build(config)
    try:
        if dist.get_rank() == rank:
            held = next(b for b in system.shared.buffers if b.name == buffer)
            held.weight[held.row_ids.index(row)].view(torch.int32)[5] ^= 1
        check_replicas(system.shared.buffers, system.groups.world)
    except UnequalReplicas as error:
        return str(error)
    finally:
        megatron.shut_down()
    return None


@pytest.mark.parametrize(("rank", "buffer", "row"), [(1, "pool", 9), (2, "pool", 2), (0, "shared_router", 0)])
def test_a_flipped_bit_is_found_and_named_on_every_rank(
    rank: int, buffer: str, row: int, ranks: Callable[[int], RankPool]
) -> None:
    """Also on ranks that hold no copy of it: they would wait for the others in vain."""
    messages = ranks(4).run(flip, Case("pp2 ep2 dp2", "moue, full").config, rank, buffer, row)
    assert messages == [f"replicas of {buffer} rows [{row}] differ between ranks (1 rows)"] * 4
