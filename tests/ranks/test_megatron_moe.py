"""The plain topology with the softmax router is megatron-core's own MoE layer: logits and every gradient.

Both models are built in the same ranks over megatron-core's groups and get the same weights: ours goes through the
trainer (build, schedule, pool reduction), theirs is a GPTModel with megatron-core's MoELayer and its all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moue_dist.config import BalanceConfig, Config, OptimizerConfig
from tests.ranks import parity
from tests.ranks.cases import BASE
from tests.ranks.spawn import RankPool

Named = dict[str, Tensor]
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax over all": {},
    "softmax over chosen": {"score": "topk_softmax", "route_scale": 1.7},
    "shared expert": {"shared_expert_width": 16, "top_k": 3},
}


def config_of(name: str, expert_parallel: int) -> Config:
    moe = replace(BASE.moe, **ROUTERS[name])
    parallel = replace(BASE.parallel, expert_parallel=expert_parallel, distributed_optimizer=False)
    # Without clipping and with learning rate 0 a step leaves its gradients, and the weights, for us to read.
    optim = OptimizerConfig(lr=1e-30, clip_grad=0.0, weight_decay=0.0)
    train = replace(BASE.train, micro_batch_size=1)
    return replace(BASE, moe=moe, parallel=parallel, optim=optim, balance=BalanceConfig(), train=train)


def both(config: Config, seed: int) -> tuple[Named, Named]:
    """Inside a rank: logits and gradients of our model and of megatron-core's, by our global names."""
    from moue_dist.parallel.megatron import adapter as megatron

    system = parity.build(config)
    try:
        tokens = parity.tokens_of(config, 1, seed)[0]
        batches = parity.microbatches(config, tokens, system.coord.dp, system.mesh.data)
        theirs = _their_model(config)
        _copy_weights(system, theirs)
        return _ours(system, batches), _theirs(system, theirs, batches)
    finally:
        megatron.shut_down()


def _ours(system: Any, batches: list[Named]) -> Named:
    from moue_dist.model.init import global_names
    from moue_dist.training.step import train_step

    (chunk,), (pool,) = system.chunk_modules(), system.shared.buffers
    with torch.no_grad():
        out = {"logits": torch.stack([chunk(b["tokens"], b["position_ids"], None) for b in batches])}
    train_step(system, batches, 0)
    out |= {name: p.main_grad.clone() for name, p in global_names(chunk, system.layout[0])}
    shares = pool.shares(pool.grad)
    for segment, offset, length, row, piece in pool.share_units():
        out[f"pool.{row:02}.{piece:02}"] = shares[segment][offset : offset + length] * pool.grad_scale
    return out


def _theirs(system: Any, model: Any, batches: list[Named]) -> Named:
    """Gradients of the mean over this rank's microbatches; nothing is reduced over ranks."""
    with torch.no_grad():
        out = {"logits": torch.stack([model(b["tokens"], b["position_ids"], None) for b in batches])}
    for b in batches:
        (model(b["tokens"], b["position_ids"], None, labels=b["labels"]).mean() / len(batches)).backward()
    for name, p in model.named_parameters():
        place = _our_place(system, name)
        out["/".join(place)] = p.grad.clone()
    return out


def _their_model(config: Config) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, e = config.model, config.moe
    settings = TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.heads,
        num_query_groups=m.kv_heads,
        ffn_hidden_size=4 * m.hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        qk_layernorm=m.qk_norm != "none",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        expert_model_parallel_size=config.parallel.expert_parallel,
        num_moe_experts=config.topology().window,
        moe_router_topk=e.top_k,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=e.score == "softmax_topk",
        moe_router_topk_scaling_factor=None if e.route_scale == 1.0 else e.route_scale,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_ffn_hidden_size=e.expert_width,
        moe_layer_freq=[1] * m.layers,
        moe_shared_expert_intermediate_size=e.shared_expert_width or None,
    )
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        settings,
        spec,
        vocab_size=m.vocab_size,
        max_sequence_length=m.sequence_length,
        position_embedding_type="rope",
        rotary_base=int(m.rope_base),
    )


def _our_place(system: Any, name: str) -> tuple[str, ...]:
    """Where megatron-core's parameter stands in ours: (our name,), or (pool's row, in or out) for an expert's."""
    if ".local_experts." not in name:
        return (name.replace("shared_experts", "shared_expert"),)
    words, window = name.split("."), system.context.topology.window
    first = system.coord.ep * window // system.mesh.expert  # megatron-core gives each rank neighbouring experts
    expert = int(words[2]) * window + first + int(words[words.index("local_experts") + 1])
    return f"pool.{expert:02}", "in" if "linear_fc1" in name else "out"


@torch.no_grad()
def _copy_weights(system: Any, theirs: Any) -> None:
    """Our weights into their model; each of their parameters has its place in ours."""
    from moue_dist.model.init import global_names

    ours = dict(global_names(system.chunk_modules()[0], system.layout[0]))
    rows, split = _all_rows(system), 2 * system.context.pool.width * system.context.pool.hidden
    for name, p in theirs.named_parameters():
        place = _our_place(system, name)
        if len(place) == 1:
            p.copy_(ours[place[0]])
        else:
            row = rows[place[0]]
            p.copy_((row[:split] if place[1] == "in" else row[split:]).view(p.shape))


def _all_rows(system: Any) -> Named:
    """Every expert's row: this rank's and, under expert parallelism, the others'."""
    pool = system.context.pool
    mine = {f"pool.{e:02}": row.clone() for e, row in zip(pool.ids, pool.buffer.weight, strict=True)}
    found: list[Any] = [None] * system.mesh.world
    dist.all_gather_object(found, mine, group=system.groups.world)
    return {name: row for part in found for name, row in part.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("world", "expert_parallel"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_logits_and_every_gradient(
    router: str, world: int, expert_parallel: int, ranks: Callable[[int], RankPool]
) -> None:
    parts = ranks(world).run(both, config_of(router, expert_parallel), 0)
    for ours, theirs in parts:
        assert relative(ours.pop("logits"), theirs.pop("logits")) < 1e-5

    # Theirs are sums over what each rank saw: their mean over data ranks, and experts' two halves as one row.
    mean: Named = {}
    for _, theirs in parts:
        for name, grad in theirs.items():
            mean[name] = mean.get(name, 0) + grad / world
    for name in [n[:-3] for n in mean if n.endswith("/in")]:
        mean[name] = torch.cat([mean.pop(f"{name}/in").flatten(), mean.pop(f"{name}/out").flatten()])
    found: Named = {}
    for ours, _ in parts:
        for name, grad in ours.items():
            assert name not in found or torch.equal(found[name], grad), f"{name} differs between ranks"
            found[name] = grad
    for name in [n for n in found if n.startswith("pool.") and n.endswith(".00")]:
        pieces = sorted(n for n in found if n.startswith(name[:-2]))
        found[name[:-3]] = torch.cat([found.pop(n) for n in pieces])

    assert found.keys() == mean.keys()
    assert sum(n.startswith("pool.") for n in found) == 16
    assert all(grad.abs().max() > 0 for grad in mean.values()), "a gradient of zero would test nothing"
    errors = {name: relative(grad, mean[name]) for name, grad in found.items()}
    assert {n: e for n, e in errors.items() if not e < 1e-5} == {}
