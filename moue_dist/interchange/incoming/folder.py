"""A Hugging Face folder: its config.json, and tensors by name, read one at a time from safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moue_dist.config import ConfigError

INDEX = "model.safetensors.index.json"
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Folder:
    """What a folder holds. Reads headers at once and numbers when asked. Raises ConfigError for what is not right."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; name one with config.json and *.safetensors")
        if (path / "checkpoints").is_dir() or (path / "moue.json").is_file():
            raise ConfigError(
                f"{path} is a model of ours already: name it in train.start_from, or deepen it with --add-layers"
            )
        self.path = path
        self.config = self._read_config()
        self._files = {name: self._open(name) for name in self._names()}
        self._where = {name: file for file, part in self._files.items() for name in list(part.keys())}
        self._check_index()
        self.read: set[str] = set()

    def _read_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} has no config.json, so that its model is unknown") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{file} is not a mapping of keys to values")
        return config

    def _names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            names = sorted(set(self._index().values()))
            gone = [name for name in names if not (self.path / name).is_file()]
            if gone:
                raise ConfigError(f"{self.path / INDEX} names {gone[0]}, which is not there; complete the download")
            return names
        names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not names:
            pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(ending))
            if pickles:
                raise ConfigError(
                    f"{self.path / pickles[0]} is a pickle, which can run any program when it is read, so it is not: "
                    "take a revision in safetensors, or save the model again with save_pretrained"
                )
            raise ConfigError(f"{self.path} has no *.safetensors")
        return names

    def _index(self) -> dict[str, str]:
        try:
            entries = json.loads((self.path / INDEX).read_text())["weight_map"]
            return {str(name): str(file) for name, file in entries.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{self.path / INDEX} has no readable weight_map; complete the download") from None

    def _check_index(self) -> None:
        if (self.path / INDEX).is_file():
            for name, file in self._index().items():
                if self._where.get(name) != file:
                    raise ConfigError(f"{self.path / file} lacks the tensor {name} that the index places there")

    def _open(self, name: str) -> Any:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise ConfigError("reading models needs the package safetensors: pip install 'moue-dist[hf]'") from None
        try:
            return safe_open(str(self.path / name), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path / name} is no whole safetensors file ({error}); fetch it again") from None

    def key(self, *names: str, default: Any = ...) -> Any:
        """The first of these keys of config.json that is there and not null. Raises ConfigError without a default."""
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is ...:
            raise ConfigError(f"{self.path / 'config.json'} has no {' or '.join(names)}")
        return default

    def number(self, *names: str, default: Any = ...) -> int:
        """`key`, a whole number of at least 1."""
        value = self.key(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{self.path / 'config.json'}: {' or '.join(names)} is {value!r}, expected a whole number"
            )
        return value

    def has(self, name: str) -> bool:
        return name in self._where

    @property
    def tensors(self) -> set[str]:
        return set(self._where)

    def check(self, name: str, shape: Sequence[int]) -> torch.dtype:
        """The type of a tensor that is there in this shape; raises ConfigError otherwise."""
        if name not in self._where:
            raise ConfigError(f"{self.path} lacks the tensor {name}, expected in shape {list(shape)}")
        part = self._files[self._where[name]].get_slice(name)
        if list(part.get_shape()) != list(shape):
            raise ConfigError(
                f"{self.path}: the tensor {name} has shape {list(part.get_shape())}, config.json says {list(shape)}"
            )
        if part.get_dtype() not in TYPES:
            raise ConfigError(
                f"{self.path}: the tensor {name} is of type {part.get_dtype()}; expected one of {', '.join(TYPES)}"
            )
        self.read.add(name)
        return TYPES[part.get_dtype()]

    def get(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or row `row` of its first axis."""
        part = self._files[self._where[name]].get_slice(name)
        return part[:] if row is None else part[row]  # type: ignore[no-any-return]
