"""What a configuration's `auto` options become on a given machine, and what that machine cannot do. Free of torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from moue_dist.config import Config, refuse
from moue_dist.config.devices import Device, fp8_recipes, grouped_fp8
from moue_dist.kernels.sizes import check_sizes, sizes_fit
from moue_dist.refusals.fp8 import check_fp8


class Resolved(NamedTuple):
    """What the `auto` options become on a given machine."""

    device: Literal["cpu", "cuda"]
    transformer_engine: bool
    experts: Literal["loop", "torch", "fp8", "te"]
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
    experts = _experts(config, where, te, device)
    check_fp8(config, recipe, experts)
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
    return MERGED if where == "cuda" and experts in ("torch", "fp8") and shared else 1


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
    t = config.train
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
    return recipe


def _experts(config: Config, where: str, te: bool, device: Device | None) -> Literal["loop", "torch", "fp8", "te"]:
    e, precision = config.moe, config.train.precision
    bytes_a_number = 4 if precision == "fp32" else 2
    sizes = config.model.hidden_size, e.expert_width, bytes_a_number
    scaled = device is not None and grouped_fp8(device.capability)
    if e.experts == "auto":
        if precision == "fp8":
            return "fp8" if scaled else "te"
        return "torch" if where == "cuda" and precision == "bf16" and sizes_fit("torch", *sizes) else "loop"
    refuse(
        precision == "fp8" and e.experts not in ("fp8", "te"),
        f"moe.experts={e.experts} cannot compute in FP8; use moe.experts=auto, fp8 or te, or train.precision=bf16",
    )
    refuse(
        e.experts == "fp8" and precision != "fp8",
        f"moe.experts=fp8 is for train.precision=fp8, not {precision}; use moe.experts=auto",
    )
    refuse(
        e.experts == "fp8" and not scaled,
        f"moe.experts=fp8 needs a Hopper GPU, which {device.name if device else 'this GPU'} is not; use moe.experts=te "
        "or train.precision=bf16",
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
