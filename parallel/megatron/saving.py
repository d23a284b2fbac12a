"""Adapter to megatron-core 0.16.1, the checkpoints' part: what saving and loading its optimizer needs to be right.

Changes when megatron-core's sharded state dicts do. An `optimizer` here is what `get_megatron_optimizer` returns.
Line numbers in comments are those of 0.16.1.
"""

from __future__ import annotations

import queue
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from moue_dist.parallel.device import has_cuda


def checkpoint_metadata() -> dict[str, Any]:
    """What megatron-core's sharded state dicts want to be told."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # by parameter: any layout loads it
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,  # layers are saved by number: dense and MoE layers differ
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def spread_buckets(optimizer: Any) -> None:
    """Give the gathered optimizer state the places that `fully_reshardable` reads it from.

    megatron-core gathers a buffer's buckets without the padding between them (distrib_optimizer.py:1118) and then cuts
    parameters out at their padded places (:1501), so that with several buckets, as tied embeddings and overlap make
    them, everything behind the first is saved from the wrong place.
    """
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            _spread_part(part)


def _spread_part(optimizer: Any) -> None:
    gather = optimizer.get_parameter_state_dp_zero

    def spread(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        for i, buffer in enumerate(optimizer.buffers if state is not None else ()):
            for tensors in state[i].values():
                for key, packed in tensors.items():
                    if torch.is_tensor(packed):
                        parts = packed.split([bucket.numel_unpadded for bucket in buffer.buckets])
                        tensors[key] = packed.new_zeros(buffer.numel)
                        for bucket, part in zip(buffer.buckets, parts, strict=True):
                            tensors[key][bucket.offset : bucket.offset + len(part)] = part
        return state

    optimizer.get_parameter_state_dp_zero = spread


def save_without_helper() -> None:
    """Make megatron-core's synchronous save collect its results in this process.

    Otherwise each rank starts a manager process that imports the program anew (seconds), stays for good, and outlives
    a killed rank (filesystem_async.py:51). It serves asynchronous saves, of which there are none here.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def prepare_to_load(optimizer: Any) -> None:
    """Optimizer state must exist before its sharded description can be made (distrib_optimizer.py:642)."""
    for part in _parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue  # megatron-core's others make it themselves
        part._init_optimizer_states_with_dummy_values()
        if not has_cuda():
            _skip_step_tensor(part)


def _skip_step_tensor(optimizer: Any) -> None:
    """torch's Adam keeps a `step` tensor per parameter that is in no file (KeyError at distrib_optimizer.py:940)."""

    def take(model_param: Any, tensors: dict[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        for key, mine in {"param": main, **optimizer.optimizer.state[main]}.items():
            if key != "step" and key in tensors:
                mine.data.copy_(tensors[key])

    optimizer._set_main_param_and_optimizer_states = take


def mend_after_load(optimizer: Any) -> None:
    """megatron-core loads one `step` tensor into all parameters (distrib_optimizer.py:825); torch's Adam would count
    it up for each.
    """
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _parts(optimizer: Any) -> list[Any]:
    """Of a chain its members, otherwise the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
