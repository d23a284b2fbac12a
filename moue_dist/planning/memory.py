"""Bytes on one GPU, from the configuration alone: what `plan` predicts and a run's measured peak is held against.

Legend: t tokens of a microbatch on one rank (sequence x micro batch), u = t / TP (sequence parallel part), d hidden,
h heads, g key-value heads, c head width, k top-k, R = u * k rows at a rank's experts (assuming balance), f expert
width, W window, r state, n visible experts on a rank, V vocabulary, b bytes of a number (2 in bf16 and FP8, 4 in fp32),
q bytes that a Transformer Engine linear keeps of an input number (1 in FP8, else b).

Kept for backward by one layer and microbatch:

    attention   u d (b + q)              block input, normed input of the QKV projection
                t (h+g) c b / TP         q and k before their norms (qk_norm only)
                t (h+2g) c b / TP        q and k after RoPE, v
                t h c b / TP  (+ q - b)  attention output; FP8 keeps its own copy for the output projection
                4 t h / TP               log-sum-exp, or 2 h t s b / TP scores without Transformer Engine;
                                         neither with recompute=selective
    MoE         u d b                    input of the norm before the router
                4 u d                    fp32 copy of the router's input (bf16, FP8)
                4 u W c_r                c_r fp32 score tables, by router; universal and recurrent: states, chosen keys
                R d q                    rows as the experts received them
                R 2f b                   pre-activations (not with recompute=selective)
                R f q                    activations (only moe.experts=te; the others compute them again)
                R d b                    the experts' outputs, for the gradient of the routing weights
                60 R                     indices and routing weights
                2 n 3 d f                FP8 copies of the visible experts' weights, both layouts (FP8 only)
    shared      u d q + t/TP 3 e b       input, pre-activation and activation of the shared expert
    dense FFN   u d (b + q) + t 3 F b/TP likewise
Waiting: moe.merge_wgrad = m layers' rows, their gradients and activations, R (2d + 3f) b each, until their weight
gradients are added; those of m - 1 layers beyond what the layers have freed by then.
With recompute=full a layer keeps its input u d b and state 4 u r, and its own backward has the rest once.

In flight: 1F1B keeps min(M, PP - p) microbatches on stage p; interleaved keeps 2 (PP - p - 1) + (V - 1) PP + 1 chunks;
lock step (parallel.placement=home or hybrid) keeps min(M, 2 (PP - p - 1) + 1 + lag) microbatches. Where a slot's two
directions run side by side, backward frees a layer while forward fills one: of the last microbatch only one layer
counts at its source, nothing at its owners, but a forward round's buffers stand beside a backward round's.

In lock step a layer keeps no rows, pre-activations, activations or outputs of experts. Their owner keeps the rows as it
received them, d b each, for every microbatch in flight on the stage that sent them: about PP n R rows a rank, n MoE
layers a stage; none with recompute=full.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.placement.costs import Floats, cell_bytes, servers, stage_use
from moue_dist.parallel.placement.of_config import expert_bytes, stages_of_moe_layers
from moue_dist.parallel.placement.placement import Placement
from moue_dist.parallel.pool.host_limits import adam_bytes
from moue_dist.planning.flops import LayerParameters, dense_ffn_width, shared_router_parameters
from moue_dist.refusals.machine import Resolved

GIB = 2**30
RESERVE = 3 * GIB  # CUDA context, NCCL buffers, fragmentation: outside of what the allocator counts as allocated
LIBRARIES = 2**27  # GEMM workspaces that the allocator does count
INDEX_BYTES = 60  # of one row: six int64 permutations and three fp32 weights
SCORE_TABLES = {"softmax": 1, "sigmoid": 3, "norm": 4, "universal": 1, "recurrent": 1}  # fp32 [u, W] kept by a router
LOGIT_BYTES = {2: 6, 4: 8}  # of one logit: fp32 softmax, and the logits or their gradient in model type


@dataclass(frozen=True)
class Share:
    """One rank's part of the work: its pipeline stage, the layers of its chunks (0-based), its expert rank."""

    stage: int
    chunks: tuple[tuple[int, ...], ...]
    expert_rank: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk)


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
    weights = _weights(config, mesh, placement, share)
    layers = {layer: _layer_activations(config, mesh, layer, share, resolved) for layer in share.layers}
    kept = _kept(config, mesh, layers)
    flight = chunks_in_flight(mesh, share.stage, microbatches, lock_step_lag(config))
    activations = sum(kept[layer] for chunk in flight for layer in share.chunks[chunk])
    together = _together(config, mesh, share.stage, microbatches)
    if together:
        activations -= sum(kept.values()) - max(kept.values(), default=0)
    last = share.stage == mesh.pipeline - 1
    tokens = _tokens(config)
    # Transformer Engine's cross entropy writes the gradient over the logits.
    a_logit = _bytes(config) if resolved.transformer_engine else LOGIT_BYTES[_bytes(config)]
    logits = tokens * config.model.vocab_size * a_logit // mesh.tensor if last else 0
    a_round, kept_rows = rows_served(config, mesh, placement, share, microbatches, use)
    workspace = max((_workspace(config, mesh, layer, share, resolved) for layer in share.layers), default=0)
    if lock_step_lag(config) is not None:
        workspace = max(workspace, _round_workspace(config, mesh, a_round, forward=together))
    waiting = _waiting(config, kept, a_round, share, resolved)
    if config.parallel.recompute == "full":
        workspace += max(layers.values(), default=0)
    return {
        **weights,
        "activations": activations,
        "rows kept for other ranks": kept_rows * config.model.hidden_size * _bytes(config),
        "rows waiting for weight gradients": waiting,
        "logits and loss": max(logits - workspace, 0),  # the two never stand at the same time: the larger counts
        "dispatch and backward buffers": workspace,
        "libraries": LIBRARIES,
    }


