"""The balance terms against their textbook forms, and the statistics against every way to spread them over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moue_dist.config import BalanceConfig
from moue_dist.config.topology import Topology, build_topology
from moue_dist.model.balance import (
    BalanceState,
    balance_terms,
    balance_weights,
    load_summary,
    target_share,
    visible_lp,
)

ROTATIONAL = build_topology("rotational", 4, 12, window=6, stride=2)  # exposures 1 to 3
PLAIN = build_topology("private", 4, 12)
FULL = build_topology("full", 4, 12)
BLOCK = build_topology("block", 4, 12, group=2)


def random_batch(topology: Topology, seed: int, assignments: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts, the same number in each layer, and fp64 mean scores that sum to 1 over each window."""
    random = torch.Generator().manual_seed(seed)
    mask_lp = visible_lp(topology).double()
    skew_lp = torch.rand(mask_lp.shape, generator=random, dtype=torch.float64) ** 3 * mask_lp + 1e-9 * mask_lp
    ids = torch.multinomial(skew_lp, assignments, replacement=True, generator=random)
    counts_lp = torch.stack([row.bincount(minlength=topology.pool) for row in ids])
    score_lp = torch.rand(mask_lp.shape, generator=random, dtype=torch.float64) * mask_lp
    return counts_lp, score_lp / score_lp.sum(1, keepdim=True)


def state_after(topology: Topology, counts_lp: torch.Tensor) -> BalanceState:
    """The state in fp64, so that identities can be tested to 1e-12."""
    state = BalanceState.initial(topology)
    state.F_e, state.f_le = state.F_e.double(), state.f_le.double()
    state.update(counts_lp)
    return state


def switch_losses(topology: Topology, counts_lp: torch.Tensor, score_lp: torch.Tensor) -> list[float]:
    """Switch Transformer, eq. 4, one layer at a time: N * sum_i f_i * P_i over the N experts of the layer."""
    losses = []
    for window, counts, scores in zip(topology.windows, counts_lp.tolist(), score_lp.tolist(), strict=True):
        losses.append(len(window) * sum(counts[e] / sum(counts) * scores[e] for e in window))
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_uelb_is_the_mean_switch_loss_under_the_plain_topology(seed: int) -> None:
    counts_lp, score_lp = random_batch(PLAIN, seed)
    terms = balance_terms(PLAIN, state_after(PLAIN, counts_lp), score_lp)
    expected = sum(switch_losses(PLAIN, counts_lp, score_lp)) / PLAIN.layers
    assert abs(float(terms["uelb"]) - expected) < 1e-12
    assert abs(float(terms["layer"]) - expected) < 1e-12
    assert abs(expected - 1) > 1e-3, "the random batch must be unbalanced for this to say anything"


@pytest.mark.parametrize("seed", range(3))
def test_uelb_is_the_pool_loss_under_the_full_topology(seed: int) -> None:
    counts_lp, score_lp = random_batch(FULL, seed)
    terms = balance_terms(FULL, state_after(FULL, counts_lp), score_lp)
    used_p, mean_p = (counts_lp.sum(0).double() / counts_lp.sum()).tolist(), score_lp.mean(0).tolist()
    expected = FULL.pool * sum(f * p for f, p in zip(used_p, mean_p, strict=True))
    assert float(terms["uelb"]) == pytest.approx(expected, abs=1e-12)
    assert float(terms["pool"]) == pytest.approx(float(terms["uelb"]), abs=1e-12)


def test_the_identities_do_not_hold_under_rotation() -> None:
    """Else the two tests above would prove nothing about the terms being different things."""
    counts_lp, score_lp = random_batch(ROTATIONAL, 0)
    terms = balance_terms(ROTATIONAL, state_after(ROTATIONAL, counts_lp), score_lp)
    assert abs(float(terms["uelb"] - terms["layer"])) > 1e-3
    assert abs(float(terms["uelb"] - terms["pool"])) > 1e-3


