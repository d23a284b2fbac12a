"""`moue data prepare|inspect`: text into tokenized files, and a look at them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from moue_dist.cli.arguments import add_command, positive
from moue_dist.config import ConfigError

if TYPE_CHECKING:
    from moue_dist.data.prepare.run import Prepared

ABOUT = """\
Tokenized files for training: PREFIX.bin and PREFIX.idx, the format of Megatron-LM, datatrove and NeMo Curator.

  moue data prepare text/ --tokenizer tokenizer.json --out data/mine
  moue data inspect data/mine
  moue train moue_1b --data.blend data/mine
  moue train moue_1b --data.blend 0.7 data/web 0.3 data/code --data.split 99 1"""

PREPARE = """\
Tokenize files and folders of text: .txt, .md, .py (a document each), .jsonl (a document a line), .parquet, each but
the last also as .gz or .zst. A document ends with the tokenizer's end mark. A run that was killed goes on where it
was. The result is the same for any number of workers. Documents that cannot be used end the command with their number
and the first place, unless --skip-bad.

  moue data prepare book.txt --tokenizer bytes --out data/book
  moue data prepare dump.jsonl.zst --field content --tokenizer tokenizer.json --out data/dump --workers 16
  moue data prepare shards/ --train-bpe 32000 --out data/mine"""

INSPECT = """\
Documents, tokens, their type, the spread of lengths, and the first lines of some documents, of files that
`moue data prepare`, Megatron-LM, datatrove or NeMo Curator wrote.

  moue data inspect data/mine
  moue data inspect data/mine --samples 5 --verify
  moue data inspect other_text_document --tokenizer tokenizer.json"""


def add_to(commands: Any) -> None:
    data = add_command(commands, "data", _help, "tokenize text, look at tokenized files", ABOUT)
    parts = data.add_subparsers(title="commands", metavar="COMMAND")
    prepare = add_command(parts, "prepare", run_prepare, "tokenize text", PREPARE)
    add = prepare.add_argument
    add("sources", nargs="+", metavar="SRC", help="files and folders")
    add("--out", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and a note")
    add("--tokenizer", default="", metavar="FILE", help="a tokenizer.json of the library tokenizers, or: bytes")
    add("--train-bpe", type=positive, default=0, metavar="N", help="train a BPE of N tokens on the text instead")
    add("--eod", default="", metavar="TOKEN", help="the end mark, if not the tokenizer's usual one")
    add("--field", default="text", metavar="NAME", help="of a line or row: its text (default: text)")
    add("--suffix", action="append", default=[], metavar=".X", help="in folders, files .X are text, too")
    add("--workers", type=positive, default=0, metavar="N", help="processes (default: the CPUs that are allowed)")
    add("--skip-bad", action="store_true", help="leave out documents that cannot be used, and say how many")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--max-document-mb", type=positive, default=256, metavar="MB", help="a longer one is bad (default: 256)")
    inspect = add_command(parts, "inspect", run_inspect, "look at tokenized files", INSPECT)
    add = inspect.add_argument
    add("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    add("--tokenizer", default="", metavar="FILE", help="what decodes them, where no note says it")
    add("--samples", type=int, default=2, metavar="N", help="documents to show (default: 2)")
    add("--verify", action="store_true", help="read all of it and compare digests")


def _help(args: argparse.Namespace, rest: list[str]) -> int:
    raise ConfigError("moue data: name what to do, prepare or inspect; `moue data --help` shows both")


def run_prepare(args: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest)
    from moue_dist.data.prepare.run import Request, prepare

    done = prepare(
        Request(
            sources=tuple(args.sources),
            out=_prefix(args.out),
            tokenizer=args.tokenizer,
            train_bpe=args.train_bpe,
            end_mark=args.eod,
            field=args.field,
            suffixes=tuple(args.suffix),
            longest=args.max_document_mb * 1_000_000,
            skip_bad=args.skip_bad,
            overwrite=args.overwrite,
            workers=args.workers or len(os.sched_getaffinity(0)),
        )
    )
    print("\n".join(_summary(done)), flush=True)
    return 0


def run_inspect(args: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest)
    from moue_dist.data.inspect import inspect

    print("\n".join(inspect(_prefix(args.prefix), args.tokenizer, max(0, args.samples), args.verify)), flush=True)
    return 0


def _no_more(rest: list[str]) -> None:
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; `moue data --help` shows what there is")


def _prefix(word: str) -> str:
    word = word[:-4] if word.endswith((".bin", ".idx")) else word
    if not os.path.basename(word):
        raise ConfigError(f"{word!r} is a folder: expected a path without .bin and .idx, such as data/mine")
    return word


def _summary(done: Prepared) -> list[str]:
    note, out = done.note, done.out
    each = note.text_bytes / max(1, note.tokens - note.documents)
    lines = [
        f"{'already there' if done.already else 'wrote'}: {out}.bin, {out}.idx: {note.documents:,} documents, "
        f"{note.tokens:,} tokens with their end marks, from {note.text_bytes:,} bytes of text ({each:.2f} a token)",
        f"tokenizer: {note.tokenizer}, {note.vocab_size:,} tokens, end mark {note.end_mark} ({note.eod})",
    ]
    places = {reason: f" (first: {place})" for reason, (_, place) in done.left_out.items()}
    left = [f"{n:,} {reason}{places.get(reason, '')}" for reason, n in note.left_out.items()]
    lines.append(f"left out: {', '.join(left) or 'nothing'}")
    if done.passed_over:
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in done.passed_over.most_common(5))
        lines.append(f"files of other types, not read: {kinds}; --suffix .X reads them as text")
    size = f" --model.vocab-size {note.vocab_size}" if note.vocab_size > 256 else ""
    lines.append(f"train on it: moue train tiny{size} --data.blend {out}")
    return lines
