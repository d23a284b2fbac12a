"""What a run is told: options, their types and files, topologies, known devices. Plain data, free of torch and for all.

Imports nothing of the project.
"""

from moue_dist.config.errors import BAD_CONFIGURATION, ConfigError, refuse
from moue_dist.config.options import (
    BalanceConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "BAD_CONFIGURATION",
    "BalanceConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "refuse",
]
