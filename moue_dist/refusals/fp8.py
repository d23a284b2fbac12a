"""FP8: sizes that its products refuse, and what is not proven with it. Free of torch."""

from __future__ import annotations

from moue_dist.config import Config, refuse
from moue_dist.kernels.sizes import unit_of


def check_fp8(config: Config, recipe: str | None, experts: str) -> None:
    """What FP8 by this recipe of Transformer Engine (None: no FP8) and with these experts cannot do."""
    if recipe is None:
        return
    _check_sizes(config, recipe, experts)
    p = config.parallel
    refuse(
        p.recompute == "selective" and experts != "fp8",
        f"parallel.recompute=selective is not proven with train.precision=fp8 and moe.experts={experts}; use none or "
        f"full, or moe.experts=fp8 on a Hopper GPU",
    )
    if p.placement == "replicate":
        return
    chosen = f"train.precision=fp8 is not proven with parallel.placement={p.placement}"
    refuse(
        experts != "fp8",
        f"{chosen} and moe.experts={experts}; use bf16 or parallel.placement=replicate, or moe.experts=fp8 on a Hopper "
        f"GPU",
    )
    refuse(
        recipe != "blockwise",
        f"{chosen} and train.fp8_recipe={recipe}, whose scales two directions of a slot would share; use blockwise",
    )
    refuse(
        p.recompute == "full" and p.slots_behind % 2 == 1,
        f"{chosen} and parallel.recompute=full where a slot's two directions run side by side, since Transformer "
        f"Engine has one FP8 state for both; set parallel.lag=0 or recompute none",
    )


def _check_sizes(config: Config, recipe: str, experts: str) -> None:
    t, m, e = config.train, config.model, config.moe
    unit = {"mxfp8": 32, "blockwise": 128}.get(recipe, 16)
    tokens = m.sequence_length * t.micro_batch_size // config.parallel.tensor_parallel
    for label, value, multiple in (
        ("model.hidden_size", m.hidden_size, unit),
        ("moe.expert_width", e.expert_width, unit_of(experts, 2) if experts == "fp8" else unit),
        ("moe.shared_expert_width", e.shared_expert_width, unit),
        ("model.ffn_hidden_size", m.ffn_hidden_size or 4 * m.hidden_size, unit),
        ("tokens of a microbatch on one rank (model.sequence_length x train.micro_batch_size)", tokens, unit),
    ):
        refuse(
            value % multiple != 0,
            f"{label}={value} is not a multiple of {multiple}, which FP8 ({recipe}) needs; change it or use bf16",
        )
