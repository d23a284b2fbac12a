"""Text files -> one megatron-core IndexedDataset of bytes, written once and re-used.

A document is a file (or one line of a .jsonl); its tokens are its UTF-8 bytes followed by byte 0. Documents are stored
in an order that depends only on their names, neither sorted nor random: megatron-core cuts train and validation by
document, and the tail of a sorted list would be no fair sample. Example: 'b.txt' = "hi" -> tokens [104, 105, 0].
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tqdm import tqdm

from moue_dist.config import Config, ConfigError, DataConfig
from moue_dist.data.indexed import check_digests, digest, read_index
from moue_dist.data.prepare.sources import walk

EOD = 0  # end of document: the one byte that text never holds
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_FORMAT = 1  # raise it when the same files would give other tokens
_SMALLEST_PIECE = 64  # bytes
_LARGEST_PIECE = 1 << 30  # the index holds lengths as int32


@dataclass(frozen=True)
class Corpus:
    """What was written: `<prefix>.bin` (uint8 tokens) and `<prefix>.idx`, and where it came from."""

    prefix: str  # file name without folder
    fingerprint: str  # of the sources' names, sizes and times, and of the options
    documents: int
    skipped: int  # files that are not UTF-8
    beyond: int  # bytes of files beyond data.max_megabytes
    tokens: int  # bytes of text plus one end mark per document
    bin_digest: str  # sha256
    idx_digest: str


@dataclass(frozen=True)
class _Source:
    name: str  # relative to the source's root, with '/'
    path: Path
    size: int  # bytes
    changed: int  # nanoseconds; 0 for the standard library, whose version stands for it


def data_folder(config: Config, run_dir: str | Path) -> Path:
    """Where the corpus and its indices live: data.cache, or `data` inside the run folder."""
    return Path(config.data.cache).expanduser().resolve() if config.data.cache else Path(run_dir).resolve() / "data"


def prepare_corpus(data: DataConfig, folder: str | Path, *, show_progress: bool = True) -> str:
    """Writes the corpus of `data` into `folder`, or finds it there; returns the path prefix of its .bin and .idx.

    Safe to kill and safe to run at once in several processes: files appear under their final names only when they are
    whole, and the same sources give the same bytes. Raises ConfigError for a missing path, a folder without text,
    a line of .jsonl without a "text" string, and a folder that cannot be written.
    """
    if data.max_megabytes <= 0:
        raise ConfigError(f"data.max_megabytes={data.max_megabytes} must be above 0")
    if not 0 <= data.valid_percent < 100:
        raise ConfigError(f"data.valid_percent={data.valid_percent} must be at least 0 and below 100")
    folder = Path(folder).resolve()
    sources = _find_sources(data)
    fingerprint = _fingerprint(data, sources)
    known = find_corpus(data, folder)
    if known is not None and known.fingerprint == fingerprint:
        return str(folder / known.prefix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        corpus = _write(data, sources, fingerprint, folder, show_progress)
    except OSError as error:
        raise ConfigError(
            f"the corpus cannot be prepared in {folder}: {error}; set data.cache to a folder with room for it"
        ) from None
    return str(folder / corpus.prefix)


def find_corpus(data: DataConfig, folder: str | Path) -> Corpus | None:
    """The corpus that an earlier `prepare_corpus` wrote for these options, if it is whole; reads no source file."""
    folder = Path(folder).resolve()
    try:
        corpus = Corpus(**json.loads((folder / f"corpus-{_key(data)}.json").read_text()))
        check_digests(str(folder / corpus.prefix), corpus.bin_digest, corpus.idx_digest)
        return corpus if read_index(str(folder / corpus.prefix)).tokens == corpus.tokens else None
    except (OSError, ValueError, TypeError):  # ConfigError is a ValueError: a damaged corpus is written again
        return None


def _key(data: DataConfig) -> str:
    """Names the manifest: the options that change the tokens, so that runs may share a cache folder."""
    source = data.source if data.source == "stdlib" else str(Path(data.source).expanduser().resolve())
    options = json.dumps([_FORMAT, source, data.max_megabytes, data.valid_percent])
    return hashlib.sha256(options.encode()).hexdigest()[:10]


def _fingerprint(data: DataConfig, sources: list[_Source]) -> str:
    digest = hashlib.sha256(_key(data).encode())
    digest.update(sys.version.encode() if data.source == "stdlib" else b"")
    for source in sources:
        digest.update(f"{source.name}\0{source.size}\0{source.changed}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _find_sources(data: DataConfig) -> list[_Source]:
    """The files to read, in their final order."""
    stdlib = data.source == "stdlib"
    root = Path(sysconfig.get_path("stdlib") if stdlib else data.source).expanduser()
    if root.is_file():
        paths, root = [root], root.parent
    elif root.is_dir():
        suffixes = (".py",) if stdlib else SUFFIXES
        paths = [path for path in walk(root) if path.suffix.lower() in suffixes]
    else:
        raise ConfigError(f"data.source={data.source}: no such file or folder; give a path of text, or stdlib")
    sources = []
    for path in paths:
        stat = path.stat()
        name = path.relative_to(root).as_posix()
        sources.append(_Source(name, path, stat.st_size, 0 if stdlib else stat.st_mtime_ns))
    if not any(source.size for source in sources):
        raise ConfigError(
            f"data.source={data.source}: no text found; a folder must hold files that end in {', '.join(SUFFIXES)}"
        )
    return sorted(sources, key=lambda source: hashlib.sha256(os.fsencode(source.name)).digest())


def _documents(source: _Source) -> Iterator[bytes | None]:
    """The documents of a file as bytes without zeros; None stands for one that is not UTF-8."""
    if source.path.suffix.lower() != ".jsonl":
        raw = source.path.read_bytes()
        yield raw.replace(b"\0", b"") if _is_text(raw) else None
        return
    with source.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                yield text.encode("utf-8", "replace").replace(b"\0", b"")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f'data.source: line {number} of {source.path} is not a JSON object with a "text" string'
                ) from None


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pieces(document: bytes, limit: int) -> list[int]:
    """Cuts a long document at line ends; returns the lengths of its pieces. b'ab\\ncd', limit 4 -> [3, 2]."""
    lengths, start = [], 0
    while len(document) - start > limit:
        end = document.rfind(b"\n", start, start + limit) + 1 or start + limit
        lengths.append(end - start)
        start = end
    return [*lengths, len(document) - start]


def _write(data: DataConfig, sources: list[_Source], fingerprint: str, folder: Path, show_progress: bool) -> Corpus:
    budget = int(data.max_megabytes * 1e6)
    total = min(budget, sum(source.size for source in sources))
    # A split counts pieces: with none above a quarter of the validation share, one long book can still be split.
    limit = max(_SMALLEST_PIECE, int(total * data.valid_percent / 100 / 4)) if data.valid_percent else _LARGEST_PIECE
    limit = min(limit, _LARGEST_PIECE)
    prefix = f"corpus-{_key(data)}-{fingerprint[:10]}"
    _remove_leftovers(folder)
    temporary = folder / f".{prefix}.{socket.gethostname()}.{os.getpid()}.tmp"
    documents = skipped = tokens = used = 0
    # disable=None: a bar on a terminal, silence in a log file
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading text", disable=None if show_progress else True)
    try:
        builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=numpy.uint8)
        with bar, builder.data_file:
            for document in (document for source in sources for document in _documents(source)):
                if document is None:
                    skipped += 1
                    continue
                document = document[: budget - used]
                if not document:
                    continue
                lengths = _pieces(document, limit)
                lengths[-1] += 1  # the end mark
                builder.add_document(numpy.frombuffer(document + bytes([EOD]), dtype=numpy.uint8), lengths)
                documents, used, tokens = documents + 1, used + len(document), tokens + len(document) + 1
                bar.update(len(document))
                if used >= budget:
                    break
            builder.data_file.flush()
            os.fsync(builder.data_file.fileno())
        if documents == 0:
            raise ConfigError(f"data.source={data.source}: no text found; {skipped} files are not UTF-8")
        builder.finalize(f"{temporary}.idx")
        digests = digest(f"{temporary}.bin"), digest(f"{temporary}.idx")
        beyond = max(0, sum(source.size for source in sources) - budget)
        corpus = Corpus(prefix, fingerprint, documents, skipped, beyond, tokens, *digests)
        Path(f"{temporary}.json").write_text(json.dumps(asdict(corpus)))
        os.replace(f"{temporary}.bin", folder / f"{prefix}.bin")
        os.replace(f"{temporary}.idx", folder / f"{prefix}.idx")
        os.replace(f"{temporary}.json", folder / f"corpus-{_key(data)}.json")  # last: it vouches for the other two
    finally:
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return corpus


def _remove_leftovers(folder: Path, older_than_seconds: float = 3600.0) -> None:
    """Halves that a killed process left behind; young ones may belong to a process that still writes."""
    for path in folder.glob(".corpus-*.tmp.*"):
        if time.time() - path.stat().st_mtime > older_than_seconds:
            path.unlink(missing_ok=True)
