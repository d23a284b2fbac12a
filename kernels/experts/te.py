"""The experts as a pair of Transformer Engine GroupedLinear modules whose weights are the pool's own rows.

Written against Transformer Engine 2.11 (pytorch/module/grouped_linear.py, fp8_padding.py). What it relies on there:

- A `weight{i}` parameter may be replaced after construction; with `fuse_wgrad_accumulation` the weight-gradient GEMM
  writes into `weight{i}.main_grad`. Called with `is_first_microbatch=None` it always accumulates; `True` would
  overwrite, and with experts shared by layers the deepest use would win.
- Without a `grad_added_to_main_grad` attribute the parameters' autograd gradient is None: nothing reaches `.grad`.
- FP8 GEMMs need each expert's rows padded to a multiple of 16 (32 for MXFP8); Fp8Padding knows the recipe.
- The row counts are a list on the host, and a call without any row may crash or hang.

Whether a call computes in bf16 or in FP8, and by which recipe, is decided by the surrounding `te.pytorch.autocast`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moue_dist.config import ConfigError
from moue_dist.kernels.backend import default_impl
from moue_dist.kernels.experts.slab import PoolView
from moue_dist.kernels.experts.swiglu import swiglu
from moue_dist.kernels.sizes import check_sizes

IDLE_ROWS = 32  # legal for every recipe


def make_te_experts(slab: PoolView) -> TEExperts:
    """Build the modules over `slab`'s weights and gradient buffer (aliases, no copy). Needs CUDA and bf16 weights.

    Raises ConfigError where Transformer Engine is missing or the sizes are not multiples of 16.
    """
    return TEExperts(slab)


class TEExperts:
    """Call with (x_rd, counts_host) -> y_rd. Not an nn.Module: the pool owns the parameters, nobody else lists them."""

    def __init__(self, slab: PoolView) -> None:
        try:
            import transformer_engine.pytorch as te
        except (ImportError, OSError, AssertionError, RuntimeError) as error:  # absent, half installed, no CUDA
            raise ConfigError(
                f"moe.experts=te needs Transformer Engine ({error}); install the extra 'gpu' or use moe.experts=torch"
            ) from None
        check_sizes("te", slab.hidden, slab.width, slab.weight.element_size())
        self.slab = slab
        self.checkpoint = te.checkpoint
        self.fc1 = _grouped_linear(te, slab, slab.w_in, slab.g_in)
        self.fc2 = _grouped_linear(te, slab, slab.w_out, slab.g_out)
        self.pad = te.Fp8Padding(slab.count)
        self.unpad = te.Fp8Unpadding(slab.count)
        self.impl = default_impl(slab.weight.device)

    def __call__(self, x_rd: Tensor, counts_host: list[int], recompute: bool = False) -> Tensor:
        """[R, d] -> [R, d]; `counts_host` in the order of the slab's spans, summing to R.

        `recompute` keeps x instead of the pre-activation and runs fc1 and the activation again in backward. It is for
        use without an outer recompute: Transformer Engine keeps one flag for the recompute phase, which the inner one
        would reset.
        """
        rows, counts = x_rd.shape[0], list(counts_host)
        if torch.is_grad_enabled() and not x_rd.requires_grad:
            # the recomputing path and FP8 look at the input alone to decide whether backward will come
            x_rd = x_rd.detach().requires_grad_()
        if rows == 0:
            # rows of zeros keep a rank without tokens in step: delayed scaling reduces its maxima over all ranks
            x_rd = torch.cat((x_rd, x_rd.new_zeros(IDLE_ROWS, x_rd.shape[1])))
            counts[0] = IDLE_ROWS
        splits = counts
        if _fp8_active():
            x_rd, splits = self.pad(x_rd.contiguous(), counts)
        if recompute and torch.is_grad_enabled():
            h_rf = self.checkpoint(self._up, x_rd, splits)
        else:
            h_rf = self._up(x_rd, splits)
        y_rd = self.fc2(h_rf, splits, is_first_microbatch=None)
        if splits != counts:
            y_rd = self.unpad(y_rd, counts)
        return y_rd if y_rd.shape[0] == rows else y_rd[:rows]

    def _up(self, x_rd: Tensor, splits: list[int]) -> Tensor:
        return swiglu(self.fc1(x_rd, splits, is_first_microbatch=None), self.impl)


def _grouped_linear(te: Any, slab: PoolView, w_noi: Tensor, g_noi: Tensor) -> nn.Module:
    _, out_features, in_features = w_noi.shape
    linear = te.GroupedLinear(
        slab.count,
        in_features,
        out_features,
        bias=False,
        fuse_wgrad_accumulation=True,
        params_dtype=w_noi.dtype,
        device="meta",  # the weights are replaced below: allocate none
    )
    experts = [e for first, end in slab.spans for e in range(first, end)]
    for i, e in enumerate(experts):
        weight = nn.Parameter(w_noi[e].detach())
        weight.main_grad = g_noi[e].detach()  # type: ignore[attr-defined]
        setattr(linear, f"weight{i}", weight)
        # an empty placeholder that the module passes on although it has no bias; it was made on the meta device
        setattr(linear, f"bias{i}", w_noi.new_empty(0).detach())
    return linear


def _fp8_active() -> bool:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager.is_fp8_enabled()
