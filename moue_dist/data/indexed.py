"""Tokenized files, `<prefix>.bin` and `<prefix>.idx` as megatron-core writes them, and our note beside them.

Megatron-LM, datatrove and NeMo Curator write the same two files; they are taken without a note. Everything is checked
before megatron-core's reader sees it, which would read past an end or answer with a traceback. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from moue_dist.config import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = len(_MAGIC) + 8 + 1 + 8 + 8  # magic, version, type, number of sequences, of document borders
_TYPES = {
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    6: numpy.float64,
    7: numpy.float32,
    8: numpy.uint16,
}
NOTE = 1  # raise it when a note of today could not be read any more


@dataclass(frozen=True)
class Index:
    """What an .idx says. A document is one sequence or several; borders[i] is the first sequence of document i."""

    prefix: str
    dtype: numpy.dtype
    lengths: numpy.ndarray  # int32 [sequences], tokens
    borders: numpy.ndarray  # int64 [documents + 1]

    @property
    def documents(self) -> int:
        return len(self.borders) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=numpy.int64))

    def document_lengths(self) -> numpy.ndarray:
        """Tokens of every document, int64."""
        ends = numpy.concatenate([[0], numpy.cumsum(self.lengths, dtype=numpy.int64)])
        return numpy.diff(ends[self.borders])

    def all_tokens(self) -> numpy.ndarray:
        """Every token, mapped from the file."""
        return numpy.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))


@dataclass(frozen=True)
class Note:
    """`<prefix>.moue.json`: what `moue data prepare` knows of the files beside it."""

    tokenizer: str  # bytes, or the name of the tokenizer.json
    tokenizer_digest: str
    vocab_size: int
    eod: int
    end_mark: str
    largest_token: int
    documents: int
    tokens: int
    text_bytes: int
    left_out: dict[str, int]  # reason -> documents
    made_from: str  # fingerprint of sources and options
    bin_digest: str  # sha256
    idx_digest: str
    note: int = NOTE


def note_path(prefix: str) -> Path:
    return Path(f"{prefix}.moue.json")


def tokenizer_path(prefix: str) -> Path:
    """The copy of the tokenizer that belongs to tokenized files."""
    return Path(f"{prefix}.tokenizer.json")


def write_note(path: Path, note: Note) -> None:
    path.write_text(json.dumps(asdict(note), indent=2, ensure_ascii=False) + "\n")


def read_note(prefix: str) -> Note | None:
    """The note beside tokenized files, or None; raises ConfigError for one that is broken or does not belong."""
    path = note_path(prefix)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        note = Note(**said)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is broken ({error}): prepare the data again, or remove this file") from None
    if note.note != NOTE:
        raise ConfigError(f"{path} is of format {note.note}, this version reads {NOTE}: prepare the data again")
    return note


def digest(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_digests(prefix: str, bin_digest: str, idx_digest: str) -> None:
    """Raises ConfigError for a file that is not what was written."""
    for suffix, said in ((".idx", idx_digest), (".bin", bin_digest)):
        if digest(f"{prefix}{suffix}") != said:
            raise ConfigError(
                f"{prefix}{suffix} is not what was written, its digest differs: prepare it again, with --overwrite"
            )


def read_index(prefix: str) -> Index:
    """The index of tokenized files, checked against itself and the size of its data; raises ConfigError."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise ConfigError(f"there is no {path}: expected the path of tokenized files, without .bin and .idx")

    def broken(what: str) -> ConfigError:
        return ConfigError(f"{idx} {what}: make the tokenized files again")

    with idx.open("rb") as stream:
        head = stream.read(_HEAD)
    size = idx.stat().st_size
    if len(head) < _HEAD or not head.startswith(_MAGIC):
        raise broken("is no index of tokenized files, or cut short")
    version = int.from_bytes(head[9:17], "little")
    code, sequences, borders = head[17], int.from_bytes(head[18:26], "little"), int.from_bytes(head[26:34], "little")
    if version != 1 or code not in _TYPES:
        raise broken(f"has version {version} and token type {code}, which megatron-core does not know")
    dtype = numpy.dtype(_TYPES[code])
    if not numpy.issubdtype(dtype, numpy.integer):
        raise broken(f"says that tokens are {dtype}, no whole numbers")
    need = _HEAD + sequences * (4 + 8) + borders * 8
    if size not in (need, need + sequences):  # the second with a mode a sequence, as multimodal files have
        raise broken(f"has {size} bytes where its head asks for {need}: it is cut short or damaged")
    if not sequences:
        raise broken("holds no documents")
    raw = numpy.memmap(idx, mode="r")
    lengths = raw[_HEAD : _HEAD + 4 * sequences].view("<i4")
    starts = raw[_HEAD + 4 * sequences : _HEAD + 12 * sequences].view("<i8")
    edges = raw[_HEAD + 12 * sequences : need].view("<i8")
    if int(lengths.min()) < 0:
        raise broken("has a negative length")
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * dtype.itemsize
    if starts[0] != 0 or not numpy.array_equal(starts[1:], ends[:-1]):
        raise broken("has lengths that do not lead from one place to the next")
    if not len(edges) or edges[0] != 0 or edges[-1] != sequences or (numpy.diff(edges) < 0).any():
        raise broken("has document borders that do not cover its sequences in order")
    if data.stat().st_size != int(ends[-1]):
        raise ConfigError(
            f"{data} has {data.stat().st_size} bytes, its index says {int(ends[-1])}: one of them is cut short or "
            "belongs to other data; make the tokenized files again"
        )
    return Index(prefix, dtype, lengths, edges)
