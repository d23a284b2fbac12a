"""What layers keep for backward, and the buffers that come and go in it.

Legend: t tokens of a microbatch on one rank (sequence x micro batch), u = t / TP (sequence parallel part), d hidden,
h heads, g key-value heads, c head width, k top-k, R = u * k rows at a rank's experts (assuming balance), f expert
width, W window, r state, n visible experts on a rank, V vocabulary, b bytes of a number (2 in bf16 and FP8, 4 in fp32),
q bytes that a Transformer Engine linear keeps of an input number (1 in FP8, else b).

Kept for backward by one layer and microbatch:

    attention   u d (b + q)              block input, normed input of the QKV projection
                t (h+g) c b / TP         q and k before their norms (unless qk_norm=none)
                t (h+2g) c b / TP        q and k after RoPE, v
                t h c b / TP  (+ q - b)  attention output; FP8 keeps its own copy for the output projection
                4 t h / TP               log-sum-exp, or 2 h t s b / TP scores without Transformer Engine;
                                         neither with recompute=selective
    MoE         u d b                    input of the norm before the router
                u d b                    the router's input
                4 u (W + 1)              its logits and their log-sum-exp, fp32; universal and recurrent: states and
                                         chosen keys (on a CPU, or without Triton, more: softmax, scores, fp32 copies)
      gathered  C 2f b                   pre-activations (not with recompute=selective); C = moe.headroom R rows with
                                         room, R with one expert rank
                E u d b                  the tokens of all E expert ranks (with one: the router's input)
                8 C + 4 E R              rows' tokens and weights, their places
      all to    R d b                    rows as the experts received them (R d q with moe.experts=te)
      all       R 2f b                   pre-activations (not with recompute=selective)
                R f q                    activations (only moe.experts=te; the others compute them again)
                R d b                    the experts' outputs, for the gradient of the routing weights
                60 R                     indices and routing weights (in lock step, too)
                2 n 3 d f                FP8 copies of the visible experts' weights (FP8 with moe.experts=te)
    shared      u d q + t/TP 3 e b       copy of the input (FP8; else the router's), pre-activation, activation
    dense FFN   u d (b + q) + t 3 F b/TP likewise
Waiting: moe.merge_wgrad = m layers' rows, their gradients and activations, R (2d + 3f) b each (gathered: C), until
their weight gradients are added; those of m - 1 layers beyond what the layers have freed by then.
moe.experts=fp8 keeps no rows in FP8 beyond the next product; its weights in FP8 stand beside the pool (`weights.py`).
With recompute=full a layer keeps its input u d b and state 4 u r, and its own backward has the rest once.

In lock step (parallel.placement=home or hybrid) a layer keeps no rows, pre-activations, activations or outputs of
experts; of its own rows there is the router's input. Those of others are kept by their owner (`in_flight.py`).
"""

from __future__ import annotations

import math

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.planning.flops import LayerParameters, dense_ffn_width
from moue_dist.planning.memory.in_flight import Served
from moue_dist.planning.memory.sizes import Share, number_bytes, tokens_of, visible_experts
from moue_dist.refusals.machine import Resolved

INDEX_BYTES = 60  # of one row: six int64 permutations and three fp32 weights


def layer_activations(config: Config, mesh: Mesh, layer: int, share: Share, resolved: Resolved) -> int:
    """Bytes kept by one layer for one microbatch without full recompute; the formula stands at the top."""
    m, e, tp = config.model, config.moe, mesh.tensor
    b = number_bytes(config)
    q = 1 if config.train.precision == "fp8" else b
    t = tokens_of(config)
    u, d, c, g = t // tp, m.hidden_size, m.head_width, m.groups
    kept = u * d * (b + q)
    kept += u * (m.heads + 2 * g) * c * b + u * m.heads * c * (b + (q if q < b else 0))
    kept += u * (m.heads + g) * c * b if m.qk_norm != "none" else 0
    if config.parallel.recompute != "selective":
        kept += u * m.heads * (4 if resolved.transformer_engine else 2 * m.sequence_length * b)
    if layer < m.dense_layers:
        return kept + u * d * (b + q) + u * 3 * dense_ffn_width(config) * b
    rows, f, r, window = u * e.top_k, e.expert_width, e.state_width, config.topology().window
    kept += 2 * u * d * b + 4 * u * (window + 1)
    kept += {"universal": 4 * u * r * (4 + e.top_k), "recurrent": 4 * u * r * 14}.get(e.router, 0)
    if resolved.dispatch == "gathered":
        room, ranks = rows_with_room(config, mesh, resolved), mesh.expert
        kept += 8 * room + 4 * ranks * rows + (ranks * u * d * b if ranks > 1 else 0)
        kept += 0 if config.parallel.recompute == "selective" else room * 2 * f * b
    else:
        kept += rows * INDEX_BYTES
    if resolved.dispatch == "all_to_all":
        kept += rows * (d * (q if resolved.experts == "te" else b) + d * b)
        kept += 0 if config.parallel.recompute == "selective" else rows * 2 * f * b
        kept += rows * f * q if resolved.experts == "te" else 0
    if config.train.precision == "fp8" and resolved.experts == "te":
        kept += 2 * visible_experts(config, mesh) * LayerParameters.of(config).expert
    if e.shared_expert_width:
        kept += (u * d * q if q < b else 0) + u * 3 * e.shared_expert_width * b
    return kept


