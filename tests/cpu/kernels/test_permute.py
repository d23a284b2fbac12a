"""Row gathering and its gradients against plain autograd, and the Triton kernels against the reference.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moue_dist.kernels.rows.permute import combine, gather_dot, gather_rows, gather_sum, permute

ROOT = Path(__file__).resolve().parents[3]


def routing(tokens: int, k: int, experts: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(position_tk, source_r, choice_r) of a random choice of k different experts per token, rows sorted by expert."""
    choice_tk = torch.rand(tokens, experts).argsort(1)[:, :k]
    choice_r = choice_tk.reshape(-1).argsort(stable=True)
    position_tk = torch.empty_like(choice_r)
    position_tk[choice_r] = torch.arange(tokens * k)
    return position_tk.reshape(tokens, k), choice_r // k, choice_r


def test_docstring_examples():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert gather_rows(x, torch.tensor([1, -1, 0]), torch.tensor([2.0, 5.0, 1.0])).tolist() == [[6, 8], [0, 0], [1, 2]]
    rows = torch.tensor([[1.0, 1.0], [10.0, 10.0]])
    weight = torch.tensor([[1.0, 0.5], [2.0, 9.0]])
    assert gather_sum(rows, torch.tensor([[0, 1], [1, -1]]), weight).tolist() == [[6, 6], [20, 20]]
    dy = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert gather_dot(x, torch.tensor([[1, 0], [0, -1]]), dy).tolist() == [[7, 3], [2, 0]]
    out = permute(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1, 0, 1]), torch.tensor([[2, 0], [1, 3]]))
    assert out.tolist() == [[1], [2], [1], [2]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_there_and_back_is_the_weighted_identity(dtype):
    torch.manual_seed(0)
    position, source, slot = (i.to(dtype) for i in routing(7, 3))
    x, weight = torch.randn(7, 6, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    y = combine(permute(x, source, position), weight, position, source, slot)
    torch.testing.assert_close(y, x * weight.sum(1, keepdim=True))


def test_gradients_in_float64():
    torch.manual_seed(1)
    position, source, slot = routing(6, 2)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, source, position), x)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, position, source, slot), (rows, weight))


def test_gradients_where_nobody_owns_a_row_or_a_choice():
    """A dropped choice has position -1; a padding row has source -1 and any slot."""
    position = torch.tensor([[0, 3], [-1, 1]])
    source, slot = torch.tensor([0, 1, -1, 0]), torch.tensor([0, 3, -1, 1])
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, position, source, slot), (rows, weight))
    assert torch.autograd.gradcheck(lambda x: permute(x, source, position), x)
    rows.grad = None
    combine(rows, weight, position, source, slot).sum().backward()
    assert rows.grad[2].tolist() == [0, 0, 0]


def test_autograd_agrees_with_indexing():
    torch.manual_seed(2)
    position, source, slot = routing(33, 4)
    x = torch.randn(33, 24, requires_grad=True)
    weight = torch.rand(33, 4, requires_grad=True)
    dy = torch.randn(33, 24)
    combine(permute(x, source, position).tanh(), weight, position, source, slot).backward(dy)
    got = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    (x[source].tanh()[position] * weight[..., None]).sum(1).backward(dy)
    torch.testing.assert_close(got, (x.grad, weight.grad))


def test_bf16_is_summed_in_fp32():
    rows = torch.ones(384, 16, dtype=torch.bfloat16)  # in bf16, 256 + 1 stays 256
    assert gather_sum(rows, torch.arange(384).reshape(1, 384))[0, 0].item() == 384
    assert gather_dot(rows[:1], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 16)).dtype == torch.float32


def test_empty():
    no_rows, no_tokens = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    x = torch.empty(0, 8, requires_grad=True)
    weight = torch.empty(0, 2, requires_grad=True)
    y = combine(permute(x, no_rows, no_tokens), weight, no_tokens, no_rows, no_rows)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 8) and weight.grad.shape == (0, 2)
    assert gather_sum(torch.empty(0, 8), torch.full((3, 2), -1)).tolist() == [[0] * 8] * 3


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["16", "96", "100", "2500", "autograd", "empty", "done"]


def interpret() -> None:
    # 16 smaller than any vector; 96 no power of two; 100 unaligned rows; 2500 more than one tile wide
    for d, tokens, k in ((16, 19, 2), (96, 40, 3), (100, 5, 4), (2500, 3, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            check_kernels(d, tokens, k, dtype)
        print(d)
    torch.manual_seed(3)
    position, source, slot = routing(9, 3)
    rows, weight, dy = torch.randn(27, 20), torch.rand(9, 3), torch.randn(9, 20)
    results = []
    for impl in ("torch", "triton"):
        a, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        y = combine(permute(combine(a, w, position, source, slot, impl), source, position, impl), w, position, source,
                    slot, impl)  # fmt: skip
        y.backward(dy)
        results.append((y.detach(), a.grad, w.grad))
    torch.testing.assert_close(*results)
    print("autograd")
    none, no_tokens = torch.empty(0, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int32)
    assert gather_rows(torch.empty(0, 8), none, impl="triton").shape == (0, 8)
    assert gather_rows(torch.empty(0, 8), none - 1, impl="triton").shape == (0, 8)
    assert gather_sum(torch.empty(0, 8), no_tokens, impl="triton").shape == (0, 8)
    assert gather_sum(torch.empty(0, 8), torch.full((3, 2), -1), impl="triton").tolist() == [[0] * 8] * 3
    assert gather_dot(torch.empty(0, 8), no_tokens, torch.empty(0, 8), impl="triton").shape == (0, 2)
    print("empty")


def check_kernels(d: int, tokens: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(d)
    rows, dy = torch.randn(tokens * k, d).to(dtype), torch.randn(tokens, d).to(dtype)
    position, source, slot = routing(tokens, k)
    position[0, 0] = source[slot == 0] = -1  # the first choice was dropped
    position, source = position.to(torch.int32), source
    weight, scale = torch.rand(tokens, k), torch.rand(tokens * k)
    weight[0, 0] = scale[slot == 0] = torch.nan  # whatever stands there must not be read
    for call in (
        lambda impl: gather_rows(dy, source, impl=impl),
        lambda impl: gather_rows(dy, source, scale, impl=impl),
        lambda impl: gather_sum(rows, position, impl=impl),
        lambda impl: gather_sum(rows, position, weight, impl=impl),
        lambda impl: gather_dot(rows, position, dy, impl=impl),
    ):
        expected, got = call("torch"), call("triton")
        assert not expected.isnan().any() and got.dtype == expected.dtype
        # the interpreter truncates to bf16 where the device rounds: one unit in the last place
        tolerance = {"rtol": 2**-7, "atol": 1e-6} if expected.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(got, expected, **tolerance)


if __name__ == "__main__":
    interpret()
    print("done")
