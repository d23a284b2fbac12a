"""Every refusal of a configuration, in one place and before anything starts. Free of torch.

Each message names the options, says the numbers and the way out. What passes here is proven to work; what is not
proven is refused by name.
"""

from __future__ import annotations

import dataclasses
import math

from moue_dist.config import Config, ConfigError, refuse
from moue_dist.config.devices import Device
from moue_dist.measuring.measured_use import measured_use
from moue_dist.parallel.mesh import build_mesh, layers_of_rank, stage_layout
from moue_dist.parallel.placement.of_config import moe_window, place_pool
from moue_dist.refusals.machine import Resolved, resolve

# The least allowed value of every number; True: strictly above it.
_LEAST: dict[str, tuple[float, bool]] = {
    **{f"model.{k}": (1, False) for k in ("layers", "hidden_size", "heads", "sequence_length")},
    **{f"model.{k}": (0, False) for k in ("kv_heads", "ffn_hidden_size", "dense_layers", "init_std")},
    **{f"model.{k}": (0, True) for k in ("rope_base", "norm_eps")},
    "model.vocab_size": (256, False),
    **{f"moe.{k}": (1, False) for k in ("pool", "top_k", "expert_width", "group", "state_width")},
    **{f"moe.{k}": (0, False) for k in ("window", "stride", "state_decay", "shared_expert_width", "merge_wgrad")},
    "moe.route_scale": (0, True),
    "moe.headroom": (1, False),
    **{f"balance.{k}": (0, False) for k in ("uelb", "pool", "layer", "bias", "z_loss")},
    **{
        f"parallel.{k}": (1, False)
        for k in ("pipeline_parallel", "virtual_stages", "expert_parallel", "tensor_parallel")
    },
    **{f"parallel.{k}": (0, False) for k in ("pool_budget_gib", "replace_interval")},
    "parallel.lag": (-1, False),
    **{f"optim.{k}": (0, False) for k in ("min_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_grad")},
    **{f"optim.{k}": (0, False) for k in ("beta1", "beta2", "power")},
    **{f"optim.{k}": (0, True) for k in ("lr", "eps")},
    **{f"train.{k}": (1, False) for k in ("steps", "global_batch_size", "micro_batch_size", "log_interval")},
    **{f"train.{k}": (0, False) for k in ("seed", "eval_interval", "save_interval", "check_replicas_interval")},
    "train.eval_batches": (0, False),
    "train.keep_checkpoints": (1, False),
    "train.timeout_seconds": (0, True),
    "data.max_megabytes": (0, True),
    "data.valid_percent": (0, False),
}


def validate(
    config: Config,
    world: int | None,
    *,
    cuda: bool,
    device: Device | None = None,
    transformer_engine: bool = False,
) -> Resolved:
    """Raise ConfigError for a configuration that cannot run; return what its `auto` options become.

    `world` is the number of processes (None: not known yet), `cuda` whether the machine has GPUs, `device` which, and
    `transformer_engine` whether it is installed.
    """
    _check_numbers(config)
    _check_model(config)
    _check_moe(config)
    _check_parallel(config)
    check_placement(config)
    _check_pool_optimizer(config)
    if world is not None:
        _check_world(config, world)
    return resolve(config, cuda, device, transformer_engine)


def _check_numbers(config: Config) -> None:
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for key, value in ({} if isinstance(part, str) else vars(part)).items():
            name = f"{section.name}.{key}"
            if isinstance(value, float):
                refuse(not math.isfinite(value), f"{name}={value} must be a finite number")
            if name in _LEAST:
                least, above = _LEAST[name]
                refuse(value < least or (above and value == least), f"{name}={value} must be {_bound(least, above)}")
    o, t = config.optim, config.train
    for name, value in (("beta1", o.beta1), ("beta2", o.beta2)):
        refuse(value >= 1, f"optim.{name}={value} must be below 1")
    refuse(config.moe.state_decay > 1, f"moe.state_decay={config.moe.state_decay} must be at most 1")
    refuse(config.data.valid_percent >= 100, f"data.valid_percent={config.data.valid_percent} must be below 100")
    refuse(o.min_lr > o.lr, f"optim.min_lr={o.min_lr} is larger than optim.lr={o.lr}; lower it")
    refuse(
        o.decay_steps > t.steps,
        f"optim.decay_steps={o.decay_steps} is longer than train.steps={t.steps}; shorten the decay",
    )
    refuse(
        o.decay_steps > 0 and o.schedule != "wsd",
        f"optim.decay_steps={o.decay_steps} is only for optim.schedule=wsd; remove it or set 0",
    )
    refuse(not config.name or "/" in config.name, f"name={config.name!r} must be one folder's name; output says where")


