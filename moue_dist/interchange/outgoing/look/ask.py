"""Asks transformers, in a process of its own (`child.py`), about a folder; a run is exported first, for a while."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy

from moue_dist.config import ConfigError
from moue_dist.interchange.outgoing import vocabulary
from moue_dist.interchange.outgoing.export import export
from moue_dist.interchange.outgoing.vocabulary import Vocabulary

CHILD = "moue_dist.interchange.outgoing.look.child"
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Folder:
    """An exported folder that can be asked. `longest`: tokens of a sequence that the model was trained on."""

    path: Path
    words: Vocabulary
    vocab_size: int
    longest: int


@dataclass(frozen=True)
class Scored:
    """Tokens, of which those from number `first` (at least 1) on are scored."""

    ids: Sequence[int]
    first: int = 1


@contextmanager
def folder_of(path: Path) -> Iterator[Folder]:
    """The exported folder `path`, or one that is made of the run or checkpoint `path` and then removed again."""
    if find_spec("transformers") is None:
        raise ConfigError("this needs transformers, which is not installed: pip install 'moue-dist[hf]'")
    if (path / "config.json").is_file():
        yield _open(path)
        return
    with tempfile.TemporaryDirectory(prefix="moue-look-") as home:
        yield _open(export(path, Path(home) / "exported").folder)


def _open(path: Path) -> Folder:
    about = path / "config.json"
    try:
        config = json.loads(about.read_text())
        sizes = int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{about} does not say vocab_size and max_position_embeddings: {path} is no whole folder"
        ) from None
    return Folder(path, vocabulary.of_folder(path), *sizes)


def generate(
    folder: Folder, ids: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """New tokens, as they come; the end mark is the last."""
    request = {
        "do": "generate",
        "ids": list(ids),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "end": folder.words.end,
    }
    for said in _answers(folder, request):
        yield from said


def score(folder: Folder, sequences: Sequence[Scored]) -> Iterator[float]:
    """Of each sequence the sum of its scored tokens' log probabilities, in nats, as they come."""
    for sequence in sequences:
        if (largest := int(numpy.max(sequence.ids))) >= folder.vocab_size:
            raise ConfigError(
                f"token {largest} is beyond the {folder.vocab_size} of {folder.path}: the text was "
                "tokenized for another model"
            )
    with tempfile.TemporaryDirectory(prefix="moue-look-") as home:
        file = Path(home) / "sequences.npz"
        numpy.savez(
            file,
            tokens=numpy.concatenate([numpy.asarray(s.ids, dtype=numpy.int32) for s in sequences]),
            lengths=[len(s.ids) for s in sequences],
            firsts=[s.first for s in sequences],
        )
        for said in _answers(folder, {"do": "score", "sequences": str(file)}):
            yield from said


def _answers(folder: Folder, request: dict[str, Any]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="moue-look-") as home, open(f"{home}/errors", "w+") as errors:
        file = Path(home) / "request.json"
        file.write_text(json.dumps({**request, "folder": str(folder.path.resolve())}))
        words = [sys.executable, "-m", CHILD, str(file)]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | _QUIET
        ) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    yield json.loads(line)
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"transformers could not run {folder.path} (exit code {child.returncode}): {last}")
