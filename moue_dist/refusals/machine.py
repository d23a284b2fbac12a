"""What a configuration's `auto` options become on a given machine, and what that machine cannot do. Free of torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from moue_dist.config import Config, refuse
from moue_dist.config.devices import Device, fp8_recipes
from moue_dist.kernels.sizes import check_sizes, sizes_fit


class Resolved(NamedTuple):
    """What the `auto` options become on a given machine."""

    device: Literal["cpu", "cuda"]
    transformer_engine: bool
    experts: Literal["loop", "torch", "te"]
    fp8_recipe: str | None
    merge_wgrad: int = 1
    dispatch: Literal["all_to_all", "gathered", "lockstep"] = "all_to_all"


MERGED = 4  # layers: what halves the time of weight gradients on an H200 at 256 rows an expert (docs/log.md)


def resolve(config: Config, cuda: bool, device: Device | None, te_installed: bool) -> Resolved:
    t = config.train
    refuse(
        t.device == "cuda" and not cuda,
        "train.device=cuda, but this machine shows no CUDA device; set train.device=auto or cpu, or look at nvidia-smi",
    )
    where: Literal["cpu", "cuda"] = "cuda" if cuda and t.device != "cpu" else "cpu"
    refuse(
        t.transformer_engine == "on" and where == "cpu",
        "train.transformer_engine=on needs a GPU; set it to auto or off",
    )
    refuse(
        t.transformer_engine == "on" and not te_installed,
        "train.transformer_engine=on, but Transformer Engine is not installed; install the extra 'gpu' or set auto",
    )
    te = where == "cuda" and te_installed and t.transformer_engine != "off"
    recipe = _fp8_recipe(config, where, device, te) if t.precision == "fp8" else None
    refuse(
        t.precision != "fp8" and t.fp8_recipe != "auto",
        f"train.fp8_recipe={t.fp8_recipe} is only for train.precision=fp8, not {t.precision}; set it to auto",
    )
    experts = _experts(config, where, te)
    return Resolved(where, te, experts, recipe, _merge_wgrad(config, where, experts), _dispatch(config, experts))


def _merge_wgrad(config: Config, where: str, experts: str) -> int:
    """Layers whose expert weight gradients are added in one pass: several only where layers share experts."""
    asked = config.moe.merge_wgrad
    refuse(
        asked > 1 and experts == "te",
        f"moe.merge_wgrad={asked}: Transformer Engine adds each layer's gradients itself; set it to 0, or "
        "moe.experts=torch",
    )
    if asked:
        return asked
    shared = config.moe_layers * config.topology().window > config.moe.pool
    return MERGED if where == "cuda" and experts == "torch" and shared else 1


def _dispatch(config: Config, experts: str) -> Literal["all_to_all", "gathered", "lockstep"]:
    """Tokens once a rank where that moves no more than the rows would, one by one; lock step for experts at home."""
    asked, placement = config.moe.dispatch, config.parallel.placement
    if placement != "replicate":
        refuse(
            asked != "auto",
            f"moe.dispatch={asked} is for parallel.placement=replicate; {placement} has an exchange of its own: set it "
            "to auto",
        )
        return "lockstep"
    refuse(
        asked == "gathered" and experts == "te",
        "moe.dispatch=gathered keeps the number of rows on the device, but moe.experts=te needs it on the host; set "
        "moe.dispatch=auto or moe.experts=torch",
    )
    if asked != "auto":
        return asked
    return "gathered" if experts != "te" and config.parallel.expert_parallel <= config.moe.top_k else "all_to_all"


def _fp8_recipe(config: Config, where: str, device: Device | None, te: bool) -> str:
    t, m, e = config.train, config.model, config.moe
    refuse(where == "cpu", "train.precision=fp8 needs a GPU that computes in FP8; use fp32 or bf16 on a CPU")
    name = device.name if device else "this GPU"
    able = fp8_recipes(device.capability) if device else ()
    refuse(
        not able,
        f"train.precision=fp8: {name} does not compute in FP8 (compute capability 8.9 or newer does); use bf16",
    )
    refuse(
        not te,
        "train.precision=fp8 is computed by Transformer Engine: install the extra 'gpu' and leave "
        "train.transformer_engine at auto, or use bf16",
    )
    recipe = able[0] if t.fp8_recipe == "auto" else t.fp8_recipe
    refuse(
        recipe not in able,
        f"train.fp8_recipe={recipe} is not one that {name} computes ({', '.join(able)}); set it to auto",
    )
    refuse(
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
        refuse(
            value % unit != 0,
            f"{label}={value} is not a multiple of {unit}, which FP8 ({recipe}) needs; change it or use bf16",
        )
    return recipe


def _experts(config: Config, where: str, te: bool) -> Literal["loop", "torch", "te"]:
    e, precision = config.moe, config.train.precision
    bytes_a_number = 4 if precision == "fp32" else 2
    sizes = config.model.hidden_size, e.expert_width, bytes_a_number
    if e.experts == "auto":
        if precision == "fp8":
            return "te"
        return "torch" if where == "cuda" and precision == "bf16" and sizes_fit("torch", *sizes) else "loop"
    refuse(
        precision == "fp8" and e.experts != "te",
        f"moe.experts={e.experts} cannot compute in FP8; use moe.experts=te or train.precision=bf16",
    )
    refuse(
        e.experts == "te" and (where == "cpu" or precision == "fp32"),
        "moe.experts=te needs a GPU and train.precision=bf16 or fp8; use moe.experts=loop here",
    )
    refuse(
        e.experts == "te" and not te,
        "moe.experts=te is computed by Transformer Engine: install the extra 'gpu' and leave train.transformer_engine "
        "at auto, or set moe.experts=torch",
    )
    refuse(
        e.experts == "torch" and where == "cuda" and precision == "fp32",
        "moe.experts=torch computes in bf16 on a GPU; set train.precision=bf16 or moe.experts=loop",
    )
    check_sizes(e.experts, *sizes)
    return e.experts
