"""Safetensors files, written piece by piece: a tensor need not fit into memory.

The format is 8 bytes of length, a JSON header that names type, shape and place of each tensor, then their bytes. Files
are cut between tensors; more than one get an index.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moue_dist.config import ConfigError
from moue_dist.interchange.outgoing.entries import Entry

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_ALIGNED = 8  # bytes: where tensors begin


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    dtype: torch.dtype,
    *,
    most_bytes: int,
    wrote: Callable[[int], object] = lambda _: None,
) -> int:
    """Write `entries` as `dtype` into files of up to `most_bytes` (a larger tensor has one alone); returns all bytes.

    `wrote` hears of every piece, in bytes.
    """
    shards = _cut(entries, dtype, most_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, dtype, wrote)
    total = sum(_bytes(entry, dtype) for entry in entries)
    if len(shards) > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def size_of(entries: Sequence[Entry], dtype: torch.dtype) -> int:
    """Bytes of the tensors."""
    return sum(_bytes(entry, dtype) for entry in entries)


def _cut(entries: Sequence[Entry], dtype: torch.dtype, most_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = _bytes(entry, dtype)
        if size > room or not shards:
            shards.append([])
            room = most_bytes
        shards[-1].append(entry)
        room -= size
    return shards


def _write(path: Path, entries: Sequence[Entry], dtype: torch.dtype, wrote: Callable[[int], object]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        end = at + _bytes(entry, dtype)
        header[entry.name] = {
            "dtype": _NAMES[_type(entry, dtype)],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in entries:
                for piece in entry.pieces():
                    raw = piece.to(_type(entry, dtype)).contiguous().view(torch.uint8).numpy()
                    file.write(raw.data)
                    wrote(raw.nbytes)
            written = file.tell()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; free some space, or name another folder") from None
    assert written == 8 + len(text) + at, f"{path}: pieces do not add up to their tensors"


def _type(entry: Entry, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if entry.exact else dtype


def _bytes(entry: Entry, dtype: torch.dtype) -> int:
    return entry.numbers * _type(entry, dtype).itemsize
