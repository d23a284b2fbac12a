"""Every refusal of a configuration, in one place and before anything starts. Free of torch.

Each message names the options, says the numbers and the way out. What passes here is proven to work; what is not
proven is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from moue_dist.config import Config, ConfigError
from moue_dist.devices import Device, fp8_recipes
from moue_dist.parallel.costs import ExpertBytes, Floats
from moue_dist.parallel.mesh import Mesh, build_mesh, layers_of_rank, stage_layout
from moue_dist.parallel.placement import Placement
from moue_dist.parallel.planner import plan_placement


class Resolved(NamedTuple):
    """What the `auto` options become on a given machine."""

    device: Literal["cpu", "cuda"]
    transformer_engine: bool
    experts: Literal["loop", "torch", "te"]
    fp8_recipe: str | None


# The least allowed value of every number; True: strictly above it.
_LEAST: dict[str, tuple[float, bool]] = {
    **{f"model.{k}": (1, False) for k in ("layers", "hidden_size", "heads", "sequence_length")},
    **{f"model.{k}": (0, False) for k in ("kv_heads", "ffn_hidden_size", "dense_layers", "init_std")},
    **{f"model.{k}": (0, True) for k in ("rope_base", "norm_eps")},
    "model.vocab_size": (256, False),
    **{f"moe.{k}": (1, False) for k in ("pool", "top_k", "expert_width", "group", "state_width")},
    **{f"moe.{k}": (0, False) for k in ("window", "stride", "state_decay", "shared_expert_width")},
    "moe.route_scale": (0, True),
    **{f"balance.{k}": (0, False) for k in ("uelb", "pool", "layer", "bias", "z_loss")},
    **{
        f"parallel.{k}": (1, False)
        for k in ("pipeline_parallel", "virtual_stages", "expert_parallel", "tensor_parallel")
    },
    **{f"parallel.{k}": (0, False) for k in ("pool_budget_gib", "replace_interval", "lag")},
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
    return _resolve(config, cuda, device, transformer_engine)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_numbers(config: Config) -> None:
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for key, value in ({} if isinstance(part, str) else vars(part)).items():
            name = f"{section.name}.{key}"
            if isinstance(value, float):
                _refuse(not math.isfinite(value), f"{name}={value} must be a finite number")
            if name in _LEAST:
                least, above = _LEAST[name]
                _refuse(value < least or (above and value == least), f"{name}={value} must be {_bound(least, above)}")
    o, t = config.optim, config.train
    for name, value in (("beta1", o.beta1), ("beta2", o.beta2)):
        _refuse(value >= 1, f"optim.{name}={value} must be below 1")
    _refuse(config.moe.state_decay > 1, f"moe.state_decay={config.moe.state_decay} must be at most 1")
    _refuse(config.data.valid_percent >= 100, f"data.valid_percent={config.data.valid_percent} must be below 100")
    _refuse(o.min_lr > o.lr, f"optim.min_lr={o.min_lr} is larger than optim.lr={o.lr}; lower it")
    _refuse(
        o.decay_steps > t.steps,
        f"optim.decay_steps={o.decay_steps} is longer than train.steps={t.steps}; shorten the decay",
    )
    _refuse(
        o.decay_steps > 0 and o.schedule != "wsd",
        f"optim.decay_steps={o.decay_steps} is only for optim.schedule=wsd; remove it or set 0",
    )
    _refuse(not config.name or "/" in config.name, f"name={config.name!r} must be one folder's name; output says where")


def _bound(least: float, above: bool) -> str:
    return f"above {least:g}" if above else f"at least {least:g}"


def _check_model(config: Config) -> None:
    m, tp = config.model, config.parallel.tensor_parallel
    groups = m.kv_heads or m.heads
    _refuse(
        m.hidden_size % m.heads != 0 or m.hidden_size // m.heads % 2 != 0,
        f"model.hidden_size={m.hidden_size} over model.heads={m.heads} must give an even whole head width (RoPE turns "
        f"pairs); change one",
    )
    _refuse(m.rope_base != int(m.rope_base), f"model.rope_base={m.rope_base} must be a whole number")
    _refuse(m.heads % groups != 0, f"model.kv_heads={m.kv_heads} does not divide model.heads={m.heads}; use a divisor")
    _refuse(
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
        _refuse(
            value % tp != 0,
            f"{name}={value} is not divisible by parallel.tensor_parallel={tp}, over which it is split; change one",
        )


def _check_moe(config: Config) -> None:
    e, b = config.moe, config.balance
    if e.topology != "rotational":
        for name, value in (("window", e.window), ("stride", e.stride)):
            _refuse(
                value != 0,
                f"moe.{name}={value} is only for moe.topology=rotational, not {e.topology}; remove it or set 0",
            )
    _refuse(
        e.group != 1 and e.topology in ("private", "full"),
        f"moe.group={e.group} is only for moe.topology=block or rotational, not {e.topology}; remove it or set 1",
    )
    topology = config.topology()
    unseen = topology.exposure.count(0)
    _refuse(
        unseen > 0,
        f"{unseen} of the {e.pool} experts of moe.pool are seen by no layer: enlarge moe.window={e.window} or "
        f"moe.stride={e.stride}, or shrink moe.pool",
    )
    _refuse(
        e.top_k > topology.window,
        f"moe.top_k={e.top_k} is larger than the window of {topology.window} experts that a layer sees "
        f"(moe.topology={e.topology}); lower moe.top_k or widen the window",
    )
    if e.router != "softmax":
        _refuse(
            e.score != "softmax_topk",
            f"moe.score={e.score} is only for moe.router=softmax, not {e.router}; set moe.score=softmax_topk",
        )
        _refuse(
            e.renormalise,
            f"moe.renormalise is only for moe.router=softmax, not {e.router}; set moe.renormalise=false",
        )
    _refuse(
        e.score == "topk_softmax" and e.renormalise,
        "moe.renormalise has no effect with moe.score=topk_softmax, whose weights sum to 1; set moe.renormalise=false",
    )
    _refuse(
        b.bias > 0 and e.router not in ("softmax", "sigmoid"),
        f"balance.bias={b.bias} (loss-free bias) is proven only with moe.router=softmax or sigmoid, not {e.router}; "
        f"set balance.bias=0 and use balance.uelb",
    )
    _refuse(
        e.force_balance and any((b.uelb, b.pool, b.layer, b.bias)),
        "moe.force_balance routes at random for benchmarks, so balance terms mean nothing; set balance.uelb, "
        "balance.pool, balance.layer and balance.bias to 0",
    )


def _check_parallel(config: Config) -> None:
    p, e = config.parallel, config.moe
    _refuse(
        e.pool % p.expert_parallel != 0,
        f"moe.pool={e.pool} is not divisible by parallel.expert_parallel={p.expert_parallel}; change one",
    )
    _refuse(
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
        _refuse(
            bool(held and empty),
            f"pipeline stage {stage} sees {len(held)} experts, so with parallel.expert_parallel={p.expert_parallel} "
            f"{len(empty)} of its expert ranks would hold none; lower expert_parallel or widen the window",
        )


def check_placement(config: Config) -> None:
    """What experts at home cannot do, or what is not proven with them."""
    p, cells = config.parallel, config.parallel.pipeline_parallel * config.parallel.expert_parallel
    chosen, way_out = f"parallel.placement={p.placement}", "or use parallel.placement=replicate"
    _refuse(
        p.pool_budget_gib > 0 and p.placement != "hybrid",
        f"parallel.pool_budget_gib={p.pool_budget_gib:g} is for parallel.placement=hybrid, not {p.placement}; set 0",
    )
    if p.placement == "replicate":
        for name, value in (("replace_interval", p.replace_interval), ("lag", p.lag)):
            _refuse(value > 0, f"parallel.{name}={value} is only for parallel.placement=home or hybrid; set 0")
        return
    _refuse(
        p.placement == "hybrid" and p.pool_budget_gib == 0,
        "parallel.placement=hybrid needs parallel.pool_budget_gib: the GiB that a GPU may spend on the pool "
        "(weights, gradients, optimizer state); `moue plan` prints what home and replicate take",
    )
    _refuse(
        p.virtual_stages > 1,
        f"{chosen} runs in lock step, which interleaved stages (parallel.virtual_stages={p.virtual_stages}) do not; "
        f"set virtual_stages=1 {way_out}",
    )
    _refuse(
        p.recompute == "selective",
        f"parallel.recompute=selective is not proven with {chosen}; use none or full {way_out}",
    )
    _refuse(
        config.train.precision == "fp8",
        f"train.precision=fp8 is not proven with {chosen}; use bf16 {way_out}",
    )
    _refuse(
        config.moe.pool < cells,
        f"{chosen} gives each of parallel.pipeline_parallel={p.pipeline_parallel} x parallel.expert_parallel="
        f"{p.expert_parallel} = {cells} cells a part of the pool, but moe.pool={config.moe.pool} is smaller; lower a "
        f"degree {way_out}",
    )


def _check_pool_optimizer(config: Config) -> None:
    p, o = config.parallel, config.optim
    _refuse(
        p.host_state != "fp32" and p.pool_optimizer != "host",
        f"parallel.host_state={p.host_state} is only for parallel.pool_optimizer=host; remove it or set fp32",
    )
    _refuse(
        p.replace_interval > 0 and p.pool_optimizer == "host",
        f"parallel.replace_interval={p.replace_interval} is not proven with parallel.pool_optimizer=host; set 0 or "
        f"use parallel.pool_optimizer=device",
    )
    _refuse(
        p.pool_optimizer == "host" and p.replace_interval > 0,
        f"parallel.replace_interval={p.replace_interval} is not proven with parallel.pool_optimizer=host; set "
        f"replace_interval=0 or pool_optimizer=device",
    )
    for name, beta in (("beta1", o.beta1), ("beta2", o.beta2)):
        # bf16 keeps 8 bits: rounding to nearest undoes a change of less than 1/256, such as a decay by beta > 0.996.
        _refuse(
            p.host_state == "bf16" and beta > 0.99,
            f"optim.{name}={beta} changes Adam's moments by less than parallel.host_state=bf16 resolves; lower it to "
            f"at most 0.99 or set parallel.host_state=fp32",
        )


def moe_window(config: Config, windows: tuple[tuple[int, ...], ...], layer: int) -> tuple[int, ...]:
    """The experts that 0-based layer `layer` of the whole model sees; () for a dense layer."""
    index = layer - config.model.dense_layers
    return windows[index] if index >= 0 else ()


def _check_world(config: Config, world: int) -> None:
    p, t = config.parallel, config.train
    try:
        mesh = build_mesh(world, p)
        place_pool(config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    share = t.micro_batch_size * mesh.data
    _refuse(
        t.global_batch_size % share != 0,
        f"train.global_batch_size={t.global_batch_size} is not divisible by train.micro_batch_size="
        f"{t.micro_batch_size} x {mesh.data} data-parallel ranks = {share} ({world} processes); change one",
    )
    microbatches = t.global_batch_size // share
    _refuse(
        p.virtual_stages > 1 and microbatches % p.pipeline_parallel != 0,
        f"{microbatches} microbatches a step are not divisible by parallel.pipeline_parallel={p.pipeline_parallel}, "
        f"which the interleaved schedule (parallel.virtual_stages={p.virtual_stages}) needs; change "
        f"train.global_batch_size or train.micro_batch_size, or set virtual_stages=1",
    )


def place_pool(config: Config, mesh: Mesh, use: Sequence[Sequence[float]] | Floats | None = None) -> Placement:
    """Which stages and expert ranks hold which experts in this run.

    `use[l][e]` are the tokens that MoE layer l routed to expert e, where they were measured. Pure and deterministic:
    every rank finds the same. Raises ValueError where the budget is too small or `use` does not fit the topology.
    """
    p = config.parallel
    return plan_placement(
        p.placement,
        config.topology().windows,
        stages_of_moe_layers(config, mesh),
        config.moe.pool,
        mesh.pipeline,
        mesh.expert,
        use=use,
        expert_bytes=expert_bytes(config),
        budget_bytes=round(p.pool_budget_gib * 2**30),
        expert_data=mesh.expert_data,
    )


def stages_of_moe_layers(config: Config, mesh: Mesh) -> tuple[int, ...]:
    """The pipeline rank of each MoE layer."""
    layout = stage_layout(config.model.layers, mesh.pipeline, mesh.virtual, config.parallel.stage_layers)
    stage_of = {layer: i % mesh.pipeline for i, stage in enumerate(layout) for layer in stage}
    return tuple(stage_of[i] for i in range(config.model.dense_layers, config.model.layers))


def expert_bytes(config: Config) -> ExpertBytes:
    """Bytes of one expert on GPUs: two fp32 moments and, unless the weight is fp32 itself, an fp32 master copy."""
    fp32 = config.train.precision == "fp32"
    on_device = config.parallel.pool_optimizer == "device"
    return ExpertBytes(
        row=3 * config.model.hidden_size * config.moe.expert_width,
        weight=4 if fp32 else 2,
        gradient=4,
        optimizer=(8 if fp32 else 12) if on_device else 0,
    )


def _resolve(config: Config, cuda: bool, device: Device | None, te_installed: bool) -> Resolved:
    t = config.train
    _refuse(
        t.device == "cuda" and not cuda,
        "train.device=cuda, but this machine shows no CUDA device; set train.device=auto or cpu, or look at nvidia-smi",
    )
    where: Literal["cpu", "cuda"] = "cuda" if cuda and t.device != "cpu" else "cpu"
    _refuse(
        t.transformer_engine == "on" and where == "cpu",
        "train.transformer_engine=on needs a GPU; set it to auto or off",
    )
    _refuse(
        t.transformer_engine == "on" and not te_installed,
        "train.transformer_engine=on, but Transformer Engine is not installed; install the extra 'gpu' or set auto",
    )
    te = where == "cuda" and te_installed and t.transformer_engine != "off"
    recipe = _fp8_recipe(config, where, device, te) if t.precision == "fp8" else None
    _refuse(
        t.precision != "fp8" and t.fp8_recipe != "auto",
        f"train.fp8_recipe={t.fp8_recipe} is only for train.precision=fp8, not {t.precision}; set it to auto",
    )
    return Resolved(where, te, _experts(config, where, te), recipe)


def _fp8_recipe(config: Config, where: str, device: Device | None, te: bool) -> str:
    t, m, e = config.train, config.model, config.moe
    _refuse(where == "cpu", "train.precision=fp8 needs a GPU that computes in FP8; use fp32 or bf16 on a CPU")
    name = device.name if device else "this GPU"
    able = fp8_recipes(device.capability) if device else ()
    _refuse(
        not able,
        f"train.precision=fp8: {name} does not compute in FP8 (compute capability 8.9 or newer does); use bf16",
    )
    _refuse(
        not te,
        "train.precision=fp8 is computed by Transformer Engine: install the extra 'gpu' and leave "
        "train.transformer_engine at auto, or use bf16",
    )
    recipe = able[0] if t.fp8_recipe == "auto" else t.fp8_recipe
    _refuse(
        recipe not in able,
        f"train.fp8_recipe={recipe} is not one that {name} computes ({', '.join(able)}); set it to auto",
    )
    _refuse(
        config.parallel.recompute == "selective",
        "parallel.recompute=selective is not proven with train.precision=fp8; use none or full",
    )
    unit = {"mxfp8": 32, "blockwise": 128}.get(recipe, 16)
    tokens = m.sequence_length * t.micro_batch_size // config.parallel.tensor_parallel
    for label, value in (
        ("model.hidden_size", m.hidden_size),
        ("moe.expert_width", e.expert_width),
        ("moe.shared_expert_width", e.shared_expert_width),
        ("model.ffn_hidden_size", m.ffn_hidden_size or 4 * m.hidden_size),
        ("tokens of a microbatch on one rank (model.sequence_length x train.micro_batch_size)", tokens),
    ):
        _refuse(
            value % unit != 0,
            f"{label}={value} is not a multiple of {unit}, which FP8 ({recipe}) needs; change it or use bf16",
        )
    return recipe


def _experts(config: Config, where: str, te: bool) -> Literal["loop", "torch", "te"]:
    """The same choice as `kernels.backend.resolve_experts`, known before torch is imported."""
    e, precision = config.moe, config.train.precision
    bytes_a_number = 4 if precision == "fp32" else 2
    aligned = all(n * bytes_a_number % 16 == 0 for n in (config.model.hidden_size, e.expert_width))
    if e.experts == "auto":
        if precision == "fp8":
            return "te"
        return "torch" if where == "cuda" and precision == "bf16" and aligned else "loop"
    _refuse(
        precision == "fp8" and e.experts != "te",
        f"moe.experts={e.experts} cannot compute in FP8; use moe.experts=te or train.precision=bf16",
    )
    _refuse(
        e.experts == "te" and (where == "cpu" or precision == "fp32"),
        "moe.experts=te needs a GPU and train.precision=bf16 or fp8; use moe.experts=loop here",
    )
    _refuse(
        e.experts == "te" and not te,
        "moe.experts=te is computed by Transformer Engine: install the extra 'gpu' and leave train.transformer_engine "
        "at auto, or set moe.experts=torch",
    )
    _refuse(
        e.experts == "torch" and where == "cuda" and precision == "fp32",
        "moe.experts=torch computes in bf16 on a GPU; set train.precision=bf16 or moe.experts=loop",
    )
    _refuse(
        e.experts == "torch" and not aligned,
        f"moe.experts=torch needs model.hidden_size={config.model.hidden_size} and moe.expert_width={e.expert_width} "
        f"in multiples of {16 // bytes_a_number}; change them or use moe.experts=loop",
    )
    return e.experts
