"""Which files are read, in which order, and cut into which units of work. Free of torch.

Files come in an order that depends on their names alone, neither sorted nor random: training and validation are cut by
place, and the tail of a sorted list would be no fair sample. Documents keep their order within a file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moue_dist.config import ConfigError

Kind = Literal["text", "jsonl", "parquet"]
TEXT_SUFFIXES = (".txt", ".md", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson")
PACKINGS = (".gz", ".zst")
UNIT_BYTES = 16 << 20  # of files as they lie on disk; what a killed run has to do again, at most, for every worker
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """A file. `name` is relative to what the user named, with '/'."""

    name: str
    path: str
    kind: Kind
    packing: str  # "", .gz or .zst
    size: int  # bytes on disk
    changed: int  # nanoseconds


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes `begin` to `end` of lines, row groups of Parquet, all of anything else."""

    path: str
    kind: Kind
    packing: str
    begin: int
    end: int


@dataclass(frozen=True)
class Unit:
    """What a worker does at once. Units depend on the files alone, never on the number of workers."""

    number: int
    pieces: tuple[Piece, ...]
    size: int  # bytes on disk


@dataclass(frozen=True)
class Sources:
    files: list[Source]
    passed_over: Counter[str] = field(default_factory=Counter)  # files of other types, by suffix

    @property
    def size(self) -> int:
        return sum(source.size for source in self.files)

    def fingerprint(self) -> str:
        """Of names, sizes and times."""
        digest = hashlib.sha256()
        for source in self.files:
            digest.update(f"{source.name}\0{source.size}\0{source.changed}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def walk(root: Path) -> Iterator[Path]:
    """The files below a folder; hidden folders and installed packages are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        yield from (path for path in (Path(folder, name) for name in names) if path.is_file())


def by_name(names: Iterable[str]) -> list[str]:
    """The names in their order, neither sorted nor random."""
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def find_sources(given: Sequence[str], suffixes: Sequence[str] = ()) -> Sources:
    """The files of paths and folders; `suffixes` are further ones that mean text. Raises ConfigError."""
    found: dict[str, Source] = {}
    passed_over: Counter[str] = Counter()
    seen: dict[Path, str] = {}
    for number, word in enumerate(given):
        root = Path(word).expanduser()
        if not root.exists():
            raise ConfigError(f"{word}: no such file or folder; give files or folders of text, JSONL or Parquet")
        single = root.is_file()
        for path in [root] if single else walk(root):
            kind, packing = _kind_of(path, suffixes, single)
            if kind is None:
                passed_over[path.suffix or "no suffix"] += 1
                continue
            if seen.setdefault(path.resolve(), word) != word:
                raise ConfigError(f"{path} is in {seen[path.resolve()]} and in {word}: name it once")
            stat = path.stat()
            name = f"{number}/{path.name if single else path.relative_to(root).as_posix()}"
            found[name] = Source(name, str(path.resolve()), kind, packing, stat.st_size, stat.st_mtime_ns)
    if not any(source.size for source in found.values()):
        kinds = ", ".join((*TEXT_SUFFIXES, *suffixes, *LINE_SUFFIXES, ".parquet"))
        raise ConfigError(f"{' '.join(given)}: no text found; a folder must hold files that end in {kinds} (.gz, .zst)")
    return Sources([found[name] for name in by_name(found)], passed_over)


def _kind_of(path: Path, suffixes: Sequence[str], named: bool) -> tuple[Kind | None, str]:
    """What a file is by its name; one that the user named himself is text where its suffix says nothing else."""
    suffix = path.suffix.lower()
    packing = suffix if suffix in PACKINGS else ""
    if packing:
        suffix = Path(path.stem).suffix.lower()
    if suffix in LINE_SUFFIXES or (suffix == ".json" and (packing or named)):
        return "jsonl", packing
    if suffix == ".parquet" and not packing:
        return "parquet", ""
    if suffix in (*TEXT_SUFFIXES, *suffixes) or named:
        return "text", packing
    return None, ""


def cut(sources: Sources, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Units of about `unit_bytes`, in the order of the documents. Large plain files are cut, small ones put together.

    A file of .gz or .zst stays whole: it can be read from its start alone.
    """
    units: list[Unit] = []
    pieces: list[Piece] = []
    size = 0
    for source in sources.files:
        for piece, part in _pieces(source, unit_bytes):
            pieces.append(piece)
            size += part
            if size >= unit_bytes:
                units.append(Unit(len(units), tuple(pieces), size))
                pieces, size = [], 0
    if pieces:
        units.append(Unit(len(units), tuple(pieces), size))
    return units


def _pieces(source: Source, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    """The pieces of a file, each with its bytes on disk."""
    if source.kind == "parquet":
        begin = held = 0
        groups = _row_groups(source)
        for number, size in enumerate(groups):
            held += size
            if held >= unit_bytes or number == len(groups) - 1:
                yield Piece(source.path, "parquet", "", begin, number + 1), held
                begin, held = number + 1, 0
    elif source.kind == "jsonl" and not source.packing:
        for begin in range(0, source.size, unit_bytes):
            end = min(begin + unit_bytes, source.size)
            yield Piece(source.path, "jsonl", "", begin, end), end - begin
    else:
        yield Piece(source.path, source.kind, source.packing, 0, source.size), source.size


def _row_groups(source: Source) -> list[int]:
    """The bytes of each row group of a Parquet file; raises ConfigError for a file that is none."""
    from pyarrow import ArrowException, parquet

    try:
        meta = parquet.ParquetFile(source.path).metadata
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{source.path} is no readable Parquet file: {' '.join(str(error).split())}") from None
    sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    return [source.size * size // max(1, sum(sizes)) for size in sizes]
