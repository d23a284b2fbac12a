"""Checkpoints on megatron-core's dist_checkpointing: dense weights and optimizer, pool, balance, progress.

The pool is one global tensor [P, row] each for fp32 weights and moments: no layer axis, no stage axis, so topology,
placement and layout may differ between save and load. A checkpoint appears under its name when it is whole, and
`latest` names it after that; a run killed in between finds the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from moue_dist.config import Config, ConfigError
from moue_dist.model.system import System
from moue_dist.parallel.megatron import saving as megatron_saving
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.pool.synced import check_replicas

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
    if not (path / "moue.json").is_file():
        raise ConfigError(
            f"{pointer} names {path.name}, which is not a complete checkpoint: write the name of another "
            f"step_* folder into it, or move {folder} away to start afresh"
        )
    return path


def save(system: System, folder: Path, position: Position, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX` and point `latest` at it (collective). Keeps the newest `keep` checkpoints."""
    path = folder / f"step_{position.step:08d}"
    part = folder / f".writing_{path.name}"
    if system.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier(group=system.groups.world)
    megatron_saving.save_without_helper()
    dist_checkpointing.save(_state(system, loading=False), str(part))
    dist.barrier(group=system.groups.world)
    if system.rank == 0:
        about = describe(system.config, system.mesh, position)
        (part / "moue.json").write_text(json.dumps(about, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
        pointer = folder / ".latest"
        pointer.write_text(path.name + "\n")
        os.replace(pointer, folder / "latest")
        for old in sorted(folder.glob("step_*"))[:-keep]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier(group=system.groups.world)
    return path


def load(system: System, path: Path) -> Position:
    """Take weights, optimizer state and balance from `path` (collective). Raises ConfigError as `check` does."""
    position = check(system.config, path)
    megatron_saving.prepare_to_load(system.dense.optimizer)
    state = dist_checkpointing.load(_state(system, loading=True), str(path))
    for name, chunk in zip(_chunk_names(system), system.chunk_modules(), strict=True):
        chunk.load_state_dict(state[name])
    system.dense.optimizer.load_state_dict(state["optimizer"])
    megatron_saving.mend_after_load(system.dense.optimizer)
    _take_shared(system, state["shared"], position.step)
    system.context.balance.load_state_dict({k: v.to(system.device) for k, v in state["balance"].items()})
    check_replicas(system.shared.buffers, system.groups.world)
    return position


def _chunk_names(system: System) -> list[str]:
    return [f"model{i}" for i in range(len(system.dense.chunks))] if len(system.dense.chunks) > 1 else ["model"]


def _state(system: System, *, loading: bool) -> dict[str, Any]:
    metadata = megatron_saving.checkpoint_metadata()
    models = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(system), system.chunk_modules(), strict=True)
    }
    optimizer = system.dense.optimizer.sharded_state_dict(dict(models), is_loading=loading, metadata=metadata)
    balance = {k: v.cpu() for k, v in system.context.balance.state_dict().items()}
    return {**models, "optimizer": optimizer, "shared": _shared_entries(system), "balance": balance}


def _shared_entries(system: System) -> dict[str, ShardedTensor]:
    """Every share of every synced buffer, by unit: the key names the global tensor, the offsets the place in it."""
    entries = {}
    for i, buffer in enumerate(system.shared.buffers):
        for name, shares in system.shared.states(i).items():
            for segment, offset, length, row, piece in buffer.share_units():
                data = shares[segment][offset : offset + length].view(1, length)
                entries[f"{buffer.name}.{name}.{row}.{piece}"] = ShardedTensor.from_rank_offsets(
                    f"{buffer.name}.{name}", data, (0, row, buffer.global_rows), (1, piece, buffer.pieces)
                )
    return entries


def _take_shared(system: System, loaded: dict[str, torch.Tensor], step: int) -> None:
    with torch.no_grad():
        for i, buffer in enumerate(system.shared.buffers):
            for name, shares in system.shared.states(i).items():
                for segment, offset, length, row, piece in buffer.share_units():
                    value = loaded[f"{buffer.name}.{name}.{row}.{piece}"]
                    shares[segment][offset : offset + length].copy_(value.view(length))
    system.shared.set_steps(step)
    system.shared.publish()


def describe(config: Config, mesh: Mesh, position: Position) -> dict[str, Any]:
    """What moue.json says about a checkpoint."""
    return {
        "format": FORMAT,
        "step": position.step,
        "tokens": position.tokens,
        "layout": _layout_of(config, mesh),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "model": _model_of(config),
    }


def _model_of(config: Config) -> dict[str, Any]:
    m, e = config.model, config.moe
    names = ("layers", "hidden_size", "heads", "kv_heads", "vocab_size", "dense_layers", "qk_norm", "tied_head")
    moe = ("pool", "expert_width", "router", "state_width", "shared_expert_width")
    return {f"model.{n}": getattr(m, n) for n in names} | {f"moe.{n}": getattr(e, n) for n in moe}


def _layout_of(config: Config, mesh: Mesh) -> dict[str, Any]:
    return {
        "world": mesh.world,
        "pipeline_parallel": mesh.pipeline,
        "virtual_stages": mesh.virtual,
        "tensor_parallel": mesh.tensor,
        "stage_layers": list(config.parallel.stage_layers),
    }


def check(config: Config, path: Path) -> Position:
    """Where the checkpoint `path` stands. Raises ConfigError if it is of another format, broken, or of another model.

    Reads moue.json alone: nothing is built, no other rank is asked.
    """
    about = _read(path)
    for name, mine in _model_of(config).items():
        if name not in about["model"]:
            raise _unreadable(path, f"has format {FORMAT}, but its entry 'model' lacks {name}")
        if about["model"][name] != mine:
            raise ConfigError(
                f"{path} was trained with {name}={about['model'][name]}, this run has {mine}: use the same model, "
                "or another name= for a run of its own"
            )
    sharded = config.parallel.distributed_optimizer
    if about["distributed_optimizer"] != sharded:
        raise ConfigError(
            f"{path} was saved with parallel.distributed_optimizer={str(not sharded).lower()}, whose optimizer state "
            f"has another form: resume with that value"
        )
    return Position(about["step"], about["tokens"])


def _read(path: Path) -> dict[str, Any]:
    """moue.json of the checkpoint `path`, with all entries that loading uses, each of its type."""
    try:
        about = json.loads((path / "moue.json").read_text())
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
        f"moue.json of {path} {why}; this version reads format {FORMAT}: resume with the version that wrote it, write "
        f"the name of another step_* folder into {path.parent / 'latest'}, or use another name= for a run of its own"
    )