@pytest.mark.parametrize("topology", [PLAIN, BLOCK, ROTATIONAL, FULL], ids=["plain", "block", "rotational", "full"])
def test_linear_weights_reproduce_the_terms(topology: Topology) -> None:
    counts_lp, score_lp = random_batch(topology, 1)
    state = state_after(topology, counts_lp)
    config = BalanceConfig(uelb=0.3, pool=0.02, layer=0.7, bias=0.1, z_loss=0.5)
    weight_lp = balance_weights(config, topology, state)
    terms = balance_terms(topology, state, score_lp)
    by_layer = [float((weight_lp[i] * score_lp[i]).sum()) for i in range(topology.layers)]
    expected = float(0.3 * terms["uelb"] + 0.02 * terms["pool"] + 0.7 * terms["layer"])
    assert sum(by_layer) == pytest.approx(expected, rel=1e-12)
    assert weight_lp[~visible_lp(topology)].eq(0).all()
    # And term by term from the definitions.
    pi, used = topology.target_share, (counts_lp.sum(0).double() / counts_lp.sum()).tolist()
    uelb = pool = layer = 0.0
    for i, window in enumerate(topology.windows):
        for e in window:
            p, share = float(score_lp[i, e]), int(counts_lp[i, e]) / int(counts_lp[i].sum())
            uelb += used[e] * p / pi[e] / topology.layers
            pool += topology.pool * used[e] * p / topology.layers
            layer += len(window) * share * p / topology.layers
    for name, value in (("uelb", uelb), ("pool", pool), ("layer", layer)):
        assert float(terms[name]) == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("topology", [PLAIN, ROTATIONAL, FULL], ids=["plain", "rotational", "full"])
def test_before_the_first_batch_every_expert_has_its_target(topology: Topology) -> None:
    state, score_lp = BalanceState.initial(topology), random_batch(topology, 2)[1].float()
    terms = balance_terms(topology, state, score_lp)
    assert float(terms["uelb"]) == pytest.approx(1.0) and float(terms["layer"]) == pytest.approx(1.0)
    assert state.F_e.sum() == pytest.approx(1.0) and state.f_le.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert state.bias.eq(0).all()


def test_no_coefficients_mean_no_loss() -> None:
    assert balance_weights(BalanceConfig(), FULL, BalanceState.initial(FULL)).eq(0).all()


@settings(deadline=None, max_examples=50)
@given(
    layers=st.integers(1, 5),
    pool=st.integers(1, 9),
    data=st.data(),
)
def test_statistics_do_not_depend_on_the_layout(layers: int, pool: int, data: st.DataObject) -> None:
    """Any split of the counts over ranks, microbatches and stages sums to the same state, bit by bit."""
    window = data.draw(st.integers(1, pool))
    topology = build_topology("rotational", layers, pool, window=window, stride=data.draw(st.integers(1, pool)))
    ranks = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1000))
    random = torch.Generator().manual_seed(seed)
    parts_rlp = torch.randint(0, 3, (ranks, layers, pool), generator=random) * visible_lp(topology)
    whole, split, staged = (BalanceState.initial(topology) for _ in range(3))
    whole.update(parts_rlp.sum(0), bias_rate=0.1)
    split.update(sum(part.float() for part in parts_rlp.flip(0)), bias_rate=0.1)  # type: ignore[arg-type]
    by_stage_lp = torch.zeros(layers, pool, dtype=torch.int64)
    for layer in range(layers):  # one layer a stage
        by_stage_lp[layer] += parts_rlp[:, layer].sum(0)
    staged.update(by_stage_lp, bias_rate=0.1)
    for name, tensor in whole.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, split.state_dict()[name]), name
        assert torch.equal(tensor, staged.state_dict()[name]), name
    assert float(whole.F_e.sum()) == pytest.approx(1.0, abs=1e-5)
    assert whole.f_le.sum(1).tolist() == pytest.approx([1.0] * layers, abs=1e-5)


def test_zero_counts_divide_nothing() -> None:
    state = BalanceState.initial(ROTATIONAL)
    before = state.state_dict()
    state.update(torch.zeros(4, 12, dtype=torch.int64), bias_rate=1.0)
    for name, tensor in before.items():
        assert torch.equal(tensor, state.state_dict()[name]), name
    counts_lp = random_batch(ROTATIONAL, 3)[0]
    counts_lp[1] = 0  # a layer without assignments keeps its shares
    counts_lp[:, 4] = 0  # an expert without assignments has share 0
    state.update(counts_lp, bias_rate=1.0)
    assert torch.equal(state.f_le[1], before["f_le"][1])
    assert state.F_e[4] == 0 and state.bias[4] == 1
    weight_lp = balance_weights(BalanceConfig(uelb=1, pool=1, layer=1), ROTATIONAL, state)
    assert weight_lp.isfinite().all() and weight_lp[visible_lp(ROTATIONAL)].min() >= 0


