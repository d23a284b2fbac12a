"""The tokenized files that a run reads: found, checked against the model, and the same on all ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy
import torch.distributed as dist

from moue_dist.config import Config, ConfigError
from moue_dist.config.blend import Share, parse_blend
from moue_dist.data.corpus import EOD, find_corpus
from moue_dist.data.indexed import Index, Note, check_digests, read_index, read_note
from moue_dist.data.inspect import tokenizer_of
from moue_dist.data.tokenizer import Tokenizer

Result = TypeVar("Result")
VERIFIED_BYTES = 16 << 30  # of larger files `moue data inspect --verify` compares digests, not the start of every run


@dataclass(frozen=True)
class Part:
    """One pair of files. weight: its share of the samples; indices: folder for what is derived from it."""

    prefix: str
    weight: float
    indices: str
    name: str  # what messages call it


@dataclass(frozen=True)
class Tokenized:
    """What a run reads. eod: the end mark's id, None where nobody says it; unit: what messages call a token."""

    parts: tuple[Part, ...]
    eod: int | None
    unit: str = "tokens"


def find_tokenized(config: Config, folder: Path) -> Tokenized:
    """Rank 0's files, seen by all ranks: nodes with other sources must not train on other text.

    A collective where torch.distributed is up. `folder` keeps the corpus of data.source and all indices. Raises
    ConfigError, the same on all ranks.
    """
    found = _from_rank_0(lambda: _blend(config, folder) if config.data.blend else _corpus(config, folder))
    for part in found.parts:
        sizes = [Path(f"{part.prefix}{suffix}") for suffix in (".bin", ".idx")]
        mine = [path.stat().st_size if path.is_file() else -1 for path in sizes]
        all_sizes = [mine]
        if dist.is_initialized():
            all_sizes = [mine] * dist.get_world_size()
            dist.all_gather_object(all_sizes, mine)
        for rank, seen in enumerate(all_sizes):
            if seen != all_sizes[0]:
                what = "cannot see" if -1 in seen else "sees another"
                raise ConfigError(
                    f"rank {rank} {what} {part.prefix}.bin or .idx: keep tokenized files, and data.cache (or output), "
                    "on a file system that all nodes share"
                )
    return found


def _from_rank_0(find: Callable[[], Result]) -> Result:
    """What rank 0 finds, or its refusal, on every rank."""
    answer: list[tuple[Result | None, str]] = [(None, "")]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [(find(), "")]
        except ConfigError as error:
            answer = [(None, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    found, refusal = answer[0]
    if found is None:
        raise ConfigError(refusal)
    return found


def _corpus(config: Config, folder: Path) -> Tokenized:
    if config.model.vocab_size < 256:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} cannot hold the 256 bytes; set at least 256")
    corpus = find_corpus(config.data, folder)
    name = f"data.source={config.data.source}"
    if corpus is None:
        raise ConfigError(f"there is no corpus of {name} in {folder}: prepare it first")
    return Tokenized((Part(str(folder / corpus.prefix), 1.0, str(folder / "index"), name),), EOD, "bytes")


def _blend(config: Config, folder: Path) -> Tokenized:
    parts, tokenizers = [], {}
    for share in parse_blend(config.data.blend):
        prefix = str(Path(share.prefix).expanduser().resolve())
        index, note = read_index(prefix), read_note(prefix)
        key = _key(prefix)
        _check_note(index, note, folder / "index", key)
        parts.append(Part(prefix, share.weight, str(folder / "index" / key[:16]), share.prefix))
        tokenizer = tokenizer_of(prefix, note, config.data.tokenizer)
        if tokenizer is not None and note is not None and tokenizer.digest != note.tokenizer_digest:
            raise ConfigError(
                f"{share.prefix} was made with the tokenizer {note.tokenizer}, not with {tokenizer.name}: leave out "
                "data.tokenizer, or prepare the text again"
            )
        largest = note.largest_token if note is not None else _largest_token(index, folder / "index", key)
        _check_vocabulary(config, share, tokenizer, largest)
        tokenizers[tokenizer.digest if tokenizer else None] = tokenizer, share.prefix
    if len(tokenizers) > 1:
        (_, one), (_, other) = list(tokenizers.values())[:2]
        raise ConfigError(
            f"data.blend: {one} and {other} are tokens of different tokenizers, or nobody says of which; prepare them "
            "with one, or name that of files without a note in data.tokenizer"
        )
    ((tokenizer, _),) = tokenizers.values()
    return Tokenized(tuple(parts), tokenizer.eod if tokenizer else None)


def _key(prefix: str) -> str:
    """Names what is derived from two files as they are now: indices of other data must not be taken for theirs."""
    said = [prefix]
    for suffix in (".bin", ".idx"):
        stat = Path(f"{prefix}{suffix}").stat()
        said += [str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256("\0".join(said).encode("utf-8", "surrogateescape")).hexdigest()


def _check_note(index: Index, note: Note | None, folder: Path, key: str) -> None:
    """Whether a note belongs to the files beside it, by their digests: read once, then known."""
    if note is None:
        return
    if (note.tokens, note.documents) != (index.tokens, index.documents):
        raise ConfigError(
            f"{index.prefix}.moue.json speaks of {note.tokens} tokens in {note.documents} documents, the files beside "
            f"it hold {index.tokens} in {index.documents}: prepare them again, or remove the note"
        )
    known = folder / f"verified-{key[:16]}"
    if index.tokens * index.dtype.itemsize <= VERIFIED_BYTES and not known.exists():
        check_digests(index.prefix, note.bin_digest, note.idx_digest)
        folder.mkdir(parents=True, exist_ok=True)
        known.touch()


def _largest_token(index: Index, folder: Path, key: str) -> int:
    """Of files without a note: read once, then known."""
    known = folder / f"largest-{key[:16]}.json"
    try:
        return int(json.loads(known.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    tokens, least, most = index.all_tokens(), 0, 0
    for begin in range(0, len(tokens), 1 << 26):
        block = tokens[begin : begin + (1 << 26)]
        least, most = min(least, int(numpy.min(block))), max(most, int(numpy.max(block)))
    if least < 0:
        raise ConfigError(f"{index.prefix}.bin holds token {least}: make the tokenized files again")
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(most))
    return most


def _check_vocabulary(config: Config, share: Share, tokenizer: Tokenizer | None, largest: int) -> None:
    has = config.model.vocab_size
    if tokenizer is not None:
        if largest >= tokenizer.vocab_size:
            raise ConfigError(
                f"{share.prefix} holds token {largest}, beyond the {tokenizer.vocab_size} of {tokenizer.name}: it was "
                "made with another tokenizer; name that one in data.tokenizer"
            )
        if tokenizer.vocab_size > has:
            raise ConfigError(
                f"model.vocab_size={has} cannot hold the {tokenizer.vocab_size} tokens of {tokenizer.name}, which "
                f"{share.prefix} was made with; set at least {tokenizer.vocab_size}"
            )
    elif largest >= has:
        raise ConfigError(
            f"{share.prefix} holds token {largest}, beyond model.vocab_size={has}; set at least {largest + 1}"
        )
