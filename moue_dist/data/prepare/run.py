"""Text files -> `<out>.bin`, `<out>.idx`, a note and a copy of the tokenizer.

Units of work become shards in `<out>.parts`, in any order and by any number of processes; then they are put together
in the order of the units. So the result does not depend on the number of workers, and a run that was killed goes on
with the units that are missing. What lies at `<out>` is replaced last, when the new files are whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moue_dist.config import ConfigError
from moue_dist.data.indexed import (
    NOTE,
    Note,
    digest,
    note_path,
    read_index,
    read_note,
    tokenizer_path,
    write_note,
)
from moue_dist.data.prepare.reading import Bad, documents, place_of
from moue_dist.data.prepare.shard import Found, read_shard
from moue_dist.data.prepare.sources import UNIT_BYTES, Sources, Unit, cut, find_sources
from moue_dist.data.prepare.workers import Task, shards
from moue_dist.data.tokenizer import BYTES, Tokenizer, open_tokenizer, train_bpe
from moue_dist.measuring.progress import AmountBar

BPE_BYTES = 256 << 20  # of files, evenly spread: more text costs memory and hardly changes the merges


@dataclass(frozen=True)
class Request:
    """What the user asks for. Exactly one of tokenizer and train_bpe is set."""

    sources: tuple[str, ...]
    out: str
    tokenizer: str = ""  # bytes, or a tokenizer.json
    train_bpe: int = 0  # size of the vocabulary
    end_mark: str = ""
    field: str = "text"
    suffixes: tuple[str, ...] = ()
    longest: int = 256 << 20  # bytes of a document
    skip_bad: bool = False
    overwrite: bool = False
    workers: int = 1
    unit_bytes: int = UNIT_BYTES


@dataclass(frozen=True)
class Prepared:
    """What stands at `out` now. left_out: reason -> how many, and where the first is."""

    out: str
    note: Note
    left_out: dict[str, tuple[int, str]]
    passed_over: Counter[str]  # files of other types, by suffix
    already: bool = False  # it stood there before


def prepare(request: Request, *, show_progress: bool = True) -> Prepared:
    """Tokenize; raises ConfigError for sources, a tokenizer or documents that cannot be used, and for a full disk."""
    if bool(request.tokenizer) == bool(request.train_bpe):
        raise ConfigError("give --tokenizer FILE or bytes, or train one with --train-bpe N")
    if 0 < request.train_bpe < 257:
        raise ConfigError(f"--train-bpe {request.train_bpe} must be at least 257: the bytes and an end mark")
    try:
        return _prepare(request, show_progress)
    except OSError as error:
        raise ConfigError(f"cannot write {request.out}: {error}; give --out a folder with room for it") from None


def _prepare(request: Request, show_progress: bool) -> Prepared:
    sources = find_sources(request.sources, request.suffixes)
    given = None if request.train_bpe else open_tokenizer(request.tokenizer, request.end_mark)
    made_from = _fingerprint(request, sources, given)
    if (known := _already(request, made_from)) is not None:
        return Prepared(request.out, known, {}, sources.passed_over, already=True)
    units = cut(sources, request.unit_bytes)
    with _parts(request, made_from) as folder:
        tokenizer_file = _own_tokenizer(request, units, folder)
        tokenizer = open_tokenizer(tokenizer_file, request.end_mark, _name(request))
        task = Task(tokenizer_file, request.end_mark, request.field, request.longest, str(folder))
        total = _write_shards(task, tokenizer, units, request.workers, show_progress)
        left_out = {reason: (n, place_of(total.first[reason])) for reason, n in total.bad.items()}
        _check_found(request, total, left_out)
        note = _join(request, folder, units, tokenizer, total, made_from)
    return Prepared(request.out, note, left_out, sources.passed_over)


def _name(request: Request) -> str:
    return f"{Path(request.out).name}.tokenizer.json" if request.train_bpe else request.tokenizer


def _fingerprint(request: Request, sources: Sources, tokenizer: Tokenizer | None) -> str:
    """Of everything that decides about the shards; whether bad documents may be left out is decided afterwards."""
    said = [NOTE, sources.fingerprint(), tokenizer.digest if tokenizer else request.train_bpe, request.end_mark]
    said += [request.field, request.longest, request.unit_bytes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _already(request: Request, made_from: str) -> Note | None:
    """The note of what stands at `out`, if it is what is asked for; raises ConfigError if it is something else."""
    out = request.out
    files = [path for path in (Path(f"{out}.bin"), Path(f"{out}.idx"), note_path(out)) if path.exists()]
    if not files or request.overwrite:
        return None
    try:
        note = read_note(out)
        if note is not None and note.made_from == made_from and (request.skip_bad or not note.left_out):
            read_index(out)
            return note
    except ConfigError:
        pass
    raise ConfigError(
        f"{files[0]} is there, from other text or options, or damaged: choose another --out, or replace it with "
        "--overwrite"
    )


@contextmanager
def _parts(request: Request, made_from: str) -> Iterator[Path]:
    """The folder of shards, for this process alone; removed when all went well, kept for the next try otherwise."""
    folder = Path(f"{request.out}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process prepares {request.out}: wait for it, or choose another --out") from None
        plan = folder / "plan"
        if not plan.exists() or plan.read_text() != made_from:
            for path in folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            plan.write_text(made_from)
        for path in folder.glob("*.tmp"):
            path.unlink()
        yield folder
        shutil.rmtree(folder)


def _own_tokenizer(request: Request, units: list[Unit], folder: Path) -> str:
    """The tokenizer in a file of ours: a copy, or a new one."""
    if request.tokenizer == BYTES:
        return BYTES
    path = folder / "tokenizer.json"
    if not path.exists():
        temporary = folder / "tokenizer.tmp"
        if request.train_bpe:
            temporary.write_text(train_bpe(_sample(request, units), request.train_bpe), encoding="utf-8")
        else:
            given = Path(request.tokenizer).expanduser()
            shutil.copyfile(given / "tokenizer.json" if given.is_dir() else given, temporary)
        os.replace(temporary, path)
    return str(path)


def _sample(request: Request, units: list[Unit]) -> Iterator[str]:
    """The documents that a BPE is trained on: all, or units spread evenly over the text."""
    size = sum(unit.size for unit in units)
    keep = max(1, min(len(units), len(units) * BPE_BYTES // max(1, size)))
    for i in range(keep):
        for piece in units[i * len(units) // keep].pieces:
            for document in documents(piece, request.field, request.longest):
                if not isinstance(document, Bad):
                    yield document


def _write_shards(task: Task, tokenizer: Tokenizer, units: list[Unit], workers: int, show_progress: bool) -> Found:
    """Write what shards are missing; what all hold together."""
    folder = Path(task.folder)
    found = {unit.number: read_shard(unit.number, folder, tokenizer.dtype) for unit in units}
    missing = [unit for unit in units if found[unit.number] is None]
    size = sum(unit.size for unit in units)
    done = size - sum(unit.size for unit in missing)
    with AmountBar("tokenizing", size, done, enabled=show_progress) as bar:
        for unit, part in shards(task, tokenizer, missing, workers):
            found[unit.number] = part
            bar.add(unit.size)
    total = Found()
    for unit in units:
        part_of = found[unit.number]
        assert part_of is not None
        total.add(part_of)
    return total


def _check_found(request: Request, total: Found, left_out: dict[str, tuple[int, str]]) -> None:
    said = ", ".join(f"{n:,} {reason} (first: {place})" for reason, (n, place) in left_out.items())
    if left_out and not request.skip_bad:
        raise ConfigError(
            f"{sum(total.bad.values()):,} documents cannot be used: {said}; mend them, or leave them out with "
            f"--skip-bad (the other {total.documents:,} are tokenized and kept in {request.out}.parts)"
        )
    if not total.documents:
        raise ConfigError(f"{' '.join(request.sources)}: no document can be used: {said or 'all files are empty'}")


def _join(
    request: Request, folder: Path, units: list[Unit], tokenizer: Tokenizer, total: Found, made_from: str
) -> Note:
    """Put the shards together and into place."""
    import numpy

    with warnings.catch_warnings():  # that this machine has no GPU is no news here
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    out, new = request.out, folder / "new"
    builder = IndexedDatasetBuilder(f"{new}.bin", dtype=tokenizer.dtype)
    with builder.data_file:
        for unit in units:
            with (folder / f"{unit.number:06d}.bin").open("rb") as shard:
                shutil.copyfileobj(shard, builder.data_file, 1 << 24)
            lengths = numpy.load(folder / f"{unit.number:06d}.npy").tolist()
            begin = len(builder.sequence_lengths)
            builder.sequence_lengths += lengths
            builder.document_indices += range(begin + 1, begin + len(lengths) + 1)
        builder.data_file.flush()
        os.fsync(builder.data_file.fileno())
    builder.finalize(f"{new}.idx")
    note = Note(
        tokenizer=_name(request),
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        end_mark=tokenizer.end_mark,
        largest_token=total.largest_token,
        documents=total.documents,
        tokens=total.tokens,
        text_bytes=total.text_bytes,
        left_out=total.bad,
        made_from=made_from,
        bin_digest=digest(f"{new}.bin"),
        idx_digest=digest(f"{new}.idx"),
    )
    write_note(Path(f"{new}.json"), note)
    note_path(out).unlink(missing_ok=True)  # it would vouch for files that are about to change
    tokenizer_path(out).unlink(missing_ok=True)
    os.replace(f"{new}.bin", f"{out}.bin")
    os.replace(f"{new}.idx", f"{out}.idx")
    if request.tokenizer != BYTES:
        os.replace(folder / "tokenizer.json", tokenizer_path(out))
    os.replace(f"{new}.json", note_path(out))
    return note
