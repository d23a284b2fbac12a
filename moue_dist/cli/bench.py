"""`moue bench step|rank CONFIG`: times the training step, in ranks that it starts itself or as one rank of a job."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moue_dist.cli.arguments import CONFIG, OVERRIDES, add_command, count, load, positive
from moue_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from moue_dist.bench.options import BenchOptions

ABOUT = f"""\
Time our training step, and with --baseline megatron-core's own MoE of the same shape beside it, in one run on the
same batches. Starts its ranks as `moue train` does. Exit code 1 if a part failed. Here --output names the result's
file; benchmarks/README.md explains it. `moue bench rank` measures one rank of a larger layout alone on one GPU:
memory and compute are real, transfers take as long as the bytes need at --gbps, waiting for other ranks is left out.

  moue bench step plain_7b --baseline --train.global-batch-size 32 --train.micro-batch-size 4
  moue bench step tiny --baseline --output benchmarks/results/tiny.json --append
  moue bench step moue_7b --placements replicate,home,hybrid --train.global-batch-size 64
  moue bench rank moue_7b --world 64 --rank 9 --placements replicate,home

{OVERRIDES}"""


def add_to(commands: Any) -> None:
    bench = add_command(commands, "bench", run, "time the training step", ABOUT)
    bench.add_argument("what", choices=["step", "rank"], help="the step of all ranks, or one rank of many, alone")
    bench.add_argument("config", metavar="CONFIG", help=CONFIG)
    bench.add_argument("--nproc", type=positive, metavar="N", help="ranks to start on this machine")
    _add_options(bench)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `moue bench` hands to its ranks: BenchOptions' fields."""
    add = parser.add_argument
    add("--steps", type=positive, default=6, metavar="N", help="timed steps (default: 6)")
    add("--warmup", type=count, default=3, metavar="N", help="steps before (default: 3)")
    add("--baseline", action="store_true", help="measure megatron-core's own MoE, too, first")
    add("--baseline-only", action="store_true", help="measure nothing else")
    add("--baseline-grads", choices=["bf16", "fp32"], default="bf16", help="its gradient buffers (default: bf16)")
    add("--output", metavar="FILE", help="write all numbers to this JSON file")
    add("--append", action="store_true", help="add to the runs of that file")
    add("--join", action="store_true", help="add what is measured to that file's last run")
    add("--note", metavar="TEXT", help="kept with the numbers")
    add("--profile", action="store_true", help="one more step of each part under the profiler, on every rank")
    add("--placements", metavar="LIST", help="our step under several placements, such as replicate,home,hybrid")
    add("--part", help=argparse.SUPPRESS)
    add("--asked", help=argparse.SUPPRESS)
    add("--world", type=positive, default=1, metavar="N", help="rank: ranks of the layout that it belongs to")
    add("--rank", type=count, default=0, metavar="R", help="rank: which one of them is measured (default: 0)")
    add(
        "--gbps", type=float, default=278.0, metavar="GB", help="rank: GB/s out of a GPU (default: 278, NVLink of H200)"
    )
    add("--latency-us", type=float, default=70.0, metavar="US", help="rank: least time of a transfer (default: 70)")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from dataclasses import fields

    from moue_dist.bench.options import BenchOptions
    from moue_dist.cli.ranks import alone, my_place, start_ranks

    config = load(args.config, overrides)
    options = BenchOptions(**{field.name: getattr(args, field.name) for field in fields(BenchOptions)})
    if args.what == "rank":
        if not alone():
            raise ConfigError("moue bench rank is one process: start it without torchrun, srun or mpirun")
        if len(options.parts) == 1:
            from moue_dist.bench.alone.rank import run as run_rank

            return run_rank(config, options)
    if len(options.parts) > 1 and alone():
        return _apart(args, config, options, overrides)
    words = ["bench", args.what, args.config, *options.as_words(), *overrides]
    started = start_ranks(config, args.nproc, words)
    if started is not None:
        return started
    from moue_dist.bench.step.run import run as run_ranks

    return run_ranks(config, my_place(), options)


def _apart(args: argparse.Namespace, config: Config, options: BenchOptions, overrides: list[str]) -> int:
    """Every part in processes of its own."""
    import shlex
    import subprocess

    from moue_dist.bench.apart import measure_apart
    from moue_dist.cli.ranks import start_ranks

    def start(part: BenchOptions) -> int:
        words = ["bench", args.what, args.config, *part.as_words(), *overrides]
        if args.what == "rank":
            return subprocess.run([sys.executable, "-m", "moue_dist", *words]).returncode
        return start_ranks(config, args.nproc, words, always=True) or 0

    return measure_apart(options, shlex.join(["moue", *sys.argv[1:]]), start)
