"""`moue` = `python -m moue_dist`: train, plan, report, options. Heavy modules load only where they are used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moue_dist import __version__
from moue_dist.config import BAD_CONFIGURATION, Config, ConfigError
from moue_dist.config.devices import Device

if TYPE_CHECKING:
    from moue_dist.bench.options import BenchOptions
    from moue_dist.launchers.env import ProcessEnv

_OVERRIDES = """\
Any option of the configuration can be overridden: --section.key value, for example
  --train.steps 500 --parallel.pipeline-parallel 2 --model.qk-norm false --parallel.stage-layers 3 1
`moue options` lists them all."""

_TRAIN = f"""\
Train a configuration. Under torchrun, srun or mpirun this is one rank; otherwise it starts the ranks itself, one for
each GPU, or on a CPU as few as the grid needs.

  moue train configs/tiny.yaml
  moue train configs/tiny.yaml --train.steps 20 --name short
  moue train configs/debug_gpu.yaml --nproc 2 --parallel.expert-parallel 2
  torchrun --nproc-per-node 8 -m moue_dist train configs/moue_7b.yaml

A run that has a checkpoint continues from its latest one.
{_OVERRIDES}"""

_PLAN = f"""\
Dry run: rank grid, stages and their experts, parameters, FLOPs per token, bytes per GPU, where the pool lives and what
that sends in a step, and whether it fits. Needs no GPU. Exit code 1 if it does not fit (with the cheapest change that
would), 2 for a bad configuration.

  moue plan configs/moue_7b.yaml --world 64
  moue plan configs/moue_7b.yaml --world 4 --device h100 --parallel.expert-parallel 2
  moue plan configs/moue_7b.yaml --world 8 --json
  moue plan configs/moue_7b.yaml --world 8 --parallel.placement home --picture pool.png
  moue plan configs/moue_7b.yaml --world 8 --parallel.placement home --parallel.measured-use runs/moue_7b

{_OVERRIDES}"""

_BENCH = f"""\
Time our training step, and with --baseline megatron-core's own MoE of the same shape beside it, in one run on the
same batches. Starts its ranks as `moue train` does. Exit code 1 if a part failed. Here --output names the result's
file; benchmarks/README.md explains it. `moue bench rank` measures one rank of a larger layout alone on one GPU:
memory and compute are real, transfers take as long as the bytes need at --gbps, waiting for other ranks is left out.

  moue bench step configs/plain_7b.yaml --baseline --train.global-batch-size 32 --train.micro-batch-size 4
  moue bench step configs/tiny.yaml --baseline --output benchmarks/results/tiny.json --append
  moue bench step configs/moue_7b.yaml --placements replicate,home,hybrid --train.global-batch-size 64
  moue bench rank configs/moue_7b.yaml --world 64 --rank 9 --placements replicate,home

{_OVERRIDES}"""

_MAIN = """\
Trains Mixture of Universal Experts: a language model whose MoE layers share one pool of experts, over every layer
and pipeline stage.

  moue plan configs/tiny.yaml            what would run, and whether it fits
  moue train configs/tiny.yaml           run it
  moue bench step configs/tiny.yaml      time the training step
  moue report runs/tiny                  one HTML page about one or several runs
  moue options                           every option of a configuration, with its default"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad configuration or usage, explained in one line on stderr)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["report"]:  # it has a parser of its own
        from moue_dist.cli.report import main as report

        return _refusable(lambda: report(args[1:]))
    parser = _parser()
    known, overrides = parser.parse_known_args(args)
    if "run" not in known:
        parser.print_help()
        return BAD_CONFIGURATION
    return _refusable(lambda: known.run(known, overrides))


