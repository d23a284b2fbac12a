"""Which tensors of a Hugging Face model make which weight of ours, and how they are joined. No file is touched.

Our names are megatron-core's with the layer's global number, those of `model/init.py`; `checkpoint_key` spells them as
a checkpoint does. The pool is not among the parts: a row of it is an expert, `join_expert` of its three matrices.

Legend: d hidden, h heads, g key-value heads, c head width, f width of an FFN or an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moue_dist.checkpoint.names import POOL, checkpoint_key, other_key
from moue_dist.config import Config, ModelConfig

__all__ = [
    "HEAD", "LAYER", "MIXTRAL", "POOL", "QK_NORM", "QWEN", "ROUTER", "TOP", "Part", "Style", "checkpoint_key",
    "expert_names", "fused_names", "join", "join_expert", "other_key", "parts", "split", "split_expert",
]  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a family of models names what is not the same everywhere, below `model.layers.N.`."""

    router: str = "mlp.gate."
    experts: str = "mlp.experts."  # before the expert's number, or before the fused `gate_up_proj` and `down_proj`
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_expert."


QWEN = Style()  # also OLMoE, and ours
MIXTRAL = Style(router="block_sparse_moe.gate.", experts="block_sparse_moe.experts.", gate="w1", up="w3", down="w2")

TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
HEAD = {"output_layer.weight": "lm_head.weight"}  # without model.tied_head
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
}
QK_NORM = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
ROUTER = {  # weights of each layer's router, by moe.router
    "softmax": ("weight",),
    "sigmoid": ("weight",),
    "norm": ("weight", "scale"),
    "universal": ("query",),
    "recurrent": ("input", "gate"),
}


@dataclass(frozen=True)
class Part:
    """One weight of ours and the tensors that make it: a copy, rows one upon another, or queries, keys, values."""

    ours: str
    theirs: tuple[str, ...]
    how: Literal["copy", "stack", "qkv"] = "copy"


def parts(config: Config, style: Style = QWEN) -> Iterator[Part]:
    """Every weight but the pool and what all layers' routers share, in the order of the model."""
    m, e = config.model, config.moe
    for ours, theirs in (TOP if m.tied_head else TOP | HEAD).items():
        yield Part(ours, (theirs,))
    for i in range(m.layers):
        a, b = f"decoder.layers.{i}.", f"model.layers.{i}."
        for ours, theirs in (LAYER if m.qk_norm == "none" else LAYER | QK_NORM).items():
            yield Part(a + ours, (b + theirs,))
        qkv = tuple(f"{b}self_attn.{x}_proj.weight" for x in "qkv")
        yield Part(a + "self_attention.linear_qkv.weight", qkv, "qkv")
        if i < m.dense_layers:
            yield from _ffn(a + "mlp.", b + "mlp.")
            continue
        for name in ROUTER[e.router]:
            yield Part(f"{a}mlp.router.{name}", (f"{b}{style.router}{name}",))
        if e.shared_expert_width:
            yield from _ffn(a + "mlp.shared_expert.", b + style.shared)


def _ffn(ours: str, theirs: str) -> Iterator[Part]:
    pair = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    yield Part(ours + "linear_fc1.weight", pair, "stack")
    yield Part(ours + "linear_fc2.weight", (f"{theirs}down_proj.weight",))


def expert_names(layer: int, expert: int, style: Style = QWEN) -> tuple[str, str, str]:
    """Gate [f, d], up [f, d] and down [d, f] of one expert, as they stand on disk one by one."""
    before = f"model.layers.{layer}.{style.experts}{expert}."
    return f"{before}{style.gate}.weight", f"{before}{style.up}.weight", f"{before}{style.down}.weight"


def fused_names(layer: int, style: Style = QWEN) -> tuple[str, str]:
    """gate_up [E, 2f, d], gate rows first, and down [E, d, f] of a layer's experts at once, as in memory."""
    before = f"model.layers.{layer}.{style.experts}"
    return before + "gate_up_proj", before + "down_proj"


# joining and parting


def join(part: Part, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Our weight from theirs; raises ValueError where the shapes do not fit."""
    if part.how == "copy":
        return tensors[0]
    if part.how == "stack":
        return torch.cat(list(tensors))
    g, c, d = model.groups, model.head_width, tensors[0].shape[-1]
    q, k, v = tensors
    if q.shape != (model.heads * c, d) or k.shape != (g * c, d) or v.shape != k.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"queries, keys and values of shapes {shapes} do not fit {model.heads} and {g} heads of {c}")
    # megatron-core's order: for each key-value head its queries, then k, then v.
    return torch.cat([q.view(g, -1, d), k.view(g, c, d), v.view(g, c, d)], 1).reshape(-1, d)


def split(part: Part, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Their tensors from our weight: the inverse of `join`."""
    if part.how == "copy":
        return (tensor,)
    if part.how == "stack":
        return tensor.chunk(2)
    g, c, d = model.groups, model.head_width, tensor.shape[-1]
    sizes = [model.heads // g * c, c, c]
    return tuple(x.reshape(-1, d) for x in tensor.view(g, sum(sizes), d).split(sizes, 1))


def join_expert(gate_fd: Tensor, up_fd: Tensor, down_df: Tensor) -> Tensor:
    """A row of the pool, [3 f d]: gate and up rows, then down."""
    return torch.cat([gate_fd.flatten(), up_fd.flatten(), down_df.flatten()])


def split_expert(row: Tensor, width: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate [f, d], up [f, d] and down [d, f] of a row of the pool."""
    gate, up, down = row.view(3, width * hidden)
    return gate.view(width, hidden), up.view(width, hidden), down.view(hidden, width)
