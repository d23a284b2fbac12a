"""Weights, gradients and optimizer state of one rank: dense ones, the pool's, the routers' shared ones.

With moe.experts=fp8 the pool's weights are held in e4m3, too, in both layouts: 2 bytes a weight, and 4 (3f + 2d) bytes
of scales an expert, d hidden and f expert width. Transformer Engine's linears hold theirs likewise.
"""

from __future__ import annotations

import dataclasses

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import cell_bytes
from moue_dist.parallel.placement.of_config import expert_bytes
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.pool.host_limits import adam_bytes
from moue_dist.planning.flops import LayerParameters, qk_norm_weights, shared_router_parameters
from moue_dist.planning.memory.sizes import Share, number_bytes
from moue_dist.refusals.machine import Resolved


def weight_bytes(config: Config, mesh: Mesh, placement: Placement, share: Share, resolved: Resolved) -> dict[str, int]:
    """Bytes by component; the components are those of `peak.rank_bytes`."""
    b = number_bytes(config)
    optimizer = 8 if b == 4 else 12  # two fp32 moments, and an fp32 master copy unless the weight is fp32 itself
    dense = dense_parameters(config, mesh, share)
    router = shared_router_parameters(config)
    pool = cell_bytes(placement, expert_bytes(config), mesh.expert_data)
    mine = {part: int(size[share.stage, share.expert_rank]) for part, size in pool.items()}
    sharded = mesh.data if config.parallel.distributed_optimizer else 1
    fp8_copies = 2 * _te_linears(config, mesh, share) if config.train.precision == "fp8" else 0
    d, f = config.model.hidden_size, config.moe.expert_width
    experts = mine["weights"] // (3 * d * f * b) if resolved.experts == "fp8" else 0
    return {
        "dense weights": dense * b + fp8_copies,
        "dense gradients": dense * 4,
        "dense optimizer": dense * optimizer // sharded,
        "pool weights": mine["weights"],
        "pool weights in FP8": experts * (2 * 3 * d * f + 4 * (3 * f + 2 * d)),
        "pool gradients": mine["gradients"],
        "pool optimizer": mine["optimizer"],
        "shared router": router * 8 + router * 8 // mesh.world,  # always fp32
    }


def dense_parameters(config: Config, mesh: Mesh, share: Share) -> int:
    """Parameters of one rank outside of the pool and of what all layers' routers share."""
    m, tp = config.model, mesh.tensor
    layer = LayerParameters.of(config)
    norms_qk = qk_norm_weights(config)
    whole = norms_qk if m.qk_norm == "head" else norms_qk // tp  # on every tensor-parallel rank
    total = 0
    for index in share.layers:
        total += (layer.attention - norms_qk) // tp + whole + layer.norms
        dense = index < m.dense_layers
        total += layer.dense_ffn // tp if dense else layer.shared_expert // tp + layer.router
    table = m.vocab_size * m.hidden_size // tp
    first, last = share.stage == 0, share.stage == mesh.pipeline - 1
    total += table * first + (table + m.hidden_size) * last
    if m.tied_head and first and last:
        total -= table
    return total


def _te_linears(config: Config, mesh: Mesh, share: Share) -> int:
    """Weights of one rank that Transformer Engine keeps in FP8, row- and column-wise, beside the bf16 ones."""
    layer = LayerParameters.of(config)
    per_layer = [layer.dense_ffn if i < config.model.dense_layers else layer.shared_expert for i in share.layers]
    return sum(layer.attention + ffn for ffn in per_layer) // mesh.tensor


def host_bytes(config: Config, mesh: Mesh, placement: Placement, share: Share) -> int:
    """Host memory of one rank's part of the pool's optimizer state; 0 with parallel.pool_optimizer=device.

    It stands beside the GPU's bytes and does not count among them.
    """
    if config.parallel.pool_optimizer == "device":
        return 0
    owned = _owned(config, mesh, placement, share)
    return adam_bytes(owned, moment=2 if config.parallel.host_state == "bf16" else 4, weight=number_bytes(config))


def _owned(config: Config, mesh: Mesh, placement: Placement, share: Share) -> int:
    """Elements of the pool whose optimizer state is this rank's: each segment's are shared by its replicas."""
    each = dataclasses.replace(expert_bytes(config), optimizer=1)
    return int(cell_bytes(placement, each, mesh.expert_data)["optimizer"][share.stage, share.expert_rank])
