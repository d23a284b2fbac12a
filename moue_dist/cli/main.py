"""`moue` = `python -m moue_dist`: finds the command, runs it, says what is refused."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from moue_dist import __version__
from moue_dist.cli import bench, data, options, plan, report, train
from moue_dist.cli.models import convert, evaluate, export, generate
from moue_dist.config import BAD_CONFIGURATION, ConfigError
from moue_dist.config.shipped import about_shipped

_MAIN = """\
Trains Mixture of Universal Experts: a language model whose MoE layers share one pool of experts, over every layer
and pipeline stage.

  moue plan tiny            what would run, and whether it fits
  moue train tiny           run it
  moue data prepare text/   tokenize text of yours
  moue bench step tiny      time the training step
  moue convert MODEL OUT    a Hugging Face model to train on from
  moue report runs/tiny     one HTML page about one or several runs
  moue export runs/tiny OUT the model as a Hugging Face folder
  moue generate runs/tiny --prompt "def main("
  moue eval runs/tiny       how well it predicts text
  moue options              every option of a configuration, with its default"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad configuration or usage, explained in one line on stderr)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["report"]:  # it has a parser of its own
        return _refusable(lambda: report.main(args[1:]))
    parser = _parser()
    known, overrides = parser.parse_known_args(args)
    if "run" not in known:
        parser.print_help()
        return BAD_CONFIGURATION
    return _refusable(lambda: known.run(known, overrides))


def _parser() -> argparse.ArgumentParser:
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="moue", description=f"{_MAIN}\n\n{about_shipped()}", formatter_class=keep, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (train, data, plan, bench, convert, export, generate, evaluate, options):
        command.add_to(commands)
    commands.add_parser("report", help="an HTML page about one or several runs", add_help=False)
    return parser


def _refusable(run: Callable[[], int]) -> int:
    try:
        return run()
    except ConfigError as error:
        if _first_rank():  # all ranks find the same; one says it
            print(f"moue: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `moue plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _first_rank() -> bool:
    from moue_dist.launchers.env import read_env

    try:
        return read_env().rank == 0
    except ConfigError:
        return True
