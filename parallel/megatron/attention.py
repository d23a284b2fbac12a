"""Adapter to megatron-core 0.16.1, the attention's part: the norm of queries and keys over all heads, and clipping.

megatron-core norms each head alone. OLMoE norms all of a token's heads at once, so that tensor-parallel ranks, each
with a part of the heads, must add up their squares.

Legend: s sequence, b batch, h heads of this rank, c head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from moue_dist.parallel.device import this_device


class AllHeadsNorm(nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks; `weight` [h * c] is this rank's part, in their order."""

    def __init__(self, heads: int, head_width: int, eps: float, config: TransformerConfig) -> None:
        super().__init__()
        self.eps, self.ranks = eps, config.tensor_model_parallel_size
        mine = heads // self.ranks * head_width
        self.weight = nn.Parameter(torch.ones(mine, dtype=config.params_dtype, device=this_device()))
        if self.ranks > 1:
            marks: Any = self.weight
            marks.tensor_model_parallel, marks.partition_dim, marks.partition_stride = True, 0, 1

    def forward(self, x_sbhc: Tensor) -> Tensor:
        flat = x_sbhc.flatten(-2)
        if self.ranks == 1:
            return F.rms_norm(flat, self.weight.shape, self.weight, self.eps).view(x_sbhc.shape)
        wide = flat.float()
        squares = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), _group())
        normed = wide * torch.rsqrt(squares / (flat.shape[-1] * self.ranks) + self.eps)
        return (normed * self.weight.float()).to(flat.dtype).view(x_sbhc.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        axes = {"weight": 0} if self.ranks > 1 else {}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)  # type: ignore[no-any-return]


class AllQueriesNorm(AllHeadsNorm):
    """As megatron-core builds a norm of queries."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, **_: Any) -> None:
        super().__init__(config.num_attention_heads, hidden_size, eps, config)


class AllKeysNorm(AllHeadsNorm):
    """As megatron-core builds a norm of keys."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, **_: Any) -> None:
        assert config.num_query_groups is not None
        super().__init__(config.num_query_groups, hidden_size, eps, config)


class ClippedAttention(SelfAttention):
    """Clamps queries, keys and values to +- `clip` after the norms, before RoPE: `clip_qkv` of OLMoE."""

    def __init__(self, *args: Any, clip: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip = clip

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found = super().get_query_key_value_tensors(*args, **kwargs)
        assert len(found) == 3, "queries, keys and values apart: no output gate, no RoPE of all three at once"
        return tuple(x.clamp(-self.clip, self.clip) for x in found)


class _SumOverRanks(torch.autograd.Function):
    """A sum over tensor-parallel ranks each of which goes on with it: its gradient is their gradients' sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()
