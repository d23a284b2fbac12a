"""The bytes of one rank at the peak of a training step, by component."""

from __future__ import annotations

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import Floats
from moue_dist.parallel.placement.placement import Placement
from moue_dist.planning.memory.activations import (
    kept_of_layers,
    layer_activations,
    round_workspace,
    waiting_rows,
    workspace_of,
)
from moue_dist.planning.memory.in_flight import chunks_in_flight, lock_step_lag, rows_served, side_by_side
from moue_dist.planning.memory.sizes import GIB, Share, number_bytes, tokens_of
from moue_dist.planning.memory.weights import weight_bytes
from moue_dist.refusals.machine import Resolved

RESERVE = 3 * GIB  # CUDA context, NCCL buffers, fragmentation: outside of what the allocator counts as allocated
LIBRARIES = 2**27  # GEMM workspaces that the allocator does count
LOGIT_BYTES = {2: 6, 4: 8}  # of one logit: fp32 softmax, and the logits or their gradient in model type


def rank_bytes(
    config: Config,
    mesh: Mesh,
    placement: Placement,
    share: Share,
    microbatches: int,
    resolved: Resolved,
    use: Floats | None = None,
) -> dict[str, int]:
    """Bytes by component at the peak of a training step on one rank; their sum predicts max_memory_allocated.

    `use` [L, P] are measured tokens (None: an even spread); they decide what lock step brings to each rank's experts.
    """
    weights = weight_bytes(config, mesh, placement, share, resolved)
    layers = {layer: layer_activations(config, mesh, layer, share, resolved) for layer in share.layers}
    kept = kept_of_layers(config, mesh, layers)
    flight = chunks_in_flight(mesh, share.stage, microbatches, lock_step_lag(config))
    activations = sum(kept[layer] for chunk in flight for layer in share.chunks[chunk])
    together = side_by_side(config, mesh, share.stage, microbatches)
    if together:
        activations -= sum(kept.values()) - max(kept.values(), default=0)
    last = share.stage == mesh.pipeline - 1
    tokens = tokens_of(config)
    # Transformer Engine's cross entropy writes the gradient over the logits.
    a_logit = number_bytes(config) if resolved.transformer_engine else LOGIT_BYTES[number_bytes(config)]
    logits = tokens * config.model.vocab_size * a_logit // mesh.tensor if last else 0
    served = rows_served(config, mesh, placement, share, microbatches, use)
    workspace = max((workspace_of(config, mesh, layer, share, resolved) for layer in share.layers), default=0)
    if lock_step_lag(config) is not None:
        workspace = max(workspace, round_workspace(config, served, forward=together))
    waiting = waiting_rows(config, mesh, kept, served, share, resolved)
    if config.parallel.recompute == "full":
        workspace += max(layers.values(), default=0)
    return {
        **weights,
        "activations": activations,
        "rows kept for other ranks": served.kept * config.model.hidden_size * number_bytes(config),
        "rows waiting for weight gradients": waiting,
        "logits and loss": max(logits - workspace, 0),  # the two never stand at the same time: the larger counts
        "dispatch and backward buffers": workspace,
        "libraries": LIBRARIES,
    }
