"""What a MoUE model is, for transformers: one pool of experts, and the window of it that each layer sees.

An exported folder holds this file. It imports transformers (4.57 or newer) and nothing else.
"""

from __future__ import annotations

from typing import Any

try:
    from transformers import PreTrainedConfig as _Base
except ImportError:  # its name before 5
    from transformers import PretrainedConfig as _Base


class MoueConfig(_Base):
    """`windows` has an entry [first, width] for each MoE layer: experts first, first + 1, ... on the ring of
    `num_experts`, in ascending order of their ids. `num_dense_layers` leading layers have a dense FFN instead.

    qk_norm: "none", "head" (each head alone) or "all" (all heads at once). router: "softmax", "sigmoid", "norm",
    "universal" or "recurrent"; router_score: "softmax_topk" or "topk_softmax". expert_bias: the pool's experts have a
    bias that moves the choice and not the weights. router_masks: layers add a mask to their router's logits.
    """

    model_type = "moue"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 128,
        rope_base: float = 10000.0,  # not rope_theta, which transformers 5 rewrites
        rms_norm_eps: float = 1e-5,
        qk_norm: str = "head",
        clip_qkv: float | None = None,
        num_dense_layers: int = 0,
        intermediate_size: int = 512,
        num_experts: int = 32,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 64,
        shared_expert_intermediate_size: int = 0,
        windows: list[list[int]] | None = None,
        router: str = "softmax",
        router_score: str = "softmax_topk",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        router_norm_constant: float = 1.0,
        router_state_size: int = 0,
        router_state_decay: float = 0.9,
        expert_bias: bool = False,
        router_masks: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings, self.rope_base = max_position_embeddings, rope_base
        self.rms_norm_eps, self.qk_norm, self.clip_qkv = rms_norm_eps, qk_norm, clip_qkv
        self.num_dense_layers, self.intermediate_size = num_dense_layers, intermediate_size
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        layers = num_hidden_layers - num_dense_layers
        self.windows = windows if windows is not None else [[0, num_experts]] * layers
        self.router, self.router_score, self.norm_topk_prob = router, router_score, norm_topk_prob
        self.routed_scaling_factor, self.router_norm_constant = routed_scaling_factor, router_norm_constant
        self.router_state_size, self.router_state_decay = router_state_size, router_state_decay
        self.expert_bias, self.router_masks = expert_bias, router_masks
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def window_of(self, moe_layer: int) -> list[int]:
        """The expert ids that MoE layer `moe_layer` (0-based) sees, ascending: the rows of its router's weights."""
        first, width = self.windows[moe_layer]
        return sorted((first + j) % self.num_experts for j in range(width))
