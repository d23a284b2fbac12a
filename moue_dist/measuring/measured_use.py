"""How an earlier run used the pool, for the placement of another one."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from moue_dist.config import Config, ConfigError, refuse
from moue_dist.measuring.run_folder import read_run
from moue_dist.parallel.placement.costs import Floats

OPTION = "parallel.measured_use"


def measured_use(config: Config) -> Floats | None:
    """Tokens that each MoE layer sent to each expert, [L, P], by the newest count of the run `parallel.measured_use`.

    None where the option is empty. Counts belong to layers and experts alone, so the run may have had another layout
    or placement. Raises ConfigError where the folder holds no count, or one of another model.
    """
    if not config.parallel.measured_use:
        return None
    folder = Path(config.parallel.measured_use).expanduser()
    counts = _newest_counts(folder, _state_of(folder / "metrics.jsonl"))
    if counts is None:
        raise ConfigError(
            f"{OPTION}={folder}: that run has not counted any use yet, which it does at its validations and at its "
            f"end; name another run, or leave the option out",
        )
    wanted = (config.moe_layers, config.moe.pool)
    refuse(
        counts.shape != wanted,
        f"{OPTION}={folder}: counts of {counts.shape[0]} MoE layers and {counts.shape[1]} experts do not fit the "
        f"{wanted[0]} MoE layers and moe.pool={wanted[1]} of this model; name a run of the same model",
    )
    for layer, window in enumerate(config.topology().windows):
        refuse(
            bool(np.delete(counts[layer], list(window)).any()),
            f"{OPTION}={folder}: MoE layer {layer + 1} sent tokens to experts outside of the window that it has "
            f"here; name a run with the same moe.topology, moe.window, moe.stride and moe.group",
        )
    return counts


@functools.lru_cache(maxsize=1)
def _newest_counts(folder: Path, state: object) -> Floats | None:
    """Of a long run these are many megabytes to read, and a plan that does not fit asks for each change it tries."""
    try:
        usage = read_run(folder).usage
    except ConfigError as error:
        raise ConfigError(f"{OPTION}: {error}") from None
    if not usage:
        return None
    counts = np.asarray(usage[-1]["counts"], dtype=np.float64)
    counts.flags.writeable = False  # all who ask get the same
    return counts


def _state_of(file: Path) -> tuple[int, int] | None:
    """Changes when the file does."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
