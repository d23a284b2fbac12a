"""A benchmark's JSON file: runs with every raw number.

The file is {"runs": [run, ...]}. A run has `what` (the form of the command), `command`, `commit`, `date`, `machine`,
`versions`, `config`, `world`, and a `parts` entry for each thing measured: either its numbers or {"error": one line}.
benchmarks/README.md says what the numbers of each form are.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from moue_dist.config import ConfigError


def earlier_runs(path: Path, append: bool) -> list[Any]:
    """The runs to keep: those of an existing file when appending. Raises ConfigError for an unusable path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise _unwritable(path, "not a file, or in a folder that cannot be written")
    if not append or not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if isinstance(runs, list):
            return runs
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--append: {path} is no file of benchmark runs; choose another --output or leave --append out")


def _unwritable(path: Path, why: str | None) -> ConfigError:
    return ConfigError(f"--output {path}: {why}; choose a file that can be written")


def write(path: Path, runs: list[Any]) -> None:
    """Write the file at once or not at all. Raises ConfigError where the folder cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(_plain({"runs": runs}), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def _plain(value: Any) -> Any:
    """JSON without NaN or infinity: those become the words 'nan', 'inf', '-inf'."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
