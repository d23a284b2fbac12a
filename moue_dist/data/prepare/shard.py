"""A unit of work becomes a shard: its tokens, the lengths of its documents, and what was found. Free of torch.

A shard is `<number>.bin`, `<number>.npy` and, last, `<number>.json`, which vouches for the other two: a run that is
killed finds the finished ones again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy

from moue_dist.data.prepare.reading import Bad, documents
from moue_dist.data.prepare.sources import Unit
from moue_dist.data.tokenizer import Tokenizer

AT_ONCE = 1 << 20  # characters that are handed to the tokenizer together
LONGEST_PART = 1 << 20  # characters: longer documents are tokenized in parts that end with a line


@dataclass
class Found:
    """What units held. text_bytes: UTF-8 of the documents taken. bad: reason -> how many, and the first."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest_token: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first: dict[str, Bad] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """`other` comes behind this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.largest_token = max(self.largest_token, other.largest_token)
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    def note(self, bad: Bad) -> None:
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        self.first.setdefault(bad.reason, bad)


def write_shard(unit: Unit, tokenizer: Tokenizer, field_name: str, longest: int, folder: Path) -> Found:
    """Tokenize a unit's documents, each closed by the end mark. Raises ConfigError for a file that cannot be read."""
    found, lengths = Found(), []
    base = folder / f"{unit.number:06d}"
    temporary = Path(f"{base}.{os.getpid()}.tmp")
    end = numpy.array([tokenizer.eod], dtype=tokenizer.dtype)
    try:
        with temporary.open("wb") as stream:
            for texts in _batches(_texts(unit, field_name, longest, found)):
                for parts in _encode(tokenizer, texts):
                    tokens = numpy.concatenate([*parts, end])
                    stream.write(tokens.tobytes())
                    lengths.append(len(tokens))
                    found.largest_token = max(found.largest_token, int(tokens.max()))
                found.text_bytes += sum(len(text.encode()) for text in texts)
            _to_disk(stream)
        found.documents, found.tokens = len(lengths), sum(lengths)
        os.replace(temporary, f"{base}.bin")
        with temporary.open("wb") as stream:
            numpy.save(stream, numpy.array(lengths, dtype=numpy.int32))
            _to_disk(stream)
        os.replace(temporary, f"{base}.npy")
        with temporary.open("wb") as stream:
            stream.write(json.dumps(asdict(found)).encode())
            _to_disk(stream)
        os.replace(temporary, f"{base}.json")
    finally:
        temporary.unlink(missing_ok=True)
    return found


def read_shard(number: int, folder: Path, dtype: type[numpy.generic]) -> Found | None:
    """What a finished shard held; None where there is none, or not all of it."""
    base = folder / f"{number:06d}"
    try:
        said = json.loads(Path(f"{base}.json").read_text())
        first = {reason: Bad(**bad) for reason, bad in said.pop("first").items()}
        found = Found(**said, first=first)
        lengths = numpy.load(f"{base}.npy", mmap_mode="r")
        size = Path(f"{base}.bin").stat().st_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = len(lengths) == found.documents and size == found.tokens * numpy.dtype(dtype).itemsize
    return found if whole else None


def _to_disk(stream: object) -> None:
    stream.flush()  # type: ignore[attr-defined]
    os.fsync(stream.fileno())  # type: ignore[attr-defined]


def _texts(unit: Unit, field_name: str, longest: int, found: Found) -> Iterator[str]:
    for piece in unit.pieces:
        for document in documents(piece, field_name, longest):
            if isinstance(document, Bad):
                found.note(document)
            else:
                yield document


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[numpy.ndarray]]:
    """The tokens of each text, as those of its parts."""
    short = iter(tokenizer.encode([text for text in texts if len(text) <= LONGEST_PART]))
    for text in texts:
        if len(text) <= LONGEST_PART:
            yield [next(short)]
        else:
            yield [tokenizer.encode([part])[0] for part in cut_text(text, LONGEST_PART)]


def cut_text(text: str, longest: int) -> Iterator[str]:
    """Parts of at most `longest` characters, cut behind a line's end where more than blanks follow.

    There the usual tokenizers cut, too, so the tokens are those of the whole text. A text without such a place is cut
    where it must be. 'ab\\ncd', 4 -> 'ab\\n', 'cd'.
    """
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1
        while end > start and text[end].isspace():
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start else start + longest
        yield text[start:end]
        start = end
    yield text[start:]
