"""Numbers out of their bounds, and numbers of training that contradict each other."""

from __future__ import annotations

import dataclasses
import math

from moue_dist.config import Config, refuse

# The least allowed value of every number; True: strictly above it.
_LEAST: dict[str, tuple[float, bool]] = {
    **{f"model.{k}": (1, False) for k in ("layers", "hidden_size", "heads", "sequence_length")},
    **{f"model.{k}": (0, False) for k in ("kv_heads", "ffn_hidden_size", "dense_layers", "init_std")},
    **{f"model.{k}": (0, False) for k in ("head_dim", "clip_qkv")},
    **{f"model.{k}": (0, True) for k in ("rope_base", "norm_eps")},
    "model.vocab_size": (256, False),
    **{f"moe.{k}": (1, False) for k in ("pool", "top_k", "expert_width", "group", "state_width")},
    **{f"moe.{k}": (0, False) for k in ("window", "stride", "state_decay", "shared_expert_width", "merge_wgrad")},
    "moe.mask_steps": (0, False),
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


def check_numbers(config: Config) -> None:
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
