"""What the commands' parsers have in common: a command of `moue`, its numbers, its configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from moue_dist.config import Config, ConfigError

Run = Callable[[argparse.Namespace, list[str]], int]  # arguments and the options behind them -> exit code

CONFIG = "a YAML file, or the name of a shipped configuration"
OVERRIDES = """\
Any option of the configuration can be overridden: --section.key value, for example
  --train.steps 500 --parallel.pipeline-parallel 2 --model.tied-head true --parallel.stage-layers 3 1
`moue options` lists them all."""


def add_command(commands: Any, name: str, run: Run, short: str, text: str) -> argparse.ArgumentParser:
    """A parser of `moue NAME`; `commands` is what `add_subparsers` gave."""
    keep = argparse.RawDescriptionHelpFormatter
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=text, formatter_class=keep, allow_abbrev=False
    )
    made.set_defaults(run=run)
    return made


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, not {text!r}")
    return value


def load(path: str, overrides: list[str]) -> Config:
    """The configuration of a file or of a shipped name, changed by options; raises ConfigError."""
    from moue_dist.config.load import load_config
    from moue_dist.config.shipped import find_config

    if not find_config(path).exists() and any(word.endswith((".yaml", ".yml")) for word in overrides):
        raise ConfigError(f"the configuration file comes first, then the options; {path!r} is no file")
    return load_config(path, overrides)


def no_more(overrides: list[str]) -> None:
    """Raises ConfigError where words are left over for a command that takes no options of a configuration."""
    if overrides:
        raise ConfigError(f"unexpected {overrides[0]!r}")
