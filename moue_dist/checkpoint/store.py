"""Checkpoints on megatron-core's dist_checkpointing: dense weights and optimizer, pool, balance, progress.

The pool is one global tensor [P, row] each for fp32 weights and moments: no layer axis, no stage axis, so topology,
placement and layout may differ between save and load. A checkpoint appears under its name when it is whole, and
`latest` names it after that; a run killed in between finds the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from moue_dist.checkpoint.description import FILE, Position, check, describe
from moue_dist.model.system import System
from moue_dist.parallel.megatron import saving as megatron_saving
from moue_dist.parallel.pool.synced import check_replicas


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
        (part / FILE).write_text(json.dumps(about, indent=2) + "\n")
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
    _take_router_state(system, state, position.step)
    check_replicas(system.shared.buffers, system.groups.world)
    return position


def _take_router_state(system: System, state: dict[str, Any], step: int) -> None:
    """Balance and mask, which every rank has whole. A checkpoint from before there were masks hides nothing."""
    system.context.balance.load_state_dict({k: v.to(system.device) for k, v in state["balance"].items()})
    mask = system.context.mask
    mask.hide(state["mask"]["hidden_lw"] if "mask" in state else torch.zeros_like(mask.hidden_lw), step)


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
    mask = {"hidden_lw": system.context.mask.hidden_lw.cpu()}
    return {**models, "optimizer": optimizer, "shared": _shared_entries(system), "balance": balance, "mask": mask}


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
