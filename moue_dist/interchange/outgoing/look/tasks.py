"""Multiple choice from local files: each line of a .jsonl has a question, its choices, and the number of the right one.

    {"question": "The sun is", "choices": ["hot", "cold"], "answer": 0}

The model chooses what it finds likeliest behind the question, as lm-evaluation-harness does: by the sum of log
probabilities, and by that sum over the choice's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moue_dist.config import ConfigError
from moue_dist.interchange.outgoing.look.ask import Folder, Scored


@dataclass(frozen=True)
class Item:
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Result:
    """Shares of right choices: by the sum of log probabilities, and by the sum over bytes."""

    name: str
    items: int
    accuracy: float
    accuracy_by_bytes: float


def read_task(path: Path) -> list[Item]:
    """Raises ConfigError, naming the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the task {path}: {error}") from None
    items = [_item(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ConfigError(f"the task {path} has no line")
    return items


def _item(path: Path, number: int, line: str) -> Item:
    try:
        value = json.loads(line)
        item = Item(value["question"], tuple(value["choices"]), value["answer"])
        texts = (item.question, *item.choices)
        good = all(isinstance(text, str) for text in texts) and all(item.choices) and type(item.answer) is int
        if good and isinstance(value["choices"], list) and 0 <= item.answer < len(item.choices):
            return item
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f'line {number} of {path} is not of the form {{"question": TEXT, "choices": [TEXT, ...], "answer": NUMBER}}, '
        "choices counted from 0"
    )


def sequences_of(folder: Folder, items: Iterable[Item]) -> list[Scored]:
    """Each choice behind its question, whose start is left out where both are too long."""
    end = [] if folder.words.end is None else [folder.words.end]
    found = []
    for item in items:
        blank = "" if not item.question or item.question[-1].isspace() else " "
        asked = [*end, *folder.words.encode(item.question)]
        for choice in item.choices:
            whole = [*end, *folder.words.encode(f"{item.question}{blank}{choice}")]
            # What question and choice share a token of belongs to the choice.
            first = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
            cut = max(0, min(len(whole) - folder.longest, first - 1))
            found.append(Scored(whole[cut:], max(1, first - cut)))
    return found


def judge(name: str, items: Sequence[Item], sums: Sequence[float]) -> Result:
    """`sums`: of every item's choices, one after another."""
    right = right_by_bytes = at = 0
    for item in items:
        mine = sums[at : at + len(item.choices)]
        at += len(mine)
        sizes = [len(choice.encode()) for choice in item.choices]
        right += max(range(len(mine)), key=mine.__getitem__) == item.answer
        right_by_bytes += max(range(len(mine)), key=lambda i: mine[i] / sizes[i]) == item.answer
    return Result(name, len(items), right / len(items), right_by_bytes / len(items))
