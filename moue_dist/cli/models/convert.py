"""`moue convert SOURCE OUT`: a Hugging Face model as a checkpoint to train on from, or a run's with more layers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import add_command, positive
from moue_dist.config import ConfigError

ABOUT = """\
Turn a Hugging Face folder (config.json and *.safetensors) of OLMoE, Qwen3-MoE, Mixtral, Llama or Qwen3 into a folder
that `moue train` starts from: checkpoint, config.yaml, tokenizer. Reads and writes tensor by tensor; no GPU is needed.

  moue convert OLMoE-1B-7B models/olmoe                          each layer keeps its own experts: the plain MoE
  moue convert OLMoE-1B-7B models/olmoe --topology rotational    one pool; a layer sees its neighbour's experts too
  moue convert Llama-1B models/moe --upcycle 8 --top-k 2         a dense model, each FFN copied into 8 experts
  moue convert runs/tiny models/deeper --add-layers 2            a run of ours with layers that begin as identity
  moue train models/olmoe/config.yaml --data.source my_text/     start from it

In a pool a mask hides the experts that are new to a layer, so that step 0 computes what the source does; it goes to 0
in --mask-steps steps. A model that cannot be expressed is refused with the reason, before anything is written.
"""


def add_to(commands: Any) -> None:
    parser = add_command(commands, "convert", run, "a Hugging Face model to train on from", ABOUT)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="a Hugging Face folder; with --add-layers a run or converted model")
    add("out", metavar="OUT", type=Path, help="the folder to write")
    kinds = ("private", "block", "full", "rotational")
    add("--topology", choices=kinds, default="private", help="which experts a layer sees (default: private)")
    add("--window", type=positive, default=0, metavar="W", help="rotational: experts a layer sees (default: 2 layers')")
    add("--stride", type=positive, default=0, metavar="S", help="rotational: how far it moves (default: a layer's)")
    add("--group", type=positive, default=1, metavar="G", help="block, rotational: layers that share a window")
    add(
        "--mask-start",
        type=float,
        default=-16.0,
        metavar="X",
        help="the mask of hidden experts at step 0 (default: -16)",
    )
    add("--mask-steps", type=positive, default=1000, metavar="N", help="steps until it is 0 (default: 1000)")
    add("--upcycle", type=positive, default=0, metavar="N", help="dense models: N experts from each FFN, copies of it")
    add("--split", action="store_true", help="--upcycle: cut the FFN into N parts instead, all used at first")
    add("--top-k", type=positive, default=0, metavar="K", help="dense models: experts a token uses")
    add("--add-layers", type=positive, default=0, metavar="N", help="of a model of ours: layers that begin as identity")
    add("--overwrite", action="store_true", help="replace OUT where it exists")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; `moue convert --help` shows the options")
    from moue_dist.interchange.incoming.convert import convert
    from moue_dist.interchange.incoming.forms import Form
    from moue_dist.planning.flops import parameters

    names = ("topology", "window", "stride", "group", "mask_start", "mask_steps", "upcycle", "split", "top_k")
    form = Form(**{name: getattr(args, name) for name in names})
    if args.add_layers:
        from moue_dist.interchange.incoming.deepen import deepen

        if form != Form():
            raise ConfigError("--add-layers keeps the pool and what layers see of it; leave the other options out")
        config = deepen(args.source, args.out, args.add_layers, overwrite=args.overwrite)
    else:
        config = convert(args.source, args.out, form, overwrite=args.overwrite)
    counts, e = parameters(config), config.moe
    print(
        f"{args.out}: {counts.total:,} parameters, {counts.activated:,} activated; a pool of {e.pool} experts, "
        f"moe.topology={e.topology}, top {e.top_k}\ntrain it: moue train {args.out}/config.yaml"
    )
    return 0
