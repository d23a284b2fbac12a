"""Adapter to megatron-core 0.16.1, the model's part: our layers and norms in its GPTModel, and the chunks of a rank.

Changes when the form of the model changes. Globals, optimizer and schedules are in megatron.py, checkpoints in
megatron_saving.py. Line numbers in comments are those of 0.16.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from moue_dist.config import Config
from moue_dist.parallel.device import this_device
from moue_dist.parallel.megatron import state_packing
from moue_dist.parallel.megatron.attention import AllKeysNorm, AllQueriesNorm, ClippedAttention
from moue_dist.parallel.mesh import Mesh

STATEFUL_ROUTERS = ("universal", "recurrent")


def carried_width(config: Config) -> int:
    """Width of the trajectory state that rides with the hidden states; 0 where the router has none."""
    return config.moe.state_width if config.moe.router in STATEFUL_ROUTERS else 0


class LocalRMSNorm(nn.RMSNorm):
    """RMSNorm where Transformer Engine is absent; megatron-core's own torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=this_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class StatefulLayer(TransformerLayer):
    """A transformer layer through which the trajectory state rides in the block's `context` slot.

    The block drops `context` on return (transformer_block.py:803), so a stage's first layer unpacks the state from
    what came in and its last layer packs it behind what goes out. Never kept on `self`: under recompute that would be
    the copy without a graph.
    """

    unpack_input = False
    pack_output = False
    state_width = 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs.pop("dynamic_inference_decode_only", None)
        state, hidden = kwargs.pop("context", None), kwargs.pop("hidden_states")
        if self.unpack_input:
            hidden, state = state_packing.unpack(hidden, self.config.hidden_size)
        elif state is None and self.state_width:
            state = hidden.new_zeros(*hidden.shape[:2], self.state_width, dtype=torch.float32)
        hidden, _ = self._forward_attention(hidden, *args, **kwargs)
        residual = hidden
        normed = self._forward_pre_mlp_layernorm(hidden)
        if isinstance(self.mlp, MLP):
            output = self.mlp(normed)
        else:
            output, state = self.mlp(normed, state_sbr=state)
        hidden = self._forward_post_mlp(output, residual)
        return (state_packing.pack(hidden, state) if self.pack_output else hidden), state


def block_spec(
    config: Config, layers: Sequence[int], moe_layer: type, *, fused: bool, device: torch.device
) -> TransformerBlockSubmodules:
    """The layers (0-based, global) of one chunk: dense ones with megatron-core's MLP, the others with `moe_layer`."""
    specs = []
    for layer in layers:
        dense = layer < config.model.dense_layers
        if fused:
            spec = get_gpt_layer_with_transformer_engine_spec(
                num_experts=None if dense else config.moe.pool, qk_layernorm=config.model.qk_norm != "none"
            )
        else:
            qk_norm = config.model.qk_norm != "none"
            spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
            use_local_norms(spec, qk_norm)
        _use_own_attention(config, spec)
        spec.module = StatefulLayer
        if not dense:
            params = {"run": config, "device": device, "shared_mlp": _plain_mlp(fused)}
            spec.submodules.mlp = ModuleSpec(module=moe_layer, params=params)
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_te_norm() if fused else LocalRMSNorm)


def use_local_norms(spec: ModuleSpec, qk_norm: bool) -> None:
    """Our norm at every place of a local layer that has one."""
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LocalRMSNorm
    if qk_norm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm


def _use_own_attention(config: Config, spec: ModuleSpec) -> None:
    """What megatron-core's attention does not have: a norm over all heads, clipping."""
    attention, m = spec.submodules.self_attention, config.model
    if m.qk_norm == "all":
        attention.submodules.q_layernorm, attention.submodules.k_layernorm = AllQueriesNorm, AllKeysNorm
    if m.clip_qkv:
        attention.module, attention.params = ClippedAttention, {**attention.params, "clip": m.clip_qkv}


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _plain_mlp(fused: bool) -> ModuleSpec:
    """A SwiGLU MLP whose first linear does not carry a norm: the shared expert's."""
    if fused:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear as Column
        from megatron.core.extensions.transformer_engine import TERowParallelLinear as Row
    else:
        from megatron.core.tensor_parallel import ColumnParallelLinear as Column
        from megatron.core.tensor_parallel import RowParallelLinear as Row
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=Column, linear_fc2=Row))


def build_chunks(
    config: Config, tconfig: TransformerConfig, mesh: Mesh, layout: Sequence[Sequence[int]], pp: int, moe_layer: type
) -> list[GPTModel]:
    """This pipeline rank's GPTModels, one a virtual stage, on the device, weights uninitialised.

    `layout` are the 0-based layers of every virtual stage; stage v * PP + pp is chunk v of this rank.
    """
    fused = tconfig.apply_rope_fusion
    state_width = carried_width(config)
    chunks = []
    for v in range(mesh.virtual):
        stage = v * mesh.pipeline + pp
        first, last = stage == 0, stage == len(layout) - 1
        chunk = GPTModel(
            tconfig,
            block_spec(config, layout[stage], moe_layer, fused=fused, device=this_device()),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=config.model.tied_head,
            position_embedding_type="rope",
            rotary_base=int(config.model.rope_base),
            vp_stage=v if mesh.virtual > 1 else None,
        )
        for i, layer in enumerate(chunk.decoder.layers):
            layer.state_width = state_width
            layer.unpack_input = bool(state_width) and i == 0 and not first
            layer.pack_output = bool(state_width) and i == len(layout[stage]) - 1 and not last
        chunks.append(chunk.to(device=this_device(), dtype=tconfig.params_dtype))
    return chunks
