"""`moue train CONFIG`: trains, in ranks that it starts itself or as one rank of a job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import CONFIG, OVERRIDES, add_command, load, positive

ABOUT = f"""\
Train a configuration. Under torchrun, srun or mpirun this is one rank; otherwise it starts the ranks itself, one for
each GPU, or on a CPU as few as the grid needs.

  moue train tiny
  moue train tiny --train.steps 20 --name short
  moue train debug_gpu --nproc 2 --parallel.expert-parallel 2
  torchrun --nproc-per-node 8 -m moue_dist train moue_7b

A run that has a checkpoint continues from its latest one. A new one can start from the weights of a converted model or
of another run:

  moue train models/mixtral/config.yaml --name mine --train.steps 1000
  moue train tiny --name again --train.start-from runs/tiny

{OVERRIDES}"""


def add_to(commands: Any) -> None:
    train = add_command(commands, "train", run, "train a configuration", ABOUT)
    train.add_argument("config", metavar="CONFIG", help=CONFIG)
    train.add_argument("--nproc", type=positive, metavar="N", help="ranks to start on this machine")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from moue_dist.checkpoint.description import start_of
    from moue_dist.cli.ranks import my_place, start_ranks

    config = load(args.config, overrides)
    if config.train.start_from:  # here, before ranks are there to find out
        start_of(config, Path(config.output).expanduser() / config.name)
    started = start_ranks(config, args.nproc, ["train", args.config, *overrides])
    if started is not None:
        return started
    from moue_dist.training import run as training

    return training.run(config, my_place(), after=_report)


def _report(run_dir: Path) -> None:
    from moue_dist.report.run_report import write_run_report

    print(f"report: {write_run_report(run_dir)}", flush=True)
