"""Whether this process is a rank or starts them, and how many this machine gets."""

from __future__ import annotations

import os
import sys
from typing import Any

from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import Device
from moue_dist.launchers.env import ProcessEnv, export, read_env, set_defaults


def alone() -> bool:
    """Whether nobody started this process as a rank of several."""
    return read_env().source == "single"


def my_place() -> ProcessEnv:
    """This rank's place, also in the variables that torch.distributed reads."""
    place = read_env()
    set_defaults(place.local_world_size)
    export(place)
    return place


def start_ranks(config: Config, asked: int | None, words: list[str], *, always: bool = False) -> int | None:
    """Run `moue WORDS` in ranks on this machine and return its exit code; None where this process is a rank itself.

    A single rank is this process, too, unless `always`.
    """
    place = read_env()
    if place.source != "single":
        if asked is not None:
            raise ConfigError(f"--nproc {asked}: the ranks were already started by {place.source}; leave it out")
        return None
    ranks, on_cpu = _ranks_here(config, asked)
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks then see a machine without GPUs
    if ranks == 1 and not always:
        return None
    from moue_dist.launchers.local import launch_module

    return launch_module("moue_dist", words, ranks)


def _ranks_here(config: Config, asked: int | None) -> tuple[int, bool]:
    """How many ranks to start, and whether to leave the GPUs alone. Refuses, once, what every rank would refuse."""
    from moue_dist.parallel.mesh import smallest_world
    from moue_dist.refusals.validate import validate

    device, gpus = (None, 0) if config.train.device == "cpu" else _gpus()
    facts: dict[str, Any] = {"cuda": gpus > 0, "device": device}
    if gpus:
        from moue_dist.kernels.backend import has_transformer_engine

        facts["transformer_engine"] = has_transformer_engine()
    validate(config, None, **facts)
    least = smallest_world(config.parallel)
    choice = config.train.device == "auto" and config.train.precision == "fp32"
    if 0 < gpus < (asked or least) and choice:
        print(f"moue: {gpus} GPU(s) for {asked or least} ranks are too few: training on the CPU", file=sys.stderr)
        validate(config, asked or least, cuda=False)
        return asked or least, True
    ranks = asked or gpus or least
    if 0 < gpus < ranks:
        raise ConfigError(f"--nproc {ranks} is more than the {gpus} GPUs here; lower it, or set train.device=cpu")
    validate(config, ranks, **facts)
    return ranks, config.train.device == "cpu"


def _gpus() -> tuple[Device | None, int]:
    """The first GPU's description and their number."""
    import torch

    from moue_dist.config.devices import describe_device

    if not torch.cuda.is_available():
        return None, 0
    facts = torch.cuda.get_device_properties(0)
    device = describe_device(facts.name, (facts.major, facts.minor), facts.total_memory / 2**30)
    return device, torch.cuda.device_count()
