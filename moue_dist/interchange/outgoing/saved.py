"""A checkpoint of ours, read in one process: by torch's own reader, without ranks, trainer or GPU, a part at a time.

Names are those of the whole model (`moue_dist/model/init.py`).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moue_dist.checkpoint.description import FILE, Position, check_model, find
from moue_dist.checkpoint.names import checkpoint_key, other_key
from moue_dist.config import Config, ConfigError
from moue_dist.config.load import load_config
from moue_dist.model.mask import mask_value

_MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")  # fp32, of weights that are trained in 16 bits


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest of the run (or of the folder of checkpoints) that it is."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name a run (<output>/<name>) or one of its checkpoints")
    if path.name.startswith(("step_", ".writing_step_")) and not (path / FILE).is_file():
        raise ConfigError(f"{path} is not a complete checkpoint: it has no {FILE}; name another one, or the run")
    return find(path)


def find_config(checkpoint: Path) -> Path:
    """The config.yaml that belongs to a checkpoint: beside it, or of the run that it stands in."""
    places = [checkpoint / "config.yaml", checkpoint.parent / "config.yaml", checkpoint.parent.parent / "config.yaml"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"{places[-1]} is missing: it says what model {checkpoint} holds; put the run's back")


@dataclass(frozen=True)
class Saved:
    """An opened checkpoint."""

    path: Path
    config: Config
    position: Position

    @classmethod
    def open(cls, path: Path) -> Saved:
        """The checkpoint `path`, or the newest of the run `path`. Raises ConfigError where there is none to read."""
        checkpoint = find_checkpoint(path)
        config = load_config(find_config(checkpoint))
        saved = cls(checkpoint, config, check_model(config, checkpoint))
        _ = saved._tensors  # what cannot be read is said now
        return saved

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ConfigError where the checkpoint lacks the tensor or has it in another shape."""
        found = tuple(self._stored(name)[1].size)
        if found != shape:
            raise ConfigError(
                f"{self.path} has {name} in the shape {found}, where {find_config(self.path)} asks for {shape}: it is "
                "not the configuration that made it"
            )

    def read(self, name: str, rows: tuple[int, int] | None = None, *, masters: bool = False) -> Tensor:
        """The tensor, or its rows [first, end) of the first axis; `masters`: in fp32 where the optimizer has it so."""
        key, about = self._stored(name)
        if masters and about.properties.dtype != torch.float32:
            key = next((head + key for head in _MASTERS if head + key in self._tensors), key)
            about = self._tensors[key]
        first, end = rows or (0, about.size[0])
        size = torch.Size((end - first, *about.size[1:]))
        part = ChunkStorageMetadata(torch.Size((first, *(0 for _ in size[1:]))), size)
        items = create_read_items_for_chunk_list(key, about, [part])
        if sum(item.lengths.numel() for item in items) != size.numel():
            raise ConfigError(f"{self.path} holds {key} only in part: it is broken; name another checkpoint")
        out = torch.empty(size, dtype=about.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()  # type: ignore[arg-type]
        except (OSError, RuntimeError, AssertionError, EOFError, pickle.UnpicklingError, KeyError) as error:
            raise ConfigError(f"{self.path} is broken: {key} cannot be read ({_first_line(error)})") from None
        return out

    @cached_property
    def window(self) -> int:
        """Experts that a layer sees."""
        return self.config.topology().window

    @cached_property
    def expert_bias(self) -> Tensor | None:
        """The loss-free bias fp32 [P] that moves the choice of experts; None for a model that does not use one."""
        return self._common["balance"]["bias"].float() if self.config.balance.bias else None

    @cached_property
    def mask_lw(self) -> Tensor | None:
        """What the routers add to their logits after this many steps, fp32 [L, W]; None where that is nothing."""
        value = mask_value(self.config.moe.mask_start, self.config.moe.mask_steps, self.position.step)
        return self._common["mask"]["hidden_lw"].float() * value if value else None

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What is in the checkpoint beside sharded tensors, with what is read of it."""
        try:
            common: dict[str, Any] = torch.load(self.path / "common.pt", weights_only=True, map_location="cpu")
            _ = common["balance"]["bias"], common["mask"]["hidden_lw"] if self.config.moe.mask_steps else None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
            raise ConfigError(f"{self.path} is broken: common.pt cannot be read ({_first_line(error)})") from None
        return common

    @cached_property
    def _reader(self) -> FileSystemReader:
        return FileSystemReader(self.path)

    @cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        try:
            about = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise ConfigError(f"{self.path} is broken: .metadata cannot be read ({_first_line(error)})") from None
        self._reader.set_up_storage_reader(about, is_coordinator=True)
        return {k: v for k, v in about.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def _stored(self, name: str) -> tuple[str, TensorStorageMetadata]:
        for key in (checkpoint_key(name), other_key(checkpoint_key(name))):
            if key in self._tensors:
                return key, self._tensors[key]
        raise ConfigError(f"{self.path} holds no {name}: is {find_config(self.path)} the configuration that made it?")


@dataclass
class _Into:
    """The part of a load planner that a reader asks: where in `out` an item goes."""

    out: Tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        part = self.out
        for axis, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
