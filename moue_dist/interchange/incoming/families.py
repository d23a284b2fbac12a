"""What a config.json says, in our options; families of models that we can express, and why others cannot be.

Follows transformers' modeling files of the families, 4.57 and 5.24: https://github.com/huggingface/transformers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moue_dist.config import ConfigError, ModelConfig
from moue_dist.interchange.incoming.folder import Folder
from moue_dist.interchange.names import MIXTRAL, QWEN, Style

DENSE, ROUTED = ("llama", "qwen3"), ("mixtral", "olmoe", "qwen3_moe")
LONGEST = 4096  # tokens of a sequence in the configuration that is written; models often name far more

OTHERS = {
    "deepseek_v2": "its attention is latent (MLA), which model.* cannot express",
    "deepseek_v3": "its attention is latent (MLA) and its router chooses among groups, which we cannot express",
    "gpt_oss": "its attention has sinks, biases and windows, which model.* cannot express",
    "mistral": "its attention may slide over a window; a Mistral without one is a `llama`",
    "qwen2": "its queries, keys and values have biases",
    "qwen2_moe": "its queries, keys and values have biases, and its shared expert a gate",
}


@dataclass(frozen=True)
class Foreign:
    """A model of another project: `experts` a layer, 0 for a dense one, whose FFN has `expert_width`."""

    kind: str
    model: ModelConfig
    experts: int
    expert_width: int
    top_k: int
    renormalise: bool
    style: Style = QWEN
    balance: float = 0.01  # coefficient of its auxiliary loss


def read(folder: Folder) -> Foreign:
    """The model of a folder. Raises ConfigError for one that cannot be expressed, with the reason."""
    kind = folder.key("model_type")
    if kind not in DENSE + ROUTED:
        why = OTHERS.get(kind, f"known are {', '.join(sorted(DENSE + ROUTED))}")
        raise ConfigError(f"{folder.path}: model_type={kind} cannot be converted: {why}")
    _refuse_what_differs(folder)
    model = _model(folder, kind)
    if kind in DENSE:
        return Foreign(kind, model, 0, folder.number("intermediate_size"), 1, False)
    return Foreign(
        kind,
        model,
        folder.number("num_experts", "num_local_experts"),
        folder.number("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        folder.number("num_experts_per_tok"),
        True if kind == "mixtral" else bool(folder.key("norm_topk_prob")),
        MIXTRAL if kind == "mixtral" else QWEN,
        float(folder.key("router_aux_loss_coef", default=0.01)),
    )


def _model(folder: Folder, kind: str) -> ModelConfig:
    hidden, heads = folder.number("hidden_size"), folder.number("num_attention_heads")
    keys, layers = folder.number("num_key_value_heads", default=heads), folder.number("num_hidden_layers")
    picked = hidden // heads if kind != "qwen3" and hidden % heads == 0 else ...
    width = folder.number("head_dim", default=picked)
    norms: dict[str, Literal["none", "head", "all"]] = {"olmoe": "all", "qwen3": "head", "qwen3_moe": "head"}
    dense = _dense_layers(folder, layers) if kind == "qwen3_moe" else 0
    return ModelConfig(
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=0 if keys == heads else keys,
        head_dim=0 if width * heads == hidden else width,
        vocab_size=folder.number("vocab_size"),
        sequence_length=min(folder.number("max_position_embeddings"), LONGEST),
        ffn_hidden_size=folder.number("intermediate_size") if dense else 0,
        dense_layers=dense,
        qk_norm=norms.get(kind, "none"),
        clip_qkv=float(folder.key("clip_qkv", default=0.0)) if kind == "olmoe" else 0.0,
        tied_head=bool(folder.key("tie_word_embeddings", default=not folder.has("lm_head.weight"))),
        rope_base=_rope_base(folder),
        norm_eps=float(folder.key("rms_norm_eps")),
        init_std=float(folder.key("initializer_range", default=0.02)),
    )


def _rope_base(folder: Folder) -> float:
    """From `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of 4."""
    rope: dict[str, Any] = folder.key("rope_parameters", default=None) or folder.key("rope_scaling", default={})
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{folder.path}: a RoPE for each kind of layer cannot be expressed")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ConfigError(
            f"{folder.path}: RoPE is scaled (rope_type={scaling}), which model.rope_base alone cannot express"
        )
    if rope.get("partial_rotary_factor", folder.key("partial_rotary_factor", default=1.0)) != 1.0:
        raise ConfigError(f"{folder.path}: RoPE turns a part of each head (partial_rotary_factor), not the whole")
    base = rope.get("rope_theta") or folder.key("rope_theta")
    if base != int(base):
        raise ConfigError(f"{folder.path}: rope_theta={base} is no whole number, as model.rope_base must be")
    return float(base)


def _dense_layers(folder: Folder, layers: int) -> int:
    """How many layers at the start have a dense FFN."""
    step, named = folder.number("decoder_sparse_step", default=1), folder.key("mlp_only_layers", default=[])
    dense = [i for i in range(layers) if i in named or (i + 1) % step]
    if dense != list(range(len(dense))):
        raise ConfigError(
            f"{folder.path}: layers {dense} are dense, of which model.dense_layers can only express the first ones"
        )
    return len(dense)


def _refuse_what_differs(folder: Folder) -> None:
    """Settings of known families under which the model is another function than ours."""
    key = folder.key
    windows = key("use_sliding_window", default=True) and key("sliding_window", default=None)
    kinds = set(key("layer_types", default=[])) - {"full_attention"}
    reasons = {
        "MLA": key("kv_lora_rank", "q_lora_rank", default=None),
        "groups of experts": key("n_group", "topk_group", default=1) != 1,
        "attention sinks": any(name.endswith(".sinks") for name in folder.tensors),
        "biases in attention (attention_bias)": key("attention_bias", "qkv_bias", default=False),
        "biases in FFNs (mlp_bias)": key("mlp_bias", default=False),
        f"a sliding window (sliding_window={windows})": windows,
        f"layers of other kinds ({', '.join(sorted(map(str, kinds)))})": kinds,
        f"the activation {key('hidden_act', default='silu')} in place of silu": key("hidden_act", default="silu")
        not in ("silu", "swish"),
        "weights in other numbers (quantization_config)": key("quantization_config", default=None),
    }
    for what, found in reasons.items():
        if found:
            raise ConfigError(f"{folder.path}: the model has {what}, which we cannot express")