def host_bytes(config: Config, mesh: Mesh, placement: Placement, share: Share) -> int:
    """Host memory of one rank's part of the pool's optimizer state; 0 with parallel.pool_optimizer=device.

    It stands beside the GPU's bytes and does not count among them.
    """
    if config.parallel.pool_optimizer == "device":
        return 0
    owned = _owned(config, mesh, placement, share)
    return adam_bytes(owned, moment=2 if config.parallel.host_state == "bf16" else 4, weight=_bytes(config))


def _owned(config: Config, mesh: Mesh, placement: Placement, share: Share) -> int:
    """Elements of the pool whose optimizer state is this rank's: each segment's are shared by its replicas."""
    each = dataclasses.replace(expert_bytes(config), optimizer=1)
    return int(cell_bytes(placement, each, mesh.expert_data)["optimizer"][share.stage, share.expert_rank])


def lock_step_lag(config: Config) -> int | None:
    """Slots by which backward trails where stages run in lock step, None where they run 1F1B."""
    return config.parallel.slots_behind if config.parallel.placement != "replicate" else None


def chunks_in_flight(mesh: Mesh, stage: int, microbatches: int, lag: int | None = None) -> tuple[int, ...]:
    """The chunk of each forward whose activations a stage keeps at its fullest, in the schedule's order.

    `lag` is lock step's, None for 1F1B. Example: pipeline 2, virtual 2, stage 0, 4 microbatches -> (0, 0, 1, 1, 0).
    """
    if lag is not None:
        return (0,) * min(microbatches, 2 * (mesh.pipeline - 1 - stage) + 1 + lag)
    if mesh.virtual == 1:
        return (0,) * min(microbatches, mesh.pipeline - stage)
    many = 2 * (mesh.pipeline - stage - 1) + (mesh.virtual - 1) * mesh.pipeline + 1
    many = min(many, microbatches * mesh.virtual)
    return tuple(i // mesh.pipeline % mesh.virtual for i in range(many))


def _together(config: Config, mesh: Mesh, stage: int, microbatches: int) -> bool:
    """Whether a stage is at its fullest while forward fills one microbatch's layers and backward frees another's."""
    lag = config.parallel.slots_behind
    return lag % 2 == 1 and mesh.tensor == 1 and microbatches >= 2 * (mesh.pipeline - 1 - stage) + 1 + lag


def rows_served(
    config: Config, mesh: Mesh, placement: Placement, share: Share, microbatches: int, use: Floats | None = None
) -> tuple[int, int]:
    """Rows that a rank's experts meet in one round of lock step, and rows that it keeps for backward at its fullest.

    Both are expected ones, with every layer spread like `use` [L, P], or evenly over its window; (0, 0) where there is
    no lock step.
    """
    lag = lock_step_lag(config)
    if lag is None:
        return 0, 0
    stages = stages_of_moe_layers(config, mesh)
    used = stage_use(config.topology().windows, stages, placement.pool, mesh.pipeline, use)
    here = (servers(placement) == share.stage) & (np.asarray(placement.columns) == share.expert_rank)
    met = (used * here).sum(1)  # of each stage's rows, in rows of one layer
    a_layer = _tokens(config) // mesh.tensor * config.moe.top_k * mesh.expert  # of all the stage's sources
    layers = np.maximum(np.bincount(stages, minlength=mesh.pipeline), 1)
    # Side by side an owner gives a layer's rows back before it takes the next one's (parallel/lockstep/turns.py).
    flight = [
        len(chunks_in_flight(mesh, s, microbatches, lag)) - _together(config, mesh, s, microbatches)
        for s in range(mesh.pipeline)
    ]
    kept = 0 if config.parallel.recompute == "full" else round(float((met * flight).sum()) * a_layer)
    return round(float((met / layers).sum()) * a_layer), kept


def dense_parameters(config: Config, mesh: Mesh, share: Share) -> int:
    """Parameters of one rank outside of the pool and of what all layers' routers share."""
    m, tp = config.model, mesh.tensor
    layer = LayerParameters.of(config)
    norms_qk = 2 * (m.hidden_size // m.heads) if m.qk_norm else 0
    total = 0
    for index in share.layers:
        total += (layer.attention - norms_qk) // tp + norms_qk + layer.norms
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


def _bytes(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _tokens(config: Config) -> int:
    return config.model.sequence_length * config.train.micro_batch_size


def _weights(config: Config, mesh: Mesh, placement: Placement, share: Share) -> dict[str, int]:
    b = _bytes(config)
    optimizer = 8 if b == 4 else 12  # two fp32 moments, and an fp32 master copy unless the weight is fp32 itself
    dense = dense_parameters(config, mesh, share)
    router = shared_router_parameters(config)
    pool = cell_bytes(placement, expert_bytes(config), mesh.expert_data)
    mine = {part: int(size[share.stage, share.expert_rank]) for part, size in pool.items()}
    sharded = mesh.data if config.parallel.distributed_optimizer else 1
    fp8_copies = 2 * _te_linears(config, mesh, share) if config.train.precision == "fp8" else 0
    return {
        "dense weights": dense * b + fp8_copies,
        "dense gradients": dense * 4,
        "dense optimizer": dense * optimizer // sharded,
        "pool weights": mine["weights"],
        "pool gradients": mine["gradients"],
        "pool optimizer": mine["optimizer"],
        "shared router": router * 8 + router * 8 // mesh.world,  # always fp32
    }


def _layer_activations(config: Config, mesh: Mesh, layer: int, share: Share, resolved: Resolved) -> int:
    """Bytes kept by one layer for one microbatch without full recompute; the formula stands at the top."""
    m, e, tp = config.model, config.moe, mesh.tensor
    b = _bytes(config)
    q = 1 if config.train.precision == "fp8" else b
    t = _tokens(config)
    u, d, c, g = t // tp, m.hidden_size, m.hidden_size // m.heads, m.kv_heads or m.heads
    kept = u * d * (b + q)
    kept += u * (m.heads + 2 * g) * c * b + u * m.heads * c * (b + (q if q < b else 0))
    kept += u * (m.heads + g) * c * b if m.qk_norm else 0
    if config.parallel.recompute != "selective":
        kept += u * m.heads * (4 if resolved.transformer_engine else 2 * m.sequence_length * b)
    if layer < m.dense_layers:
        return kept + u * d * (b + q) + u * 3 * dense_ffn_width(config) * b
    rows, f, r, window = u * e.top_k, e.expert_width, e.state_width, config.topology().window
    kept += u * d * b + (4 * u * d if b == 2 else 0)
    kept += 4 * u * window * (SCORE_TABLES[e.router] + (1 if config.balance.z_loss else 0))
    kept += {"universal": 4 * u * r * (4 + e.top_k), "recurrent": 4 * u * r * 14}.get(e.router, 0)
    kept += rows * INDEX_BYTES
    if lock_step_lag(config) is None:
        kept += rows * (d * q + d * b)
        kept += 0 if config.parallel.recompute == "selective" else rows * 2 * f * b
        kept += rows * f * q if resolved.experts == "te" else 0
    if config.train.precision == "fp8":
        kept += 2 * _visible(config, mesh) * LayerParameters.of(config).expert
    if e.shared_expert_width:
        kept += u * d * q + u * 3 * e.shared_expert_width * b
    return kept


def _kept(config: Config, mesh: Mesh, layers: dict[int, int]) -> dict[int, int]:
    if config.parallel.recompute != "full":
        return layers
    state = config.moe.state_width if config.moe.router in ("universal", "recurrent") else 0
    own = _tokens(config) // mesh.tensor * (config.model.hidden_size * _bytes(config) + 4 * state)
    return dict.fromkeys(layers, own)


def _visible(config: Config, mesh: Mesh) -> int:
    """Visible experts of one layer on one expert rank, rounded up."""
    return -(-config.topology().window // mesh.expert)


def _workspace(config: Config, mesh: Mesh, layer: int, share: Share, resolved: Resolved) -> int:
    """Bytes that live only during one layer's backward.

    MoE: the gradients of outputs (in the place of the freed outputs), activations, pre-activations and inputs of the
    rows; on a CPU with moe.experts=torch also one weight gradient in model type before it is added to the fp32 buffer.
    """
    e, b, u = config.moe, _bytes(config), _tokens(config) // mesh.tensor
    d = config.model.hidden_size
    if layer < config.model.dense_layers:
        return u * (3 * dense_ffn_width(config) + d) * b
    rows, f = u * e.top_k, e.expert_width
    grouped = resolved.experts == "torch" and resolved.device == "cpu"
    weight_gradient = 2 * f * d * b * (_visible(config, mesh) if grouped else 1)
    recomputed = rows * 2 * f * b if config.parallel.recompute == "selective" else 0
    exchanged = rows * d * b if mesh.expert > 1 else 0
    return rows * 4 * f * b + max(rows * d * b, weight_gradient) + recomputed + exchanged


def _waiting(config: Config, kept: dict[int, int], a_round: int, share: Share, resolved: Resolved) -> int:
    """Bytes of rows whose weight gradients wait for those of other layers, at the peak.

    Layers free what they kept as their rows begin to wait. What is left over at the end of a microbatch, where the
    layers do not divide, waits beside all that the next one keeps.
    """
    e, d, b = config.moe, config.model.hidden_size, _bytes(config)
    layers = [layer for layer in share.layers if layer >= config.model.dense_layers]
    more = resolved.merge_wgrad - 1
    if not more or not layers:
        return 0
    rows = a_round or _tokens(config) // config.parallel.tensor_parallel * e.top_k
    each = rows * (2 * d + 3 * e.expert_width) * b
    freed = 0 if len(layers) % resolved.merge_wgrad else kept[layers[-1]] + (rows * d * b if a_round else 0)
    return more * max(each - freed, 0)


def _round_workspace(config: Config, mesh: Mesh, met: int, *, forward: bool) -> int:
    """Bytes that live only during a backward round of lock step; `met` rows are at this rank's experts.

    `forward` adds those of a forward round beside it: rows sent and outputs received, rows received and by expert,
    pre-activations, activations, outputs by expert and as sent.

    The source holds its rows' gradients, sent and received (and with recompute the rows). The owner holds rows and
    gradients as received and by expert, pre-activations and their gradients, activations and theirs, and the rows'
    gradients by expert and as sent.
    """
    e, b, d = config.moe, _bytes(config), config.model.hidden_size
    sent = _tokens(config) // mesh.tensor * e.top_k
    backward = sent * d * b * (3 if config.parallel.recompute == "full" else 2) + met * (6 * d + 6 * e.expert_width) * b
    return backward + (sent * 2 * d * b + met * (4 * d + 3 * e.expert_width) * b if forward else 0)
