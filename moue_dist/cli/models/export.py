"""`moue export RUN OUT`: a model out, as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import add_command, no_more

ABOUT = """\
Write a run's newest checkpoint, or the checkpoint that is named, as a folder of safetensors for transformers. Needs no
GPU and little memory: tensors pass through in parts.

  moue export runs/tiny tiny_hf
  moue export runs/plain_7b/checkpoints/step_00001000 out --form plain --dtype bf16

--form moue   the pool stored once, every kind of router, with its own modeling file (trust_remote_code)
--form plain  a Qwen3-MoE that existing servers take: each layer's window becomes its own experts, so that it is larger
              by L x W / P. For softmax routers."""


def add_to(commands: Any) -> None:
    export = add_command(commands, "export", run, "a model out, as a Hugging Face folder", ABOUT)
    export.add_argument("run_or_checkpoint", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    export.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not be there yet")
    export.add_argument("--form", choices=["moue", "plain"], default="moue", help="(default: moue)")
    export.add_argument("--dtype", choices=["bf16", "fp32"], help="type of the weights (default: the run's)")
    export.add_argument(
        "--shard-gb",
        type=_above_zero,
        default=5.0,
        metavar="GB",
        help="size of a file (default: 5); tensors stay whole",
    )


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from moue_dist.interchange.outgoing.export import export

    done = export(args.run_or_checkpoint, args.out, args.form, args.dtype, shard_gb=args.shard_gb)
    print(f"{done.folder}: {done.bytes / 1e9:.3g} GB in {done.dtype}")
    if args.form == "plain":
        print(f"its experts take {done.size_factor:g} times the pool (L x W / P)")
    return 0
