"""`moue options`: every option of a configuration, with its default."""

from __future__ import annotations

import argparse
from typing import Any

from moue_dist.cli.arguments import CONFIG, add_command, no_more
from moue_dist.config import Config
from moue_dist.config.shipped import about_shipped


def add_to(commands: Any) -> None:
    about = "Every option of a configuration, with its default."
    add_command(commands, "options", run, "every option of a configuration", about)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    import tyro

    print(f"CONFIG is {CONFIG}.\n{about_shipped()}\n")
    tyro.cli(Config, default=Config(), args=["--help"], prog="moue train CONFIG")
    return 0  # not reached: tyro exits after its help
