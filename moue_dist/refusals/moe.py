"""Pools, windows, routers and balance terms that cannot be, mean nothing or are not proven together."""

from __future__ import annotations

from moue_dist.config import Config, refuse


def check_moe(config: Config) -> None:
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
    _check_mask(config)
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


def _check_mask(config: Config) -> None:
    e, start, steps = config.moe, config.moe.mask_start, config.moe.mask_steps
    refuse(start > 0, f"moe.mask_start={start:g} would push tokens to hidden experts; use a number below 0")
    refuse(
        (start < 0) != (steps > 0),
        f"moe.mask_start={start:g} and moe.mask_steps={steps} go together: set both, such as -16 and 1000, or neither",
    )
    refuse(
        steps > 0 and not config.train.start_from,
        f"moe.mask_steps={steps} hides the experts that a converted model names, so it needs train.start_from; set 0",
    )
    refuse(
        steps > 0 and e.router not in ("softmax", "sigmoid"),
        f"moe.mask_steps={steps} is proven only with moe.router=softmax or sigmoid, not {e.router}; set it and "
        "moe.mask_start to 0",
    )
