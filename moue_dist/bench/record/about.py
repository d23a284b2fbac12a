"""What a run was and on what: the head of its record."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from moue_dist.bench.options import BenchOptions, Form
from moue_dist.config import Config
from moue_dist.measuring.provenance import commit, machine, versions
from moue_dist.refusals.machine import Resolved


def describe(what: Form, config: Config, options: BenchOptions, resolved: Resolved, world: int) -> dict[str, Any]:
    """The run's entry of the file, without parts yet. `world`: ranks of the layout."""
    chosen = asdict(options)
    asked, _ = chosen.pop("asked"), chosen.pop("part")
    return {
        "what": what,
        "command": asked or shlex.join(["moue", *sys.argv[1:]]),
        "note": chosen.pop("note"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(resolved.device == "cuda"),
        "versions": versions(),
        "world": world,
        "options": chosen,
        "config": asdict(config),
        "resolved": resolved._asdict(),
        "parts": {},
        "ratio": None,
    }
