"""How an earlier run used the pool, for the placement of another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moue_dist.config import Config, ConfigError, refuse
from moue_dist.parallel.costs import Floats
from moue_dist.report.runs import read_run

OPTION = "parallel.measured_use"


def measured_use(config: Config) -> Floats | None:
    """Tokens that each MoE layer sent to each expert, [L, P], by the newest count of the run `parallel.measured_use`.

    None where the option is empty. Counts belong to layers and experts alone, so the run may have had another layout
    or placement. Raises ConfigError where the folder holds no count, or one of another model.
    """
    if not config.parallel.measured_use:
        return None
    try:
        run = read_run(Path(config.parallel.measured_use).expanduser())
    except ConfigError as error:
        raise ConfigError(f"{OPTION}: {error}") from None
    refuse(
        not run.usage,
        f"{OPTION}={run.folder}: that run has not counted any use yet, which it does at its validations and at its "
        f"end; name another run, or leave the option out",
    )
    counts = np.asarray(run.usage[-1]["counts"], dtype=np.float64)
    wanted = (config.moe_layers, config.moe.pool)
    refuse(
        counts.shape != wanted,
        f"{OPTION}={run.folder}: counts of {counts.shape[0]} MoE layers and {counts.shape[1]} experts do not fit the "
        f"{wanted[0]} MoE layers and moe.pool={wanted[1]} of this model; name a run of the same model",
    )
    for layer, window in enumerate(config.topology().windows):
        refuse(
            bool(np.delete(counts[layer], list(window)).any()),
            f"{OPTION}={run.folder}: MoE layer {layer + 1} sent tokens to experts outside of the window that it has "
            f"here; name a run with the same moe.topology, moe.window, moe.stride and moe.group",
        )
    return counts
