"""Writes a checkpoint of weights alone, tensor by tensor: what is in memory is the tensor that is being written.

The files are torch.distributed.checkpoint's, as megatron-core reads them.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moue_dist.checkpoint.description import FILE, Position, describe
from moue_dist.config import Config
from moue_dist.interchange.incoming.entries import Entry
from moue_dist.parallel.mesh import build_mesh

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_checkpoint(
    folder: Path,
    config: Config,
    entries: Sequence[Entry],
    dtype: torch.dtype,
    state: dict[str, dict[str, Tensor]],
    wrote: Callable[[int], None],
) -> Path:
    """`folder/step_00000000`, with `latest` beside it; `state` is what every rank has whole (balance, mask).

    `wrote` is told the bytes of each tensor. All entries are of type `dtype`.
    """
    path = folder / "step_00000000"
    path.mkdir(parents=True)
    planner = _Planner(entries, dtype, wrote)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is to be
        dcp.save({}, storage_writer=_Writer(str(path)), planner=planner, no_dist=True)
    torch.save(state, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(FORMAT))
    about = describe(config, build_mesh(1, config.parallel), Position(0, 0), weights_alone=True)
    (path / FILE).write_text(json.dumps(about, indent=2) + "\n")
    (folder / "latest").write_text(path.name + "\n")
    return path


class _Writer(dcp.FileSystemWriter):
    """Keeps no tensor: torch's own holds the last one of every key until all are written (filesystem.py:451)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, results = "__0_0.distcp", []
        with (Path(self.path) / name).open("wb") as stream:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # a part of a file's pages, which would be saved whole
                begin = stream.tell()
                torch.save(tensor, stream)
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Planner(SavePlanner):
    """Tells the writer sizes and places at first, and makes each tensor when it is to be written."""

    def __init__(self, entries: Sequence[Entry], dtype: torch.dtype, wrote: Callable[[int], None]) -> None:
        self._properties, self._wrote = TensorProperties(dtype=dtype), wrote
        self._entries = {_index(entry): entry for entry in entries}
        assert len(self._entries) == len(entries), "two entries for one place"

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(index, entry) for index, entry in self._entries.items()])

    def _item(self, index: MetadataIndex, entry: Entry) -> WriteItem:
        data = TensorWriteData(_chunk(entry), self._properties, torch.Size(entry.shape))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        for entry in self._entries.values():
            chunks[entry.key].append(_chunk(entry))
        sizes = {entry.key: torch.Size(entry.shape) for entry in self._entries.values()}
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(self._properties, sizes[key], mine) for key, mine in chunks.items()
        }
        return all_plans, Metadata(tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        entry = self._entries[write_item.index]
        tensor = entry.make().contiguous()
        assert tensor.shape == _chunk(entry).sizes and tensor.dtype == self._properties.dtype, entry.key
        self._wrote(tensor.nbytes)
        return tensor


def _chunk(entry: Entry) -> ChunkStorageMetadata:
    rows = entry.shape[0] if entry.rows is None else entry.rows
    rest = entry.shape[1:]
    return ChunkStorageMetadata(torch.Size([entry.first, *(0 for _ in rest)]), torch.Size([rows, *rest]))


def _index(entry: Entry) -> MetadataIndex:
    return MetadataIndex(entry.key, _chunk(entry).offsets)
