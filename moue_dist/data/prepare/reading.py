"""Documents out of pieces of files; what is none is said, with its place. Free of torch."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from moue_dist.config import ConfigError
from moue_dist.data.prepare.sources import Piece

BROKEN, NO_FIELD, NOT_UTF8, EMPTY, TOO_LONG = (
    "broken JSON line",
    "without the field",
    "not UTF-8",
    "empty",
    "longer than --max-document-mb",
)


@dataclass(frozen=True)
class Bad:
    """What stands where a document should. `at`: byte of a .jsonl where its line begins, or row of Parquet, or -1."""

    reason: str
    path: str
    at: int = -1


def documents(piece: Piece, field: str, longest: int) -> Iterator[str | Bad]:
    """The documents of a piece, each as text or as what is wrong with it; `longest` in bytes.

    Raises ConfigError for a file that cannot be read on: broken compression, broken Parquet, no such column.
    """
    try:
        if piece.kind == "parquet":
            yield from _rows(piece, field, longest)
        elif piece.kind == "jsonl":
            yield from _lines(piece, field, longest)
        else:
            yield _whole(piece, longest)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's and gzip's own are among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{piece.path} cannot be read: {reason}; mend the file, or leave it out") from None


def _checked(raw: bytes, path: str, at: int, longest: int) -> str | Bad:
    if not raw:
        return Bad(EMPTY, path, at)
    if len(raw) > longest:
        return Bad(TOO_LONG, path, at)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return Bad(NOT_UTF8, path, at)


def _whole(piece: Piece, longest: int) -> str | Bad:
    with _open(piece) as stream:
        return _checked(stream.read(longest + 1), piece.path, -1, longest)


def _open(piece: Piece) -> BinaryIO:
    if piece.packing == ".gz":
        return gzip.open(piece.path, "rb")  # type: ignore[return-value]
    if piece.packing == ".zst":
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.OSFile(piece.path), "zstd")
        return io.BufferedReader(unpacked, 1 << 20)  # type: ignore[arg-type]
    return open(piece.path, "rb", buffering=1 << 20)


def _lines(piece: Piece, field: str, longest: int) -> Iterator[str | Bad]:
    """The lines that begin in the piece. JSON may spell a character in six bytes, and has other fields."""
    room = 6 * longest + (1 << 20)
    with _open(piece) as stream:
        at = piece.begin
        if at:
            stream.seek(at - 1)
            at += len(_line(stream, room)[0]) - 1
        while piece.packing or at < piece.end:
            line, length = _line(stream, room)
            if not length:
                return
            if length > room:
                yield Bad(TOO_LONG, piece.path, at)
            elif line.strip():
                yield _of_json(line, piece.path, at, field, longest)
            at += length


def _line(stream: BinaryIO, room: int) -> tuple[bytes, int]:
    """The next line and its length; of one longer than `room` only the length is right."""
    line = stream.readline(room + 1)
    length, end = len(line), line[-1:]
    while length > room and end not in (b"\n", b""):
        more = stream.readline(1 << 20)
        length, end = length + len(more), more[-1:]
    return line, length


def _of_json(line: bytes, path: str, at: int, field: str, longest: int) -> str | Bad:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Bad(NOT_UTF8, path, at)
    except (ValueError, RecursionError):
        return Bad(BROKEN, path, at)
    if not isinstance(row, dict):
        return Bad(BROKEN, path, at)
    text = row.get(field)
    if not isinstance(text, str):
        return Bad(NO_FIELD, path, at)
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return Bad(NOT_UTF8, path, at)
    return _checked(raw, path, at, longest)


def _rows(piece: Piece, field: str, longest: int) -> Iterator[str | Bad]:
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with ParquetFile(piece.path) as file:
        column = next((column for column in file.schema_arrow if column.name == field), None)
        if column is None:
            known = ", ".join(file.schema_arrow.names)
            raise ConfigError(f"{piece.path} has no column {field!r}: its columns are {known}; name one with --field")
        if not any(is_(column.type) for is_ in (types.is_string, types.is_large_string, types.is_string_view)):
            raise ConfigError(
                f"{piece.path}: column {field!r} holds {column.type}, not text; name another with --field"
            )
        at = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
        groups = list(range(piece.begin, piece.end))
        for batch in file.iter_batches(256, row_groups=groups, columns=[field]):
            for cell in batch.column(0):
                buffer = cell.as_buffer()
                yield (
                    Bad(NO_FIELD, piece.path, at)
                    if buffer is None
                    else _checked(buffer.to_pybytes(), piece.path, at, longest)
                )
                at += 1


def place_of(bad: Bad) -> str:
    """a.jsonl:17, a.parquet row 3, or the file's name."""
    if bad.at < 0:
        return bad.path
    if bad.path.endswith(".parquet"):
        return f"{bad.path} row {bad.at}"
    packing = bad.path[bad.path.rfind(".") :]
    line, left = 1, bad.at
    with _open(Piece(bad.path, "jsonl", packing if packing in (".gz", ".zst") else "", 0, 0)) as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            line += block.count(b"\n")
            left -= len(block)
    return f"{bad.path}:{line}"
