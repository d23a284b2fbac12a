"""What our weights are called in a checkpoint. Free of torch.

megatron-core names the norms before a linear after that linear, as Transformer Engine fuses the two. Under Transformer
Engine the norm before a MoE layer is fused with nothing and keeps its name, so that it has two in checkpoints.
"""

from __future__ import annotations

POOL = "pool.weight"  # [P, 3 f d]

_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def checkpoint_key(name: str) -> str:
    """A weight's key in a checkpoint, as the CPU's runs and `moue convert` write it."""
    for ours, key in _NORMS.items():
        name = name.replace(ours, key)
    return name


def other_key(key: str) -> str:
    """What else a norm may be called in a checkpoint; other keys stay."""
    for ours, there in _NORMS.items():
        if ours in key:
            return key.replace(ours, there)
        if there in key:
            return key.replace(there, ours)
    return key
