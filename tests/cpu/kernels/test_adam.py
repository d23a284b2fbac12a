"""AdamW with the clip factor inside: against torch.optim.AdamW, and the Triton kernel in the interpreter.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from moue_dist.kernels.adam import Hyper, adamw_step
from moue_dist.kernels.backend import has_triton

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def states(n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    master = torch.randn(n, device=device)
    weight = master if dtype == torch.float32 else master.to(dtype)
    return master, torch.zeros_like(master), torch.zeros_like(master), weight


def agree(impl: Literal["torch", "triton"], n: int, dtype: torch.dtype, clip: float, device: str = "cpu") -> None:
    """Six steps as torch.optim.AdamW takes them from clipped gradients; gradients stay as they are."""
    torch.manual_seed(n)
    master, m, v, weight = states(n, dtype, device)
    truth = torch.nn.Parameter(master.double())
    adam = torch.optim.AdamW([truth], lr=0.0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(1, 7):
        grad = torch.randn(n, device=device) * 10.0 ** -(step % 3)
        before = grad.clone()
        truth.grad = grad.double() * clip
        adam.param_groups[0]["lr"] = lr = 1e-2 / step
        adam.step()
        adamw_step(master, grad, m, v, weight, Hyper(lr, *BETAS, EPS, DECAY, step), clip, impl)
        assert torch.equal(grad, before)
        torch.testing.assert_close(master.double(), truth.detach(), rtol=2e-5, atol=1e-6)
        # The interpreter cuts what a device rounds.
        unit = 2.0**-7 if impl == "triton" and device == "cpu" else 0.0
        torch.testing.assert_close(weight.float(), master.to(dtype).float(), rtol=unit, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "clip"), [(1, 1.0), (37, 0.3), (0, 1.0)])
def test_the_reference_is_torchs(n: int, clip: float, dtype: torch.dtype) -> None:
    agree("torch", n, dtype, clip)


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_triton_kernel_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    for size in (1, 37, 2500):
        agree("triton", size, torch.float32, 0.3)
        agree("triton", size, torch.bfloat16, 1.0)