def _bound(least: float, above: bool) -> str:
    return f"above {least:g}" if above else f"at least {least:g}"


def _check_model(config: Config) -> None:
    m, tp = config.model, config.parallel.tensor_parallel
    groups = m.kv_heads or m.heads
    refuse(
        m.hidden_size % m.heads != 0 or m.hidden_size // m.heads % 2 != 0,
        f"model.hidden_size={m.hidden_size} over model.heads={m.heads} must give an even whole head width (RoPE turns "
        f"pairs); change one",
    )
    refuse(m.rope_base != int(m.rope_base), f"model.rope_base={m.rope_base} must be a whole number")
    refuse(m.heads % groups != 0, f"model.kv_heads={m.kv_heads} does not divide model.heads={m.heads}; use a divisor")
    refuse(
        m.dense_layers >= m.layers,
        f"model.dense_layers={m.dense_layers} leaves no MoE layer of model.layers={m.layers}; lower it",
    )
    ffn = m.ffn_hidden_size or 4 * m.hidden_size
    for name, value in (
        ("model.heads", m.heads),
        ("model.kv_heads" if m.kv_heads else "model.heads", groups),
        ("model.sequence_length", m.sequence_length),
        ("model.vocab_size", m.vocab_size),
        ("model.ffn_hidden_size", ffn if m.dense_layers else 0),
        ("moe.shared_expert_width", config.moe.shared_expert_width),
    ):
        refuse(
            value % tp != 0,
            f"{name}={value} is not divisible by parallel.tensor_parallel={tp}, over which it is split; change one",
        )


def _check_moe(config: Config) -> None:
    e, b = config.moe, config.balance
    if e.topology != "rotational":
        for name, value in (("window", e.window), ("stride", e.stride)):
            refuse(
                value != 0,
                f"moe.{name}={value} is only for moe.topology=rotational, not {e.topology}; remove it or set 0",
            )
    refuse(
        e.group != 1 and e.topology in ("private", "full"),
        f"moe.group={e.group} is only for moe.topology=block or rotational, not {e.topology}; remove it or set 1",
    )
    topology = config.topology()
    unseen = topology.exposure.count(0)
    refuse(
        unseen > 0,
        f"{unseen} of the {e.pool} experts of moe.pool are seen by no layer: enlarge moe.window={e.window} or "
        f"moe.stride={e.stride}, or shrink moe.pool",
    )
    refuse(
        e.top_k > topology.window,
        f"moe.top_k={e.top_k} is larger than the window of {topology.window} experts that a layer sees "
        f"(moe.topology={e.topology}); lower moe.top_k or widen the window",
    )
    if e.router != "softmax":
        refuse(
            e.score != "softmax_topk",
            f"moe.score={e.score} is only for moe.router=softmax, not {e.router}; set moe.score=softmax_topk",
        )
        refuse(
            e.renormalise,
            f"moe.renormalise is only for moe.router=softmax, not {e.router}; set moe.renormalise=false",
        )
    refuse(
        e.score == "topk_softmax" and e.renormalise,
        "moe.renormalise has no effect with moe.score=topk_softmax, whose weights sum to 1; set moe.renormalise=false",
    )
    refuse(
        b.bias > 0 and e.router not in ("softmax", "sigmoid"),
        f"balance.bias={b.bias} (loss-free bias) is proven only with moe.router=softmax or sigmoid, not {e.router}; "
        f"set balance.bias=0 and use balance.uelb",
    )
    refuse(
        e.force_balance and any((b.uelb, b.pool, b.layer, b.bias)),
        "moe.force_balance routes at random for benchmarks, so balance terms mean nothing; set balance.uelb, "
        "balance.pool, balance.layer and balance.bias to 0",
    )


