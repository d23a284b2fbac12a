"""What a checkpoint's `moue.json` says of it, and what is refused by it. Free of torch: no tensor is read.

It names the format, the position of the run, the layout and the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moue_dist.config import Config, ConfigError
from moue_dist.config.load import FORMER
from moue_dist.parallel.mesh import Mesh

FILE = "moue.json"
FORMAT = 2  # of moue.json and of what stands beside it; raise it when older checkpoints cannot be read any more


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished optimizer steps and tokens seen."""

    step: int
    tokens: int


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None. Raises ConfigError where it names one that is gone."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not (path / FILE).is_file():
        raise ConfigError(
            f"{pointer} names {path.name}, which is not a complete checkpoint: write the name of another "
            f"step_* folder into it, or move {folder} away to start afresh"
        )
    return path


def find(folder: Path) -> Path:
    """The newest checkpoint of a run or a converted model, or the one that `folder` is. Raises ConfigError."""
    if (folder / FILE).is_file():
        return folder
    for place in (folder / "checkpoints", folder):
        path = newest(place)
        if path is not None:
            return path
    raise ConfigError(f"no checkpoint in {folder}: name a run's folder, a step_* folder or what `moue convert` wrote")


def start_of(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint that a new run in `run_dir` starts with; None for a run that goes on or starts afresh.

    Raises ConfigError where that is not there or of another model.
    """
    if not config.train.start_from or newest(run_dir / "checkpoints") is not None:
        return None
    try:
        path = find(Path(config.train.start_from).expanduser())
    except ConfigError as error:
        raise ConfigError(f"train.start_from: {error}") from None
    about = _read(path)
    known = _completed(about["model"]) | about.get("function", {})
    for name, mine in (_model_of(config) | _function_of(config)).items():
        if name in known and known[name] != mine:
            raise ConfigError(
                f"train.start_from={config.train.start_from}: its model has {name}={known[name]}, this run has {mine}: "
                "take the model of the config.yaml beside it"
            )
    return path


def describe(config: Config, mesh: Mesh, position: Position, *, weights_alone: bool = False) -> dict[str, Any]:
    """What moue.json says about a checkpoint; `weights_alone`: it has no optimizer state, so that no run resumes it."""
    return {
        "format": FORMAT,
        "step": position.step,
        "tokens": position.tokens,
        "layout": _layout_of(config, mesh),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "weights_alone": weights_alone,
        "model": _model_of(config),
        "function": _function_of(config),
    }


def _function_of(config: Config) -> dict[str, Any]:
    """What else makes the same weights another function: a run may change it, but does not start with it changed."""
    names = ("topology", "window", "stride", "group", "top_k", "score", "renormalise", "route_scale", "state_decay")
    own = {"model.rope_base": config.model.rope_base, "model.norm_eps": config.model.norm_eps}
    return own | {f"moe.{n}": getattr(config.moe, n) for n in names}


def _model_of(config: Config) -> dict[str, Any]:
    m, e = config.model, config.moe
    names = ("layers", "hidden_size", "heads", "kv_heads", "vocab_size", "dense_layers", "qk_norm", "tied_head")
    moe = ("pool", "expert_width", "router", "state_width", "shared_expert_width")
    own = {"model.head_dim": m.head_width, "model.clip_qkv": m.clip_qkv}
    return {f"model.{n}": getattr(m, n) for n in names} | own | {f"moe.{n}": getattr(e, n) for n in moe}


def _completed(model: dict[str, Any]) -> dict[str, Any]:
    """The entry `model` of an older checkpoint with what has become an option since, and today's values."""
    head = model.get("model.hidden_size", 0) // max(model.get("model.heads", 0), 1)
    named = {name: FORMER[name][v] if name in FORMER and isinstance(v, bool) else v for name, v in model.items()}
    return {"model.head_dim": head, "model.clip_qkv": 0.0} | named


def _layout_of(config: Config, mesh: Mesh) -> dict[str, Any]:
    return {
        "world": mesh.world,
        "pipeline_parallel": mesh.pipeline,
        "virtual_stages": mesh.virtual,
        "tensor_parallel": mesh.tensor,
        "stage_layers": list(config.parallel.stage_layers),
    }


def check(config: Config, path: Path) -> Position:
    """Where the checkpoint `path` stands, for a run that goes on from it. Raises ConfigError as `check_model` does, and
    where its optimizer state has another form.

    Reads moue.json alone: nothing is built, no other rank is asked.
    """
    about = _read(path)
    if about.get("weights_alone"):
        raise ConfigError(
            f"{path} holds weights alone, which no run can resume: name it in train.start_from, and the run otherwise"
        )
    position = check_model(config, path)
    sharded = config.parallel.distributed_optimizer
    if about["distributed_optimizer"] != sharded:
        raise ConfigError(
            f"{path} was saved with parallel.distributed_optimizer={str(not sharded).lower()}, whose optimizer state "
            f"has another form: resume with that value"
        )
    return position


def check_model(config: Config, path: Path) -> Position:
    """Where the checkpoint `path` stands. Raises ConfigError if it is of another format or model, or broken."""
    about = _read(path)
    model = _completed(about["model"])
    for name, mine in _model_of(config).items():
        if name not in model:
            raise _unreadable(path, f"has format {FORMAT}, but its entry 'model' lacks {name}")
        if model[name] != mine:
            raise ConfigError(
                f"{path} was trained with {name}={model[name]}, this run has {mine}: use the same model, "
                "or another name= for a run of its own"
            )
    return Position(about["step"], about["tokens"])


def _read(path: Path) -> dict[str, Any]:
    """moue.json of the checkpoint `path`, with all entries that loading uses, each of its type."""
    try:
        about = json.loads((path / FILE).read_text())
    except ValueError:  # no JSON, or no text at all
        raise _unreadable(path, "is no JSON, so that its format is unknown") from None
    if not isinstance(about, dict) or "format" not in about:
        raise _unreadable(path, "names no format")
    if about["format"] != FORMAT:
        raise _unreadable(path, f"has format {about['format']}")
    for name, kind in {"step": int, "tokens": int, "distributed_optimizer": bool, "model": dict}.items():
        if name not in about:
            raise _unreadable(path, f"has format {FORMAT}, but no entry '{name}'")
        if type(about[name]) is not kind:  # a bool is an int, too
            raise _unreadable(path, f"has format {FORMAT}, but its entry '{name}' is {about[name]!r}")
    return about


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{FILE} of {path} {why}; this version reads format {FORMAT}: resume with the version that wrote it, write "
        f"the name of another step_* folder into {path.parent / 'latest'}, or use another name= for a run of its own"
    )
