"""The reference against megatron-core's own model, torch's own cells, finite differences and the balance module."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moue_dist.config import BalanceConfig, Config, ModelConfig, MoEConfig, OptimizerConfig
from moue_dist.model.balance import BalanceState, balance_terms
from tests.reference import Reference, Routing, gru, norm_constant, parameter_shapes, train

ROUTERS = ("softmax", "sigmoid", "norm", "universal", "recurrent")
# Three MoE layers: the state that the second reads and passes on is the first that could lose a gradient.
MODEL = ModelConfig(layers=4, dense_layers=1, hidden_size=16, heads=4, kv_heads=2, vocab_size=23, sequence_length=8)
POOL = MoEConfig(pool=6, top_k=2, expert_width=8, topology="rotational", window=4, stride=2, state_width=6)
ALL_TERMS = BalanceConfig(uelb=0.02, pool=0.01, layer=0.03, z_loss=0.001)


def config_of(router: Any, **moe: Any) -> Config:
    return Config(model=MODEL, moe=replace(POOL, router=router, **moe), balance=ALL_TERMS)


def text(seed: int = 1, b: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(MODEL.vocab_size, (b, 9), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def lively(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Reference:
    """A reference whose every parameter is random and large enough to matter, norms and transition too."""
    reference, random = Reference(config, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in reference.weights.values():
            noise = torch.randn(p.shape, generator=random, dtype=torch.float64).to(dtype)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else 0.25 * noise)
    return reference


# megatron-core's own model, in a process of its own because a CPU host has to change torch for it.

ATTENTION = replace(MODEL, layers=2, dense_layers=2, norm_eps=1e-4, rope_base=500.0)
MOE = replace(POOL, topology="private", pool=9, top_k=2)
CASES: dict[str, Config] = {
    "grouped queries, qk norm": Config(model=ATTENTION, moe=MOE),
    "full heads, no qk norm, wide": Config(model=replace(ATTENTION, kv_heads=0, qk_norm="none", ffn_hidden_size=40)),
    "one kv head, tied head": Config(model=replace(ATTENTION, kv_heads=1, tied_head=True), moe=MOE),
    "softmax over all": Config(model=MODEL, moe=MOE),
    "softmax over chosen, scaled": Config(model=MODEL, moe=replace(MOE, score="topk_softmax", route_scale=1.7)),
    "sigmoid with bias": Config(model=MODEL, moe=replace(MOE, router="sigmoid", route_scale=2.5)),
    "shared expert": Config(model=MODEL, moe=replace(MOE, shared_expert_width=12)),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def compare_with_megatron(cases: dict[str, Config]) -> dict[str, dict[str, float]]:
    """For each case the relative errors of logits, loss and every gradient. Runs in a fresh process."""
    from moue_dist.parallel.megatron.cpu_host import install

    install()
    torch.set_num_threads(1)
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {name: one_case(config) for name, config in cases.items()}


def one_case(config: Config) -> dict[str, float]:
    reference, (tokens, labels) = lively(config), text()
    if config.moe.router == "sigmoid":
        reference.bias_p = torch.linspace(-0.4, 0.4, config.moe.pool)
    model = megatron_model(config)
    ours, window = reference.weights, config.topology().window
    d, f = config.model.hidden_size, config.moe.expert_width
    pairs: dict[str, tuple[Any, Any]] = {}  # megatron-core's name -> its parameter, how to cut ours
    for name, p in model.named_parameters():
        cut: tuple[str, Any, Any] = name.replace("shared_experts", "shared_expert"), slice(None), p.shape
        if ".local_experts." in name:
            layer, expert = int(name.split(".")[2]) - config.model.dense_layers, int(name.split(".")[6])
            part = slice(0, 2 * f * d) if "linear_fc1" in name else slice(2 * f * d, None)
            cut = "pool.weight", (layer * window + expert, part), p.shape
        pairs[name] = p, cut
    covered = {cut[0] for _, cut in pairs.values()}
    assert covered == ours.keys(), covered ^ ours.keys()
    with torch.no_grad():
        for p, (name, index, shape) in pairs.values():
            p.copy_(ours[name][index].view(shape))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                layer = int(name.split(".")[2]) - config.model.dense_layers
                buffer.copy_(reference.bias_p[layer * window : (layer + 1) * window])
    logits, _ = reference(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    errors = {"logits": relative(model(tokens, position, None), logits)}
    their_loss = model(tokens, position, None, labels=labels).mean()
    their_loss.backward()
    errors["loss"] = relative(their_loss, loss)
    for their_name, (p, (name, index, shape)) in pairs.items():
        mine = ours[name].grad
        assert mine is not None
        assert mine.abs().max() > 0, f"{name} has no gradient, so nothing would be tested"
        errors[their_name] = relative(p.grad, mine[index].view(shape))
    return {name: float(error) for name, error in errors.items()}


def megatron_model(config: Config) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, e = config.model, config.moe
    moe: dict[str, Any] = {}
    if config.moe_layers:
        moe = {
            "num_moe_experts": config.topology().window,
            "moe_router_topk": e.top_k,
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": e.score == "softmax_topk",
            "moe_router_score_function": "sigmoid" if e.router == "sigmoid" else "softmax",
            "moe_router_enable_expert_bias": e.router == "sigmoid",
            "moe_router_topk_scaling_factor": None if e.route_scale == 1.0 else e.route_scale,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "allgather",
            "moe_ffn_hidden_size": e.expert_width,
            "moe_layer_freq": [0] * m.dense_layers + [1] * config.moe_layers,
            "moe_shared_expert_intermediate_size": e.shared_expert_width or None,
        }
    settings = TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.heads,
        num_query_groups=m.kv_heads or m.heads,
        ffn_hidden_size=m.ffn_hidden_size or 4 * m.hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        qk_layernorm=m.qk_norm != "none",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **moe,
    )
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        settings,
        spec,
        vocab_size=m.vocab_size,
        max_sequence_length=m.sequence_length,
        share_embeddings_and_output_weights=m.tied_head,
        position_embedding_type="rope",
        rotary_base=int(m.rope_base),
    )


@pytest.fixture(scope="module")
def errors_to_megatron() -> dict[str, dict[str, float]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(compare_with_megatron, (CASES,)).get(timeout=300)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_megatron_core(
    case: str, errors_to_megatron: dict[str, dict[str, float]]
) -> None:
    too_large = {name: error for name, error in errors_to_megatron[case].items() if not error < 1e-5}
    assert not too_large


# Parts.


def test_gru_is_torchs_cell_without_biases() -> None:
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(5, 5, bias=False)
    x, h = torch.randn(7, 5), torch.randn(7, 5)
    torch.testing.assert_close(gru(x, h, cell.weight_ih, cell.weight_hh), cell(x, h))


def test_norm_constant_makes_weights_sum_to_one_on_average_and_stays_finite() -> None:
    assert norm_constant(1, 1) == pytest.approx(2.0, rel=0.1)  # one logit: +1 or -1, so half of the time nothing
    for window, k in ((2, 2), (8, 2), (64, 8)):
        u = torch.randn(20000, window, generator=torch.Generator().manual_seed(7))
        u = u / u.norm(dim=1, keepdim=True)
        mean = float(u.relu().topk(k).values.sum(1).mean()) * norm_constant(window, k)
        assert mean == pytest.approx(1.0, rel=0.03), (window, k)


def test_no_token_sees_the_future() -> None:
    reference, (tokens, _) = lively(config_of("universal")), text()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % MODEL.vocab_size
    before, after = reference(tokens)[0], reference(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3


def test_load_takes_exactly_the_models_parameters() -> None:
    reference, weights = Reference(config_of("norm")), dict(lively(config_of("norm")).weights)
    reference.load(weights)
    assert all(torch.equal(weights[name], value) for name, value in reference.weights.items())
    with pytest.raises(AssertionError):
        reference.load({name: value for name, value in weights.items() if name != "pool.weight"})
    with pytest.raises(AssertionError):
        reference.load(weights | {"pool.weight": weights["pool.weight"][:1]})
    assert parameter_shapes(config_of("norm"))["pool.weight"] == (6, 3 * 8 * 16)


# Routers.


def routings_of(router: str, **moe: Any) -> tuple[Reference, list[Routing]]:
    reference = lively(config_of(router, **moe))
    return reference, reference(text()[0])[1]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_token_gets_k_visible_experts_and_scores_that_sum_to_one(router: str) -> None:
    reference, routings = routings_of(router)
    for visible_p, routing in zip(reference.visible_lp.bool(), routings, strict=True):
        assert routing.chosen_tp.sum(1).eq(2).all()
        assert not routing.chosen_tp[:, ~visible_p].any() and routing.score_tp[:, ~visible_p].eq(0).all()
        # The norm router knows no score for a token whose logits are all negative.
        scored = (routing.logits_tw > 0).any(1) if router == "norm" else torch.ones(16)
        torch.testing.assert_close(routing.score_tp.sum(1), scored.float(), atol=1e-5, rtol=0)
        # Without a bias the chosen are the best of the scores.
        worst_chosen = routing.score_tp.masked_fill(~routing.chosen_tp, 2.0).amin(1)
        best_other = routing.score_tp.masked_fill(routing.chosen_tp, -1.0).amax(1)
        assert (worst_chosen >= best_other).all()


def test_weights_by_hand() -> None:
    """One token, logits 0, ln 2, ln 4, ln 1/2 over the window: softmax 2/15, 4/15, 8/15, 1/15."""
    config = Config(model=replace(MODEL, hidden_size=4, dense_layers=0, layers=1, heads=1, kv_heads=0), moe=POOL)
    logits = torch.tensor([1.0, 2.0, 4.0, 0.5]).log()
    expected: dict[tuple[Any, Any, bool], tuple[float, float]] = {
        ("softmax", "softmax_topk", False): (4 / 15, 8 / 15),
        ("softmax", "softmax_topk", True): (1 / 3, 2 / 3),
        ("softmax", "topk_softmax", False): (1 / 3, 2 / 3),
        ("sigmoid", "softmax_topk", False): (10 / 22, 12 / 22),  # sigmoids 2/3 and 4/5
    }
    for (router, score, renormalise), pair in expected.items():
        moe = replace(POOL, router=router, score=score, renormalise=renormalise, route_scale=3.0)
        reference = Reference(replace(config, moe=moe))
        with torch.no_grad():
            reference.weights["decoder.layers.0.mlp.router.weight"].copy_(torch.diag(logits))
        routing = reference.route(torch.ones(1, 4), 0, torch.zeros(1, 6))
        assert routing.weight_tp[0, 1:3].tolist() == pytest.approx([3 * w for w in pair], rel=1e-5), (router, score)
        assert routing.weight_tp[0, [0, 3, 4, 5]].eq(0).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_bias_moves_the_choice_and_not_the_weights(router: str) -> None:
    free = lively(config_of(router, score="softmax_topk"))
    biased, x = lively(config_of(router)), torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    biased.bias_p[3] = 100.0
    before, after = (reference.route(x, 0, torch.zeros(16, 6)) for reference in (free, biased))
    assert after.chosen_tp[:, 3].all() and not before.chosen_tp[:, 3].all()
    torch.testing.assert_close(before.score_tp, after.score_tp)
    if router != "sigmoid":  # whose weights are divided by the sum of the chosen
        both = before.chosen_tp & after.chosen_tp
        torch.testing.assert_close(before.weight_tp[both], after.weight_tp[both])


def test_window_equal_to_top_k_chooses_all() -> None:
    reference, routings = routings_of("universal", window=2, stride=2, renormalise=True)
    for visible_p, routing in zip(reference.visible_lp.bool(), routings, strict=True):
        assert torch.equal(routing.chosen_tp, visible_p.expand_as(routing.chosen_tp))
        torch.testing.assert_close(routing.weight_tp.sum(1), torch.ones(16))


# Gradients and training.


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_equal_finite_differences(router: str) -> None:
    """fp64, per parameter, along its own gradient and a random direction: nothing on the way is detached."""
    reference, batch = lively(config_of(router), dtype=torch.float64), text()
    reference.loss(*batch).total.backward()
    random = torch.Generator().manual_seed(0)
    for name, p in reference.weights.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        direction = torch.randn(p.shape, generator=random, dtype=p.dtype)
        direction = direction / direction.norm() + p.grad / p.grad.norm()
        sides = []
        for side in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=side * 1e-6)
                sides.append(reference.loss(*batch).total.item())
                p.sub_(direction, alpha=side * 1e-6)
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(float((p.grad * direction).sum()), rel=1e-4), name


class Untied(Reference):
    """A copy of the pool for every layer."""

    def experts(self, x_td: Tensor, weight_tp: Tensor) -> Tensor:
        copies = self.__dict__.setdefault("copies", [])
        copies.append(self.weights["pool.weight"].detach().clone().requires_grad_())
        shared, self.weights["pool.weight"] = self.weights["pool.weight"], copies[-1]
        out = super().experts(x_td, weight_tp)
        self.weights["pool.weight"] = shared
        return out


def test_the_pools_gradient_is_the_sum_of_an_untied_copys() -> None:
    tied, untied = lively(config_of("recurrent")), Untied(config_of("recurrent"))
    untied.load(dict(tied.weights))
    for reference in (tied, untied):
        reference.loss(*text()).total.backward()
    parts = [copy.grad for copy in untied.__dict__["copies"]]
    assert len(parts) == 3 and all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(tied.weights["pool.weight"].grad, sum(parts))


@pytest.mark.parametrize("router", ROUTERS)
def test_terms_equal_the_balance_modules_after_a_batch(router: str) -> None:
    """Two independent writings of the same formulas, before and after a global batch, and the bias."""
    config = config_of(router)
    config = replace(config, balance=replace(ALL_TERMS, bias=0.01))
    reference, topology = lively(config), config.topology()
    state = BalanceState.initial(topology)
    for step in range(3):
        outputs = [reference.loss(*text(seed=2 * step + i)) for i in range(2)]
        for i, output in enumerate(outputs):
            routings = reference(text(seed=2 * step + i)[0])[1]
            mean_score_lp = torch.stack([routing.score_tp.mean(0) for routing in routings])
            for name, term in balance_terms(topology, state, mean_score_lp).items():
                assert term.item() == pytest.approx(output.terms[name].item(), rel=1e-5), name
        counts_lp = outputs[0].counts_lp + outputs[1].counts_lp
        assert counts_lp.sum(1).tolist() == [2 * 16 * 2] * 3
        reference.finish_batch(counts_lp)
        state.update(counts_lp, bias_rate=0.01)
        torch.testing.assert_close(state.bias, reference.bias_p)
    assert reference.bias_p.abs().max() > 0


def test_training_learns_and_reports() -> None:
    reference, batch = Reference(config_of("universal")), text()
    record: list[dict[str, Any]] = []
    losses = train(reference, [[[batch], [batch]]] * 15, OptimizerConfig(lr=1e-2), record=record)
    assert len(losses) == len(record) == 15 and losses[-1] < 0.5 * losses[0]
    assert record[0]["counts_lp"].sum() == 2 * 16 * 2 * 3
    assert record[0]["terms"]["uelb"] == pytest.approx(1.0, abs=1e-5), "before the first batch F is the target"
    assert abs(record[-1]["terms"]["uelb"] - 1.0) > 1e-5


def test_how_microbatches_are_spread_over_ranks_does_not_matter() -> None:
    batches = [text(seed) for seed in range(4)]
    layouts = [[[batches]], [[[b] for b in batches]], [[batches[:2], batches[2:]]]]
    losses = [train(Reference(config_of("norm")), steps * 3, OptimizerConfig()) for steps in layouts]
    assert losses[0] == losses[1] == losses[2]