def test_an_expert_that_no_layer_sees_and_a_model_without_moe_layers() -> None:
    unseen = build_topology("rotational", 2, 8, window=3, stride=3)  # ids 6 and 7 are in no window
    assert target_share(unseen)[6:].eq(0).all()
    state = BalanceState.initial(unseen)
    state.update(visible_lp(unseen).long(), bias_rate=1.0)
    weight_lp = balance_weights(BalanceConfig(uelb=1), unseen, state)
    assert weight_lp.isfinite().all() and state.bias.eq(0).all()
    assert load_summary(visible_lp(unseen), unseen)["dead"] == 2
    empty = Topology(8, ())
    BalanceState.initial(empty).update(torch.zeros(0, 8))
    assert balance_weights(BalanceConfig(uelb=1), empty, BalanceState.initial(empty)).shape == (0, 8)


def test_bias_moves_against_the_load_and_not_at_all_where_even() -> None:
    """Three layers of target 1/3/W each: summed in floating point they miss 1/W, so the sign must not see floats."""
    topology = build_topology("full", 3, 7)
    state = BalanceState.initial(topology)
    state.update(torch.full((3, 7), 5), bias_rate=0.25)
    assert state.bias.eq(0).all()
    state.update(torch.tensor([[9, 1, 5, 5, 5, 5, 5]] * 3), bias_rate=0.25)
    state.update(torch.tensor([[9, 1, 5, 5, 5, 5, 5]] * 3), bias_rate=0.25)
    assert state.bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0]
    rotated = BalanceState.initial(ROTATIONAL)
    counts_lp = random_batch(ROTATIONAL, 5)[0]
    rotated.update(counts_lp, bias_rate=0.5)
    assert torch.equal(rotated.bias, 0.5 * torch.sign(target_share(ROTATIONAL) - counts_lp.sum(0) / 1600).float())


def test_load_summary() -> None:
    topology = build_topology("rotational", 2, 4, window=3, stride=2)  # windows (0, 1, 2) and (0, 2, 3)
    even = load_summary(torch.tensor([[4, 4, 4, 0], [4, 0, 4, 4]]), topology)
    assert even["pool_max_over_mean"] == pytest.approx(1) and even["layer_max_over_mean"] == pytest.approx(1)
    assert even["dead"] == 0
    skewed = load_summary(torch.tensor([[6, 0, 0, 0], [0, 0, 6, 0]]), topology)
    assert skewed["pool_max_over_mean"] == pytest.approx(0.5 / (1 / 3))
    assert skewed["layer_max_over_mean"] == pytest.approx(3)
    assert skewed["dead"] == 2
    assert skewed["entropy"] == pytest.approx(math.log(2) / math.log(4))
    nothing = load_summary(torch.zeros(2, 4), topology)
    assert nothing == {"pool_max_over_mean": 0.0, "layer_max_over_mean": 0.0, "dead": 4, "entropy": 0.0}
    assert load_summary(torch.tensor([[3]]), build_topology("full", 1, 1))["entropy"] == 1.0


def test_state_dict_round_trip_and_refusal() -> None:
    state, fresh = BalanceState.initial(ROTATIONAL), BalanceState.initial(ROTATIONAL)
    state.update(random_batch(ROTATIONAL, 4)[0], bias_rate=0.1)
    saved, alias = state.state_dict(), fresh.bias
    fresh.load_state_dict(saved)
    assert alias.data_ptr() == fresh.bias.data_ptr(), "loaded in place"
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    state.update(random_batch(ROTATIONAL, 5)[0], bias_rate=0.1)
    assert not torch.equal(saved["F_e"], state.F_e), "saved tensors are copies"
    with pytest.raises(ValueError, match="f_le"):
        fresh.load_state_dict(saved | {"f_le": saved["f_le"][:2]})
    with pytest.raises(ValueError, match="counts have shape"):
        fresh.update(torch.zeros(3, 12))
