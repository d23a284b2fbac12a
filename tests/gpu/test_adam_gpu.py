"""The optimizer's kernel on the device."""

from __future__ import annotations

import pytest
import torch

from tests.cpu.kernels.test_adam import agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "clip"), [(1, 1.0), (100_003, 0.3)])
def test_the_kernel_is_torchs_adamw(n: int, clip: float, dtype: torch.dtype) -> None:
    agree("triton", n, dtype, clip, "cuda")
