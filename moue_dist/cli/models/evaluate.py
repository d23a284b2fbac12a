"""`moue eval FOLDER|RUN`: how well a model predicts text, and answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moue_dist.cli.arguments import add_command, no_more, positive
from moue_dist.config import ConfigError

ABOUT = """\
Loss (nats per token), perplexity and bits per byte of a model on text, and multiple choice. The model is an exported
folder or a run, which is exported to a temporary folder first. Needs transformers (pip install 'moue-dist[hf]') and
runs the modeling code that lies in the folder; on a GPU where there is one.

  moue eval runs/tiny                                  what the run validates on
  moue eval tiny_hf --data book.txt                    a text file, or the PREFIX of a .bin and .idx
  moue eval tiny_hf --tasks sums.jsonl capitals.jsonl  multiple choice, a line {"question", "choices", "answer"} each
  moue eval tiny_hf --tasks arc_easy my_task.yaml      tasks of lm-evaluation-harness, where it is installed"""


def add_to(commands: Any) -> None:
    evaluate = add_command(commands, "eval", run, "how well a model predicts text", ABOUT)
    add = evaluate.add_argument
    add("folder", metavar="FOLDER", type=Path, help="an exported folder, a run's folder, or one of its checkpoints")
    add("--data", type=Path, metavar="PREFIX", help="a text file, or the path of a .bin and .idx without its ending")
    add("--sequences", type=positive, metavar="N", help="of --data: only the first N (default: all)")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="multiple choice: .jsonl files, or the harness's tasks")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    exported = (args.folder / "config.json").is_file()
    if args.sequences is not None and args.data is None:
        raise ConfigError("--sequences is of --data; name that, too, or leave it out")
    if exported and args.data is None and not args.tasks:
        raise ConfigError(f"{args.folder} is an exported folder, which has no validation text: give --data or --tasks")
    from moue_dist.interchange.outgoing.look import evaluate, texts
    from moue_dist.interchange.outgoing.look.ask import folder_of

    files = [Path(name) for name in args.tasks if name.endswith(".jsonl")]
    others = [name for name in args.tasks if not name.endswith(".jsonl")]
    with folder_of(args.folder) as folder:
        if args.data is not None or not args.tasks:
            by_run = args.data is None
            rows = texts.validation_of(args.folder) if by_run else texts.sequences_of(folder, args.data, args.sequences)
            found = evaluate.losses(folder, rows)
            print(
                f"loss {found.loss:.6f}  perplexity {found.perplexity:.4f}  bits per byte {found.bits_per_byte:.4f}  "
                f"({found.tokens:,} tokens, {found.bytes:,} bytes)"
            )
        for path in files:
            task = evaluate.choices(folder, path)
            print(
                f"{task.name}: accuracy {task.accuracy:.4f}, by bytes {task.accuracy_by_bytes:.4f}  "
                f"({task.items:,} items)"
            )
        return evaluate.harness(folder, others) if others else 0