def rows_with_room(config: Config, mesh: Mesh, resolved: Resolved) -> int:
    """Rows of a microbatch and layer for which this rank's buffers have room."""
    rows = tokens_of(config) // mesh.tensor * config.moe.top_k
    if resolved.dispatch != "gathered" or mesh.expert == 1:
        return rows
    return min(math.ceil(rows * config.moe.headroom), rows * mesh.expert)


def kept_of_layers(config: Config, mesh: Mesh, layers: dict[int, int]) -> dict[int, int]:
    """Bytes kept by each layer for one microbatch; `layers` has what it would keep without full recompute."""
    if config.parallel.recompute != "full":
        return layers
    state = config.moe.state_width if config.moe.router in ("universal", "recurrent") else 0
    own = tokens_of(config) // mesh.tensor * (config.model.hidden_size * number_bytes(config) + 4 * state)
    return dict.fromkeys(layers, own)


def workspace_of(config: Config, mesh: Mesh, layer: int, share: Share, resolved: Resolved) -> int:
    """Bytes that live only during one layer's backward.

    MoE: the gradients of outputs (in the place of the freed outputs), activations, pre-activations and inputs of the
    rows; on a CPU with moe.experts=torch also one weight gradient in model type before it is added to the fp32 buffer.
    With moe.experts=fp8 the pre-activations' gradients in FP8 take the place of the activations' once those are used.
    """
    e, b, u = config.moe, number_bytes(config), tokens_of(config) // mesh.tensor
    d = config.model.hidden_size
    if layer < config.model.dense_layers:
        return u * (3 * dense_ffn_width(config) + d) * b
    rows, f = rows_with_room(config, mesh, resolved), e.expert_width
    grouped = resolved.experts == "torch" and resolved.device == "cpu"
    weight_gradient = 2 * f * d * b * (visible_experts(config, mesh) if grouped else 1)
    recomputed = rows * 2 * f * b if config.parallel.recompute == "selective" else 0
    exchanged = rows * d * b if mesh.expert > 1 else 0
    if resolved.dispatch == "gathered":  # rows again, and the gradients of all ranks' tokens, out and in
        exchanged = rows * d * b + (2 * mesh.expert * u * d * b if mesh.expert > 1 else 0)
    both = rows * 2 * f if resolved.experts == "fp8" else 0  # while one is made of the other
    return rows * 4 * f * b + max(rows * d * b, weight_gradient, both) + recomputed + exchanged


def round_workspace(config: Config, served: Served, *, forward: bool) -> int:
    """Bytes that live only during a backward round of lock step.

    `forward` adds those of a forward round beside it: rows sent and outputs returned, rows received and their outputs,
    and by expert rows, pre-activations, activations and outputs.

    The source holds its rows' gradients, sent and returned (and with recompute the rows). The owner holds gradients as
    received and as returned (and with recompute the rows), and by expert the rows and their outputs' gradients,
    pre-activations and activations with their gradients, and the rows' gradients.
    """
    b, d, f = number_bytes(config), config.model.hidden_size, config.moe.expert_width
    travelling = served.away + served.theirs
    backward = travelling * d * (3 if config.parallel.recompute == "full" else 2) + served.met * (3 * d + 6 * f)
    return b * (backward + (travelling * 2 * d + served.met * (2 * d + 3 * f) if forward else 0))


def waiting_rows(
    config: Config, mesh: Mesh, kept: dict[int, int], served: Served, share: Share, resolved: Resolved
) -> int:
    """Bytes of rows whose weight gradients wait for those of other layers, at the peak.

    Layers free what they kept as their rows begin to wait. What is left over at the end of a microbatch, where the
    layers do not divide, waits beside all that the next one keeps.
    """
    e, d, b = config.moe, config.model.hidden_size, number_bytes(config)
    layers = [layer for layer in share.layers if layer >= config.model.dense_layers]
    more = resolved.merge_wgrad - 1
    if not more or not layers:
        return 0
    rows = served.met or rows_with_room(config, mesh, resolved)
    each = rows * (2 * d + 3 * e.expert_width) * b
    freed = (
        0 if len(layers) % resolved.merge_wgrad else kept[layers[-1]] + (served.theirs * d * b if served.kept else 0)
    )
    return more * max(each - freed, 0)
