"""`moue generate FOLDER|RUN --prompt TEXT`: what a model writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import add_command, no_more, positive, share

ABOUT = """\
Go on from a prompt, with an exported folder or with a run, which is exported to a temporary folder first. Needs
transformers (pip install 'moue-dist[hf]') and runs the modeling code that lies in the folder; on a GPU where there is
one.

  moue generate runs/tiny --prompt "def main("
  moue generate tiny_hf --prompt "import " --temperature 0.8 --top-p 0.95 --seed 1

The text goes to standard output, the prompt before it."""


def add_to(commands: Any) -> None:
    generate = add_command(commands, "generate", run, "what a model writes", ABOUT)
    add = generate.add_argument
    add("folder", metavar="FOLDER", type=Path, help="an exported folder, a run's folder, or one of its checkpoints")
    add("--prompt", required=True, metavar="TEXT", help="what the text begins with")
    add("--max-tokens", type=positive, default=100, metavar="N", help="new tokens at most (default: 100)")
    add("--temperature", type=_heat, default=0.0, metavar="T", help="0: always the likeliest token (default)")
    add("--top-p", type=share, default=1.0, metavar="P", help="draw from the likeliest tokens of this sum (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def _heat(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text!r}")
    return value


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from moue_dist.interchange.outgoing.look.ask import folder_of, generate
    from moue_dist.interchange.outgoing.look.writing import Writing

    with folder_of(args.folder) as folder:
        ids = folder.words.encode(args.prompt) or [folder.words.end or 0]
        if len(ids) + args.max_tokens > folder.longest:
            print(
                f"moue: prompt and new tokens are up to {len(ids) + args.max_tokens}; the model was trained on "
                f"sequences of {folder.longest} and may lose the thread behind them",
                file=sys.stderr,
            )
        how = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        writing = Writing(folder.words, ids)
        print(args.prompt, end="", flush=True)
        for token in generate(folder, ids, **how):
            print(writing.add(token), end="", flush=True)
        print(writing.rest(), flush=True)
    return 0
