"""`moue plan CONFIG`: the dry run, as tables, as JSON or as a picture of the pool."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import CONFIG, OVERRIDES, add_command, load, positive
from moue_dist.config import Config, ConfigError

ABOUT = f"""\
Dry run: rank grid, stages and their experts, parameters, FLOPs per token, bytes per GPU, where the pool lives and what
that sends in a step, and whether it fits. Needs no GPU. Exit code 1 if it does not fit (with the cheapest change that
would), 2 for a bad configuration.

  moue plan moue_7b --world 64
  moue plan moue_7b --world 4 --device h100 --parallel.expert-parallel 2
  moue plan moue_7b --world 8 --json
  moue plan moue_7b --world 8 --parallel.placement home --picture pool.png
  moue plan moue_7b --world 8 --parallel.placement home --parallel.measured-use runs/moue_7b

{OVERRIDES}"""


def add_to(commands: Any) -> None:
    plan = add_command(commands, "plan", run, "dry run of a configuration", ABOUT)
    plan.add_argument("config", metavar="CONFIG", help=CONFIG)
    plan.add_argument("--world", type=positive, metavar="N", help="processes (default: as few as the grid needs)")
    plan.add_argument("--device", default="h200", metavar="NAME", help="accelerator (default: h200)")
    plan.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a GPU (default: the device's)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--picture", metavar="FILE", help="draw windows, stages and copies into a .png or .svg file")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from moue_dist.config.devices import find_device, known_devices
    from moue_dist.parallel.mesh import smallest_world
    from moue_dist.planning.plan import build_plan

    device = find_device(args.device)
    if device is None:
        raise ConfigError(f"--device {args.device}: unknown; known are {', '.join(known_devices())}")
    config = load(args.config, overrides)
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

        from moue_dist.planning.tables import render

        render(plan, Console(highlight=False))
    if args.picture:
        _draw(config, world, Path(args.picture))
    if not plan.fits:
        print(f"moue: does not fit: {plan.misfit}", file=sys.stderr)
    return 0 if plan.fits else 1


def _draw(config: Config, world: int, path: Path) -> None:
    """Draw the ring of the pool with windows, stages and copies; raises ConfigError where that cannot be written."""
    from moue_dist.measuring.measured_use import measured_use
    from moue_dist.parallel.mesh import build_mesh
    from moue_dist.parallel.placement.of_config import place_pool, stages_of_moe_layers
    from moue_dist.report.ring import write_ring_picture

    mesh = build_mesh(world, config.parallel)
    placement = place_pool(config, mesh, measured_use(config))
    write_ring_picture(path, config.topology(), stages_of_moe_layers(config, mesh), placement)