def _parser() -> argparse.ArgumentParser:
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="moue", description=_MAIN, formatter_class=keep, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[..., int], short: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=short, description=text, formatter_class=keep, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    train = command("train", _train, "train a configuration", _TRAIN)
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/tiny.yaml")
    train.add_argument("--nproc", type=_positive, metavar="N", help="ranks to start on this machine")

    plan = command("plan", _plan, "dry run of a configuration", _PLAN)
    plan.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/moue_7b.yaml")
    plan.add_argument("--world", type=_positive, metavar="N", help="processes (default: as few as the grid needs)")
    plan.add_argument("--device", default="h200", metavar="NAME", help="accelerator (default: h200)")
    plan.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a GPU (default: the device's)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--picture", metavar="FILE", help="draw windows, stages and copies into a .png or .svg file")

    bench = command("bench", _bench, "time the training step", _BENCH)
    bench.add_argument("what", choices=["step", "rank"], help="the step of all ranks, or one rank of many, alone")
    bench.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/tiny.yaml")
    bench.add_argument("--nproc", type=_positive, metavar="N", help="ranks to start on this machine")
    _bench_options(bench)

    command(
        "options", _options, "every option of a configuration", "Every option of a configuration, with its default."
    )
    commands.add_parser("report", help="an HTML page about one or several runs", add_help=False)
    return parser


def _bench_options(parser: argparse.ArgumentParser) -> None:
    """The options that `moue bench` hands to its ranks: BenchOptions' fields."""
    add = parser.add_argument
    add("--steps", type=_positive, default=6, metavar="N", help="timed steps (default: 6)")
    add("--warmup", type=_count, default=3, metavar="N", help="steps before (default: 3)")
    add("--baseline", action="store_true", help="measure megatron-core's own MoE, too, first")
    add("--baseline-only", action="store_true", help="measure nothing else")
    add("--baseline-grads", choices=["bf16", "fp32"], default="bf16", help="its gradient buffers (default: bf16)")
    add("--output", metavar="FILE", help="write all numbers to this JSON file")
    add("--append", action="store_true", help="add to the runs of that file")
    add("--join", action="store_true", help="add what is measured to that file's last run")
    add("--note", metavar="TEXT", help="kept with the numbers")
    add("--placements", metavar="LIST", help="our step under several placements, such as replicate,home,hybrid")
    add("--part", help=argparse.SUPPRESS)
    add("--asked", help=argparse.SUPPRESS)
    add("--world", type=_positive, default=1, metavar="N", help="rank: ranks of the layout that it belongs to")
    add("--rank", type=_count, default=0, metavar="R", help="rank: which one of them is measured (default: 0)")
    add(
        "--gbps", type=float, default=278.0, metavar="GB", help="rank: GB/s out of a GPU (default: 278, NVLink of H200)"
    )
    add("--latency-us", type=float, default=70.0, metavar="US", help="rank: least time of a transfer (default: 70)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


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


def _load(path: str, overrides: list[str]) -> Config:
    from moue_dist.config.load import load_config

    if not os.path.exists(path) and any(word.endswith((".yaml", ".yml")) for word in overrides):
        raise ConfigError(f"the configuration file comes first, then the options; {path!r} is no file")
    return load_config(path, overrides)


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    config = _load(args.config, overrides)
    started = _start_ranks(config, args.nproc, ["train", args.config, *overrides])
    if started is not None:
        return started
    from moue_dist.training.run import run

    return run(config, _place(), after=_report)


def _report(run_dir: Path) -> None:
    from moue_dist.report.run_report import write_run_report

    print(f"report: {write_run_report(run_dir)}", flush=True)


def _bench(args: argparse.Namespace, overrides: list[str]) -> int:
    from dataclasses import fields

    from moue_dist.bench.options import BenchOptions

    config = _load(args.config, overrides)
    options = BenchOptions(**{field.name: getattr(args, field.name) for field in fields(BenchOptions)})
    from moue_dist.launchers.env import read_env

    if args.what == "rank":
        if read_env().source != "single":
            raise ConfigError("moue bench rank is one process: start it without torchrun, srun or mpirun")
        if len(options.parts) == 1:
            from moue_dist.bench.rank import run as run_rank

            return run_rank(config, options)
    if len(options.parts) > 1 and read_env().source == "single":
        return _bench_apart(args, config, options, overrides)
    words = ["bench", args.what, args.config, *options.as_words(), *overrides]
    started = _start_ranks(config, args.nproc, words)
    if started is not None:
        return started
    from moue_dist.bench.run import run

    return run(config, _place(), options)


def _bench_apart(args: argparse.Namespace, config: Config, options: BenchOptions, overrides: list[str]) -> int:
    import shlex
    import subprocess

    from moue_dist.bench.apart import measure_apart

    def start(part: BenchOptions) -> int:
        words = ["bench", args.what, args.config, *part.as_words(), *overrides]
        if args.what == "rank":
            return subprocess.run([sys.executable, "-m", "moue_dist", *words]).returncode
        return _start_ranks(config, args.nproc, words, always=True) or 0

    return measure_apart(options, shlex.join(["moue", *sys.argv[1:]]), start)


def _start_ranks(config: Config, asked: int | None, words: list[str], *, always: bool = False) -> int | None:
    """Run `moue WORDS` in ranks on this machine and return its exit code; None where this process is a rank itself.

    A single rank is this process, too, unless `always`.
    """
    from moue_dist.launchers.env import read_env

    place = read_env()
    if place.source != "single":
        if asked is not None:
            raise ConfigError(f"--nproc {asked}: the ranks were already started by {place.source}; leave it out")
        return None
    ranks, on_cpu = _ranks_here(config, asked)
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks then see a machine without GPUs
    if ranks == 1 and not always:
        return None
    from moue_dist.launchers.local import launch_module

    return launch_module("moue_dist", words, ranks)


def _place() -> ProcessEnv:
    """This rank's place, also in the variables that torch.distributed reads."""
    from moue_dist.launchers.env import export, read_env, set_defaults

    place = read_env()
    set_defaults(place.local_world_size)
    export(place)
    return place


def _ranks_here(config: Config, asked: int | None) -> tuple[int, bool]:
    """How many ranks to start, and whether to leave the GPUs alone. Refuses, once, what every rank would refuse."""
    from moue_dist.parallel.mesh import smallest_world
    from moue_dist.refusals.validate import validate

    device, gpus = (None, 0) if config.train.device == "cpu" else _gpus()
    facts: dict[str, Any] = {"cuda": gpus > 0, "device": device}
    if gpus:
        from moue_dist.kernels.backend import has_transformer_engine

        facts["transformer_engine"] = has_transformer_engine()
    validate(config, None, **facts)
    least = smallest_world(config.parallel)
    choice = config.train.device == "auto" and config.train.precision == "fp32"
    if 0 < gpus < (asked or least) and choice:
        print(f"moue: {gpus} GPU(s) for {asked or least} ranks are too few: training on the CPU", file=sys.stderr)
        validate(config, asked or least, cuda=False)
        return asked or least, True
    ranks = asked or gpus or least
    if 0 < gpus < ranks:
        raise ConfigError(f"--nproc {ranks} is more than the {gpus} GPUs here; lower it, or set train.device=cpu")
    validate(config, ranks, **facts)
    return ranks, config.train.device == "cpu"


def _gpus() -> tuple[Device | None, int]:
    """The first GPU's description and their number."""
    import torch

    from moue_dist.config.devices import describe_device

    if not torch.cuda.is_available():
        return None, 0
    facts = torch.cuda.get_device_properties(0)
    device = describe_device(facts.name, (facts.major, facts.minor), facts.total_memory / 2**30)
    return device, torch.cuda.device_count()


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from moue_dist.config.devices import find_device, known_devices
    from moue_dist.parallel.mesh import smallest_world
    from moue_dist.planning.plan import build_plan, render

    device = find_device(args.device)
    if device is None:
        raise ConfigError(f"--device {args.device}: unknown; known are {', '.join(known_devices())}")
    config = _load(args.config, overrides)
    world = args.world
    if world is None:
        from moue_dist.refusals.validate import validate

        validate(config, None, cuda=True, device=device, transformer_engine=True)  # before degrees are multiplied
        world = smallest_world(config.parallel)
    plan = build_plan(config, world, device, args.memory_gib)
    if args.json:
        print(plan.as_json())
    else:
        from rich.console import Console

        render(plan, Console(highlight=False))
    if args.picture:
        from moue_dist.planning.plan import draw

        draw(config, world, Path(args.picture))
    if not plan.fits:
        print(f"moue: does not fit: {plan.misfit}", file=sys.stderr)
    return 0 if plan.fits else 1


def _options(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(f"unexpected {overrides[0]!r}")
    import tyro

    tyro.cli(Config, default=Config(), args=["--help"], prog="moue train CONFIG")
    return 0  # not reached: tyro exits after its help


if __name__ == "__main__":
    sys.exit(main())
