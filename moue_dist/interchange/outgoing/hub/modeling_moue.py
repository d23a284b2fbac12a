"""MoUE for transformers: one pool of experts, `model.experts`, that every MoE layer borrows.

An exported folder holds this file. It imports torch and transformers (4.57 or newer) and nothing else. The trajectory
state of the routers `universal` and `recurrent` runs over depth, token by token, so the usual KV cache is all that
generation keeps. Routers compute in fp32 whatever the model's type.

Legend: T tokens, d hidden, f expert width, P pool, W window, k experts a token, r state.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moue_dist.interchange.outgoing.hub.configuration_moue import MoueConfig
from moue_dist.interchange.outgoing.hub.routing_moue import MoueRouter, MoueSharedRouter

# transformers renamed `past_key_values` to `cache`; its outputs tell which one this release has.
CACHE = "cache" if any(f.name == "cache" for f in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"
MASK_TAKES = inspect.signature(create_causal_mask).parameters
SINCE_5 = int(transformers.__version__.split(".")[0]) >= 5


def take_cache(kwargs: dict[str, Any]) -> Any:
    """The cache under either of its names, taken out of `kwargs`."""
    found = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in found if cache is not None), None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: number j of the first half turns with number j of the second half."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def eager_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention, for attn_implementation="eager"; q [b, heads, s, c], k and v [b, kv heads, t, c]."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    weights = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        weights = weights + mask
    weights = weights.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class MoueAttention(nn.Module):
    is_causal = True

    def __init__(self, config: MoueConfig, layer_idx: int) -> None:
        super().__init__()
        c, self.config, self.layer_idx = config, config, layer_idx
        self.head_dim, self.scaling = c.head_dim, c.head_dim**-0.5
        self.num_key_value_groups = c.num_attention_heads // c.num_key_value_heads
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj, self.o_proj = linear(c.hidden_size, q), linear(q, c.hidden_size)
        self.k_proj, self.v_proj = linear(c.hidden_size, kv), linear(c.hidden_size, kv)
        if c.qk_norm != "none":
            widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q, kv)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=c.rms_norm_eps) for width in widths)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        if norm is not None:
            x = norm(x.view(shape)) if self.config.qk_norm == "head" else norm(x)
        if self.config.clip_qkv:
            x = x.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        return x.view(shape).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, turn: tuple[Tensor, Tensor], mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Tensor:
        q_norm, k_norm = (None, None) if self.config.qk_norm == "none" else (self.q_norm, self.k_norm)
        q = rotate(self._heads(self.q_proj(hidden_states), q_norm), *turn)
        k = rotate(self._heads(self.k_proj(hidden_states), k_norm), *turn)
        v = self._heads(self.v_proj(hidden_states), None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1))


class MoueMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, width),
            linear(hidden, width),
            linear(width, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoueExperts(nn.Module):
    """The pool, stored once: gate_up_proj [P, 2f, d] (gate rows, then up rows), down_proj [P, d, f]."""

    def __init__(self, config: MoueConfig) -> None:
        super().__init__()
        p, f, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(p, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(p, d, f))

    def forward(self, x_td: Tensor, ids_tk: Tensor, weights_tk: Tensor) -> Tensor:
        out = torch.zeros_like(x_td)
        for e in ids_tk.unique().tolist():
            t, k = torch.where(ids_tk == e)
            gate, up = F.linear(x_td[t], self.gate_up_proj[e]).chunk(2, -1)
            rows = F.linear(F.silu(gate) * up, self.down_proj[e])
            out.index_add_(0, t, (rows * weights_tk[t, k, None]).to(out.dtype))
        return out


class MoueSparseMLP(nn.Module):
    """Routes, and borrows the experts from the model."""

    def __init__(self, config: MoueConfig, moe_layer: int) -> None:
        super().__init__()
        self.gate, wide = MoueRouter(config, moe_layer), config.shared_expert_intermediate_size
        self.shared_expert = MoueMLP(config.hidden_size, wide) if wide else None

    def forward(self, hidden: Tensor, state: Tensor, model: MoueModel) -> tuple[Tensor, Tensor]:
        x_td = hidden.flatten(0, -2)
        ids, weights, state = self.gate(x_td, state, model.shared_router)
        out = model.experts(x_td, ids, weights).view_as(hidden)
        return out if self.shared_expert is None else out + self.shared_expert(hidden), state


class MoueDecoderLayer(nn.Module):
    def __init__(self, config: MoueConfig, layer_idx: int) -> None:
        super().__init__()
        c, moe_layer = config, layer_idx - config.num_dense_layers
        self.self_attn = MoueAttention(c, layer_idx)
        self.mlp = MoueMLP(c.hidden_size, c.intermediate_size) if moe_layer < 0 else MoueSparseMLP(c, moe_layer)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, hidden: Tensor, state: Tensor, model: MoueModel, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MoueMLP):
            return hidden + self.mlp(normed), state
        out, state = self.mlp(normed, state, model)
        return hidden + out, state


class MouePreTrainedModel(PreTrainedModel):
    config_class = MoueConfig
    base_model_prefix = "model"
    _no_split_modules = ["MoueDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["shared_router"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MoueConfig) -> None:
        super().__init__(config)
        if not (config.expert_bias or config.router in ("universal", "recurrent")):
            # transformers 4 refuses the name of a module without weights
            self._keep_in_fp32_modules_strict = None  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=self.config.initializer_range)


class MoueModel(MouePreTrainedModel):
    def __init__(self, config: MoueConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.experts, self.shared_router = MoueExperts(config), MoueSharedRouter(config)
        self.layers = nn.ModuleList(MoueDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        c, cache = self.config, take_cache(kwargs)
        for unused in ("cache_position", "return_dict", "output_attentions"):
            kwargs.pop(unused, None)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (c.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        position_ids = at[None] if position_ids is None else position_ids
        told = {"inputs_embeds": x, "input_embeds": x, "cache_position": at, "position_ids": position_ids, CACHE: cache}
        mask = create_causal_mask(
            config=c, attention_mask=attention_mask, **{name: x for name, x in told.items() if name in MASK_TAKES}
        )
        half = torch.arange(0, c.head_dim, 2, device=x.device, dtype=torch.float32)
        angle = position_ids[..., None].float() * (1.0 / c.rope_base ** (half / c.head_dim))
        angle = torch.cat((angle, angle), -1)[:, None]
        turn = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        state = x.new_zeros(x.shape[0] * x.shape[1], c.router_state_size, dtype=torch.float32)
        passed = [x]
        for layer in self.layers:
            x, state = layer(x, state, self, turn=turn, mask=mask, cache=cache, **kwargs)
            passed.append(x)
        x = passed[-1] = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=tuple(passed) if output_hidden_states else None, **{CACHE: cache}
        )


class MoueForCausalLM(MouePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if SINCE_5 else ["lm_head.weight"]

    def __init__(self, config: MoueConfig) -> None:
        super().__init__(config)
        self.model = MoueModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids=input_ids, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        kept = {CACHE: getattr(out, CACHE), "hidden_states": out.hidden_states}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
