"""The parts of a benchmark one after the other, each in processes of its own: what one leaves burdens no other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moue_dist.bench.options import BenchOptions
from moue_dist.config import BAD_CONFIGURATION


def measure_apart(options: BenchOptions, command: str, start: Callable[[BenchOptions], int]) -> int:
    """Measure every part of `options` by `start`, which returns its exit code, and show them together.

    `command` is what the user called, kept with the numbers. The worst part's exit code; after a refusal, which `start`
    has explained, nothing more is tried.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.output or Path(folder) / "result.json")
        before, codes = _written(path), []
        for name in options.parts:
            begun = _written(path) != before  # not where the parts so far ended without a word
            part = replace(options, output=str(path), part=name, asked=command)
            codes.append(start(replace(part, append=options.append and not begun, join=options.join or begun)))
            if codes[-1] == BAD_CONFIGURATION:
                return BAD_CONFIGURATION
        if _written(path) != before:
            from moue_dist.bench.record.tables import tell

            tell(json.loads(path.read_text(encoding="utf-8"))["runs"][-1], options)
        return max(codes)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
