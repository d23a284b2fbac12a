"""`moue options`: every option of a configuration, with its default."""

from __future__ import annotations

import argparse
from typing import Any

from moue_dist.cli.arguments import add_command
from moue_dist.config import Config, ConfigError


def add_to(commands: Any) -> None:
    about = "Every option of a configuration, with its default."
    add_command(commands, "options", run, "every option of a configuration", about)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(f"unexpected {overrides[0]!r}")
    import tyro

    tyro.cli(Config, default=Config(), args=["--help"], prog="moue train CONFIG")
    return 0  # not reached: tyro exits after its help