def _check_parallel(config: Config) -> None:
    p, e = config.parallel, config.moe
    refuse(
        e.pool % p.expert_parallel != 0,
        f"moe.pool={e.pool} is not divisible by parallel.expert_parallel={p.expert_parallel}; change one",
    )
    refuse(
        p.virtual_stages > 1 and p.pipeline_parallel < 2,
        f"parallel.virtual_stages={p.virtual_stages} interleaves pipeline stages, so it needs "
        f"parallel.pipeline_parallel of at least 2; set virtual_stages=1",
    )
    try:
        layout = stage_layout(config.model.layers, p.pipeline_parallel, p.virtual_stages, p.stage_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    windows = config.topology().windows
    for stage in range(p.pipeline_parallel if p.placement == "replicate" else 0):
        held = {x for i in layers_of_rank(layout, p.pipeline_parallel, stage) for x in moe_window(config, windows, i)}
        empty = [ep for ep in range(p.expert_parallel) if not any(x % p.expert_parallel == ep for x in held)]
        refuse(
            bool(held and empty),
            f"pipeline stage {stage} sees {len(held)} experts, so with parallel.expert_parallel={p.expert_parallel} "
            f"{len(empty)} of its expert ranks would hold none; lower expert_parallel or widen the window",
        )


def check_placement(config: Config) -> None:
    """What experts at home cannot do, or what is not proven with them."""
    p, cells = config.parallel, config.parallel.pipeline_parallel * config.parallel.expert_parallel
    chosen, way_out = f"parallel.placement={p.placement}", "or use parallel.placement=replicate"
    refuse(
        p.pool_budget_gib > 0 and p.placement != "hybrid",
        f"parallel.pool_budget_gib={p.pool_budget_gib:g} is for parallel.placement=hybrid, not {p.placement}; set 0",
    )
    if p.placement == "replicate":
        for name, value in (("replace_interval", p.replace_interval), ("lag", p.lag)):
            refuse(value > 0, f"parallel.{name}={value} is only for parallel.placement=home or hybrid; leave it out")
        refuse(
            p.measured_use != "",
            f"parallel.measured_use={p.measured_use} is only for parallel.placement=home or hybrid: replicate follows "
            f"from the windows alone; leave it out",
        )
        return
    refuse(
        p.placement == "hybrid" and p.pool_budget_gib == 0,
        "parallel.placement=hybrid needs parallel.pool_budget_gib: the GiB that a GPU may spend on the pool "
        "(weights, gradients, optimizer state); `moue plan` prints what home and replicate take",
    )
    refuse(
        p.virtual_stages > 1,
        f"{chosen} runs in lock step, which interleaved stages (parallel.virtual_stages={p.virtual_stages}) do not; "
        f"set virtual_stages=1 {way_out}",
    )
    refuse(
        p.recompute == "selective",
        f"parallel.recompute=selective is not proven with {chosen}; use none or full {way_out}",
    )
    refuse(
        config.train.precision == "fp8",
        f"train.precision=fp8 is not proven with {chosen}; use bf16 {way_out}",
    )
    refuse(
        config.moe.pool < cells,
        f"{chosen} gives each of parallel.pipeline_parallel={p.pipeline_parallel} x parallel.expert_parallel="
        f"{p.expert_parallel} = {cells} cells a part of the pool, but moe.pool={config.moe.pool} is smaller; lower a "
        f"degree {way_out}",
    )


def _check_pool_optimizer(config: Config) -> None:
    p, o = config.parallel, config.optim
    refuse(
        p.host_state != "fp32" and p.pool_optimizer != "host",
        f"parallel.host_state={p.host_state} is only for parallel.pool_optimizer=host; remove it or set fp32",
    )
    refuse(
        p.replace_interval > 0 and p.pool_optimizer == "host",
        f"parallel.replace_interval={p.replace_interval} is not proven with parallel.pool_optimizer=host; set 0 or "
        f"use parallel.pool_optimizer=device",
    )
    for name, beta in (("beta1", o.beta1), ("beta2", o.beta2)):
        # bf16 keeps 8 bits: rounding to nearest undoes a change of less than 1/256, such as a decay by beta > 0.996.
        refuse(
            p.host_state == "bf16" and beta > 0.99,
            f"optim.{name}={beta} changes Adam's moments by less than parallel.host_state=bf16 resolves; lower it to "
            f"at most 0.99 or set parallel.host_state=fp32",
        )


def _check_world(config: Config, world: int) -> None:
    p, t = config.parallel, config.train
    try:
        mesh = build_mesh(world, p)
        place_pool(config, mesh, measured_use(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    share = t.micro_batch_size * mesh.data
    refuse(
        t.global_batch_size % share != 0,
        f"train.global_batch_size={t.global_batch_size} is not divisible by train.micro_batch_size="
        f"{t.micro_batch_size} x {mesh.data} data-parallel ranks = {share} ({world} processes); change one",
    )
    microbatches = t.global_batch_size // share
    refuse(
        p.virtual_stages > 1 and microbatches % p.pipeline_parallel != 0,
        f"{microbatches} microbatches a step are not divisible by parallel.pipeline_parallel={p.pipeline_parallel}, "
        f"which the interleaved schedule (parallel.virtual_stages={p.virtual_stages}) needs; change "
        f"train.global_batch_size or train.micro_batch_size, or set virtual_stages=1",
    )
