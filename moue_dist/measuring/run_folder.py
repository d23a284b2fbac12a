"""A run folder, read: what `moue train` left behind, also where the run was killed half-way.

What is expected in the folder: `config.yaml` (the resolved configuration), `run.json` (versions, device, world_size,
grid, parameters, flops_per_token, commit) and `metrics.jsonl` (one object per line, by `kind`: train, valid, usage,
event). Everything that is missing or unreadable becomes a note for the reader of the report, not an error: only a
folder that is no run folder at all is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from moue_dist.config import Config, ConfigError
from moue_dist.config.topology import Topology, build_topology
from moue_dist.parallel.mesh import stage_layout


@dataclass(frozen=True)
class Run:
    """One run. `train`, `valid`, `usage` and `events` are the metrics lines of that kind, in order of steps."""

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]  # run.json
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    usage: list[dict[str, Any]]
    events: list[dict[str, Any]]
    notes: tuple[str, ...] = ()  # what was missing or odd, in words

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def world_size(self) -> int | None:
        """Ranks of the run; None where run.json does not say."""
        size = self.facts.get("world_size")
        return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None

    @property
    def device(self) -> str:
        return str(self.facts.get("device") or self.facts.get("device_name") or "unknown device")

    def option(self, path: str) -> Any:
        """A configuration value by its dotted name, such as "moe.top_k"; the default where config.yaml lacks it."""
        value: Any = self.config
        default: Any = Config()
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
            default = getattr(default, key)
        return default if value is None else value

    def series(self, path: str) -> tuple[list[float], list[float]]:
        """Steps and values of one number of the train lines, such as "loss" or "load.dead"; NaN where it is missing."""
        return [number(line, "step") for line in self.train], [number(line, path) for line in self.train]

    def steady(self) -> list[dict[str, Any]]:
        """The train lines after warming up: without the first tenth, at least two; never none of them."""
        skip = max(2, math.ceil(0.1 * len(self.train)))
        return self.train[skip:] or self.train[-1:]

    def steady_median(self, path: str) -> float:
        """Median over the steady steps; NaN where no steady step has the number."""
        values = [v for v in (number(line, path) for line in self.steady()) if math.isfinite(v)]
        return median(values) if values else math.nan

    def topology(self) -> Topology | None:
        """The windows of the MoE layers; None where config.yaml does not give them."""
        if not isinstance(self.config.get("moe"), dict):
            return None
        o = self.option
        try:
            layers = int(o("model.layers")) - int(o("model.dense_layers"))
            sizes = {key: int(o(f"moe.{key}")) for key in ("window", "stride", "group")}
            return build_topology(o("moe.topology"), layers, int(o("moe.pool")), **sizes) if layers > 0 else None
        except (ValueError, TypeError):
            return None

    def layer_to_stage(self) -> list[int]:
        """The pipeline rank (0-based) of each MoE layer. Virtual stage v * PP + p lives on pipeline rank p."""
        o = self.option
        try:
            pipeline, virtual = int(o("parallel.pipeline_parallel")), int(o("parallel.virtual_stages"))
            layout = stage_layout(int(o("model.layers")), pipeline, virtual, tuple(o("parallel.stage_layers")))
        except (ValueError, TypeError):
            return []
        ranks = [stage % pipeline for stage, layers in enumerate(layout) for _ in layers]
        return ranks[int(o("model.dense_layers")) :]


def number(line: dict[str, Any], path: str) -> float:
    """The number at a dotted path of a metrics line; NaN where it is missing, null or no number."""
    value: Any = line
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ConfigError where `folder` is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; name a folder that `moue train` wrote (<output>/<name>)")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has neither config.yaml nor metrics.jsonl; "
            "name a folder that `moue train` wrote (<output>/<name>)"
        )
    notes: list[str] = []
    config = _read_mapping(folder / "config.yaml", notes)
    facts = _read_mapping(folder / "run.json", notes)
    lines = _read_lines(folder / "metrics.jsonl", notes)
    train, valid, usage, events = _by_kind(lines, notes)
    return Run(folder, config, facts, train, valid, usage, events, tuple(notes))


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing, so some facts are unknown.")
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        notes.append(f"{path.name} could not be read, so some facts are unknown.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no mapping, so some facts are unknown.")
        return {}
    return value


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A killed run may leave half a line: such lines are counted and left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} is missing or could not be read: no step was recorded.")
        return []
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    rows = text.splitlines()
    for i, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except ValueError:
            value = None
        if isinstance(value, dict) and math.isfinite(number(value, "step")):
            lines.append(value)
        else:
            bad.append(i)
    if bad == [len(rows)]:
        notes.append(f"The last line of {path.name} is cut off, as a killed run leaves it; it was left out.")
    elif bad:
        notes.append(f"{len(bad)} unreadable line(s) of {path.name} were left out (first: line {bad[0]}).")
    return lines


def _by_kind(
    lines: list[dict[str, Any]], notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Sort lines by kind. A run that was resumed repeats steps: the later telling replaces the earlier."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "usage": [], "event": []}
    for line in lines:
        kind, step = line.get("kind"), line["step"]
        if kind not in kinds:
            continue
        if kind == "train" and kinds["train"] and kinds["train"][-1]["step"] >= step:
            notes.append(f"The run went back to step {step:g} (resumed); the repeated steps are shown once.")
            for told in ("train", "valid", "usage"):
                kinds[told] = [old for old in kinds[told] if old["step"] < step]
        elif kind == "valid" and kinds["valid"] and kinds["valid"][-1]["step"] >= step:
            kinds["valid"] = [old for old in kinds["valid"] if old["step"] < step]
        kinds[kind].append(line)
    kinds["usage"] = [line for line in kinds["usage"] if _usage_is_sound(line)]
    return kinds["train"], kinds["valid"], kinds["usage"], kinds["event"]


def _usage_is_sound(line: dict[str, Any]) -> bool:
    layers, counts = line.get("layers"), line.get("counts")
    if not isinstance(layers, list) or not isinstance(counts, list) or not counts or len(layers) != len(counts):
        return False
    rows = [row for row in counts if isinstance(row, list) and len(row) == len(counts[0]) > 0]
    return len(rows) == len(counts) and all(isinstance(n, int | float) and n >= 0 for row in rows for n in row)
