"""`moue bench FORM CONFIG`: times training or a part of it, in ranks that it starts itself or as one rank of a job."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moue_dist.cli.arguments import CONFIG, OVERRIDES, add_command, count, load, positive
from moue_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from moue_dist.bench.options import BenchOptions

ABOUT = f"""\
Time a part of training beside what else could do it, in one command, on the same inputs. Every number goes into the
JSON record that --output names; benchmarks/README.md explains it. Exit code 1 if a part failed, or if two ways that
should compute the same do not. Python's garbage collector is off in timed parts, for both sides alike.

step: our training step, and with --baseline megatron-core's own MoE of the same shape. Starts its ranks as `moue
train` does, or is one rank of a job, as are dispatch and layer. --profile: where one more step goes.

  moue bench step plain_7b --baseline --profile --train.global-batch-size 32 --train.micro-batch-size 4
  moue bench step tiny --baseline --output benchmarks/results/tiny.json --append
  moue bench step moue_7b --placements replicate,home,hybrid --train.global-batch-size 64

rank: one rank of a larger layout alone on one GPU. Memory and compute are real, transfers take as long as the bytes
need at --gbps, waiting for other ranks is left out.

  moue bench rank moue_7b --world 64 --rank 9 --placements replicate,home

kernels: the kernels of one rank alone on one GPU, at the sizes that the configuration gives a microbatch, each beside
another way of the same: a loop of matmuls, plain PyTorch, Transformer Engine where it is installed. On a CPU the
references, at small sizes.

  moue bench kernels moue_7b --train.micro-batch-size 4 --parallel.expert-parallel 2

dispatch: the data movement of one MoE layer, forward and backward, without expert products: tokens once a rank
(gathered) and rows one by one (all_to_all).

  moue bench dispatch plain_7b --parallel.expert-parallel 2 --train.micro-batch-size 4

{OVERRIDES}"""

STEPS = ("steps", "warmup", "profile", "placements", "join")
BASELINE = ("baseline", "baseline_only", "baseline_grads")
LINK = ("world", "rank", "gbps", "latency_us")
ALL = ("output", "append", "note", "part", "asked")
OF_FORM: dict[str, tuple[str, ...]] = {  # the options of each form; others are refused
    "step": (*ALL, *STEPS, *BASELINE),
    "rank": (*ALL, *STEPS, *BASELINE, *LINK),
    "kernels": (*ALL, "samples"),
    "dispatch": (*ALL, "samples"),
}


def add_to(commands: Any) -> None:
    bench = add_command(commands, "bench", run, "time the training step, or a part of it", ABOUT)
    bench.add_argument("what", choices=list(OF_FORM), help="what is timed; see above")
    bench.add_argument("config", metavar="CONFIG", help=CONFIG)
    bench.add_argument("--nproc", type=positive, metavar="N", help="ranks to start on this machine")
    _add_options(bench)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `moue bench` hands to its ranks: BenchOptions' fields."""
    add = parser.add_argument
    add("--output", metavar="FILE", help="write all numbers to this JSON file")
    add("--append", action="store_true", help="add to the runs of that file")
    add("--note", metavar="TEXT", help="kept with the numbers")
    add("--part", help=argparse.SUPPRESS)
    add("--asked", help=argparse.SUPPRESS)

    add = parser.add_argument_group("step and rank").add_argument
    add("--steps", type=positive, default=6, metavar="N", help="timed steps (default: 6)")
    add("--warmup", type=count, default=3, metavar="N", help="steps before (default: 3)")
    add("--baseline", action="store_true", help="measure megatron-core's own MoE, too, first")
    add("--baseline-only", action="store_true", help="measure nothing else")
    add("--baseline-grads", choices=["bf16", "fp32"], default="bf16", help="its gradient buffers (default: bf16)")
    add("--profile", action="store_true", help="one more step of each part under the profiler, on every rank")
    add("--join", action="store_true", help="add what is measured to the last run of --output")
    add("--placements", metavar="LIST", help="our step under several placements, such as replicate,home,hybrid")

    add = parser.add_argument_group("rank").add_argument
    add("--world", type=positive, default=1, metavar="N", help="ranks of the layout that it belongs to")
    add("--rank", type=count, default=0, metavar="R", help="which one of them is measured (default: 0)")
    add("--gbps", type=float, default=278.0, metavar="GB", help="GB/s out of a GPU (default: 278, NVLink of H200)")
    add("--latency-us", type=float, default=70.0, metavar="US", help="least time of a transfer (default: 70)")

    add = parser.add_argument_group("kernels and dispatch").add_argument
    add("--samples", type=positive, default=20, metavar="N", help="of each way, in turns (default: 20)")


def _refuse_strangers(form: str, options: BenchOptions) -> None:
    """Options of another form would be ignored."""
    from dataclasses import fields

    for field in fields(options):
        if field.name not in OF_FORM[form] and getattr(options, field.name) != field.default:
            forms = " and ".join(name for name, known in OF_FORM.items() if field.name in known)
            raise ConfigError(f"--{field.name.replace('_', '-')} is for moue bench {forms}; leave it out of {form}")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from dataclasses import fields

    from moue_dist.bench.options import BenchOptions

    config = load(args.config, overrides)
    options = BenchOptions(**{field.name: getattr(args, field.name) for field in fields(BenchOptions)})
    _refuse_strangers(args.what, options)
    words = ["bench", args.what, args.config, *options.as_words(), *overrides]
    if args.what == "kernels":
        return _kernels(args, config, options)
    if args.what == "dispatch":
        return _layer(args, config, options, words)
    return _steps(args, config, options, words, overrides)


def _steps(
    args: argparse.Namespace, config: Config, options: BenchOptions, words: list[str], overrides: list[str]
) -> int:
    from moue_dist.cli.ranks import alone, my_place, start_ranks

    if args.what == "rank":
        if not alone():
            raise ConfigError("moue bench rank is one process: start it without torchrun, srun or mpirun")
        if len(options.parts) == 1:
            from moue_dist.bench.alone.rank import run as run_rank

            return run_rank(config, options)
    if len(options.parts) > 1 and alone():
        return _apart(args, config, options, overrides)
    started = start_ranks(config, args.nproc, words)
    if started is not None:
        return started
    from moue_dist.bench.step.run import run as run_ranks

    return run_ranks(config, my_place(), options)


def _kernels(args: argparse.Namespace, config: Config, options: BenchOptions) -> int:
    """In this process."""
    from moue_dist.cli.ranks import alone

    if not alone() or (args.nproc or 1) > 1:
        raise ConfigError("moue bench kernels is one process: start it without torchrun, srun or mpirun, and --nproc")
    from moue_dist.bench.kernels.run import run as run_kernels

    return run_kernels(config, options)


def _layer(args: argparse.Namespace, config: Config, options: BenchOptions, words: list[str]) -> int:
    """In the ranks of one stage."""
    from moue_dist.bench.layer.one import one_layer
    from moue_dist.cli.ranks import my_place, start_ranks

    started = start_ranks(one_layer(config), args.nproc, words)
    if started is not None:
        return started
    from moue_dist.bench.layer.run import run as run_layer

    return run_layer(args.what, config, my_place(), options)


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
