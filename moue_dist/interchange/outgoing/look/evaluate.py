"""Losses and choices of a model: what `moue eval` says."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from moue_dist.config import ConfigError
from moue_dist.interchange.outgoing.look import tasks
from moue_dist.interchange.outgoing.look.ask import Folder, Scored, score


@dataclass(frozen=True)
class Losses:
    """`nats`: summed over `tokens`, which stand for `bytes` of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def losses(folder: Folder, sequences: Sequence[Scored]) -> Losses:
    sums = _score(folder, sequences, "loss")
    scored = [s.ids[s.first :] for s in sequences]
    size = sum(folder.words.count_bytes([int(i) for i in ids]) for ids in scored)
    return Losses(-math.fsum(sums), sum(len(ids) for ids in scored), size)


def choices(folder: Folder, path: Path) -> tasks.Result:
    """A task of multiple choice, from a .jsonl file."""
    items = tasks.read_task(path)
    return tasks.judge(path.stem, items, _score(folder, tasks.sequences_of(folder, items), path.stem))


def _score(folder: Folder, sequences: Sequence[Scored], name: str) -> list[float]:
    # disable=None: a bar on a terminal, silence in a log file
    return list(tqdm(score(folder, sequences), total=len(sequences), desc=name, unit="seq", disable=None))


def harness(folder: Folder, names: Sequence[str]) -> int:
    """lm-evaluation-harness on its own tasks, or YAML files of such; returns its exit code."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{names[0]} is no .jsonl file, so it is a task of lm-evaluation-harness, which is not installed: "
            "pip install lm_eval, or name a file"
        )
    model = f"pretrained={folder.path.resolve()},trust_remote_code=True"
    words = ["--model", "hf", "--model_args", model, "--tasks", ",".join(names)]
    return subprocess.run([sys.executable, "-m", "lm_eval", *words]).returncode
