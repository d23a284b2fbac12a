"""Every refusal of a configuration, before anything starts; a file for each subject. Free of torch.

Each message names the options, says the numbers and the way out. What passes here is proven to work; what is not
proven is refused by name.
"""

from __future__ import annotations

from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.refusals.data import check_data
from moue_dist.refusals.layout import check_parallel, check_world
from moue_dist.refusals.machine import Resolved, resolve
from moue_dist.refusals.model import check_model
from moue_dist.refusals.moe import check_moe
from moue_dist.refusals.numbers import check_numbers
from moue_dist.refusals.placement import check_placement, check_pool_optimizer


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
    check_numbers(config)
    check_model(config)
    check_moe(config)
    check_data(config, cuda)
    check_parallel(config)
    check_placement(config)
    check_pool_optimizer(config)
    if world is not None:
        check_world(config, world)
    return resolve(config, cuda, device, transformer_engine)
