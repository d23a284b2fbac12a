"""Weights of a checkpoint for a run that begins: fresh optimizer, step 0, any layout; of a converted model or a run.

A weight may stand there in another type than the model's, and be called as Transformer Engine or as megatron-core's
own layers call it (`other_key`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader

from moue_dist.checkpoint.names import other_key
from moue_dist.config import ConfigError
from moue_dist.model.system import System
from moue_dist.parallel.megatron import saving as megatron_saving
from moue_dist.parallel.pool.synced import check_replicas


@torch.no_grad()
def start(system: System, path: Path) -> None:
    """Take weights, balance and mask from `path` (collective); `start_of` has found that the model is the same."""
    there = set(FileSystemReader(str(path)).read_metadata().state_dict_metadata)
    metadata = megatron_saving.checkpoint_metadata()
    chunks = system.chunk_modules()
    wanted: dict[str, Any] = {
        f"chunk{i}": _weights(chunk.sharded_state_dict(metadata=metadata), there, path)
        for i, chunk in enumerate(chunks)
    }
    wanted["shared"] = {
        f"{buffer.name}.{row}.{piece}": ShardedTensor.from_rank_offsets(
            f"{buffer.name}.weight",
            torch.empty(1, length, device=system.device),
            (0, row, buffer.global_rows),
            (1, piece, buffer.pieces),
        )
        for buffer in system.shared.buffers
        for _, _, length, row, piece in buffer.share_units()
    }
    found = dist_checkpointing.load(wanted, str(path))
    for i, chunk in enumerate(chunks):
        left = chunk.load_state_dict(found[f"chunk{i}"], strict=False)
        missing = [key for key in left.missing_keys if not key.endswith("_extra_state")]
        assert not missing and not left.unexpected_keys, (missing, left.unexpected_keys)
    system.dense.optimizer.reload_model_params()
    _take_shared(system, found["shared"])
    _take_router_state(system, found, path)
    check_replicas(system.shared.buffers, system.groups.world)


def _weights(state: Any, there: set[str], path: Path) -> Any:
    """Of a sharded state dict the tensors, each by the key that it has in the checkpoint."""
    kept = {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}
    for name, entry in kept.items():
        if entry.key not in there:
            entry.key = other_key(entry.key)
        if entry.key not in there:
            raise ConfigError(f"train.start_from: {path} lacks {name}")
    return kept


def _take_shared(system: System, loaded: dict[str, torch.Tensor]) -> None:
    for i, buffer in enumerate(system.shared.buffers):
        masters = system.shared.states(i)["weight"]
        for segment, offset, length, row, piece in buffer.share_units():
            masters[segment][offset : offset + length].copy_(loaded[f"{buffer.name}.{row}.{piece}"].view(length))
    system.shared.publish()


def _take_router_state(system: System, found: dict[str, Any], path: Path) -> None:
    context = system.context
    context.balance.load_state_dict({k: v.to(system.device) for k, v in found["balance"].items()})
    hidden_lw = found["mask"]["hidden_lw"] if "mask" in found else torch.zeros_like(context.mask.hidden_lw)
    if system.config.moe.mask_steps and not hidden_lw.any():
        raise ConfigError(
            f"moe.mask_steps={system.config.moe.mask_steps}: {path} hides no expert from a layer; set it and "
            "moe.mask_start to 0"
        )
    context.mask.hide(hidden_lw, 0)
