"""Rows of two tensors moved as those of one: against joining them first, and the Triton kernels against the reference.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl
from moue_dist.kernels.rows.pair import gather_pair, gather_sum_pair

ROOT = Path(__file__).resolve().parents[3]


def test_docstring_examples() -> None:
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    assert gather_pair(first, second, torch.tensor([2, 0, -1])).tolist() == [[3], [1], [0]]
    index, weight = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1.0, 0.5], [2.0, 9.0]])
    assert gather_sum_pair(torch.ones(1, 1), torch.full((1, 1), 10.0), index, weight).tolist() == [[6], [20]]


def parts(d: int, dtype: torch.dtype, sizes: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    """Two tensors whose rows lie in wider ones, between numbers that nobody may read."""
    torch.manual_seed(d)
    made = []
    for size, left, right in ((sizes[0], 0, 0), (sizes[1], 8, 16)):
        wide = torch.full((size, left + d + right), torch.nan, dtype=dtype)
        wide[:, left : left + d] = torch.randn(size, d)
        made.append(wide[:, left : left + d])
    return made[0], made[1]


def check(d: int, dtype: torch.dtype, impl: Impl) -> None:
    first, second = parts(d, dtype)
    joined = torch.cat([first, second]).double()
    index = torch.tensor([11, 0, -1, 4, 5, 4, 11, 6, 3])
    expected = torch.where((index < 0)[:, None], 0.0, joined[index.clamp_min(0)])
    near = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for kind in (torch.int32, torch.int64):
        assert torch.equal(gather_pair(first, second, index.to(kind), impl=impl).double(), expected)

    roomy = gather_pair(first, second, index, room=40, impl=impl)
    assert roomy.shape == (40, d) and torch.equal(roomy[:9].double(), expected)
    wide = torch.full((9, d + 24), 3.0, dtype=dtype)
    out = wide[:, 8 : 8 + d]
    assert gather_pair(first, second, index, out=out, impl=impl) is out
    assert torch.equal(out.double(), expected) and (wide[:, :8] == 3).all() and (wide[:, 8 + d :] == 3).all()

    index_tk, weight = torch.tensor([[0, 11, 4], [-1, 5, 5], [3, -1, -1], [-1, -1, -1]]), torch.rand(4, 3)
    weight[2, 1] = torch.nan  # whatever stands there must not be read
    for weight_tk in (None, weight):
        total = torch.zeros(4, d, dtype=torch.float64)
        for (t, k), row in zip(((t, k) for t in range(4) for k in range(3)), index_tk.flatten().tolist(), strict=True):
            if row >= 0:
                total[t] += joined[row] * (1 if weight_tk is None else float(weight_tk[t, k]))
        got = gather_sum_pair(first, second, index_tk, weight_tk, impl)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), total, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 16, 100])
def test_as_if_they_were_one(d: int, dtype: torch.dtype) -> None:
    check(d, dtype, "torch")


def check_empty(impl: Impl) -> None:
    first, second = parts(8, torch.float32)
    nothing, no_index = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    assert gather_pair(first, second, no_index, impl=impl).shape == (0, 8)
    assert gather_pair(first, nothing, torch.tensor([4]), impl=impl).equal(first[4:])
    assert gather_pair(nothing, second, torch.tensor([6]), impl=impl).equal(second[6:])
    assert gather_pair(nothing, nothing, torch.tensor([-1]), impl=impl).equal(torch.zeros(1, 8))
    assert gather_sum_pair(nothing, second, torch.tensor([[0, 0]]), impl=impl).equal(2 * second[:1])
    assert gather_sum_pair(nothing, nothing, torch.empty(0, 2, dtype=torch.int64), impl=impl).shape == (0, 8)


def test_one_of_them_may_be_empty() -> None:
    check_empty("torch")


def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["16", "96", "100", "2500", "done"]


if __name__ == "__main__":
    # 16 smaller than any vector; 96 no power of two; 100 unaligned rows; 2500 more than one tile wide
    for width in (16, 96, 100, 2500):
        for kind in (torch.float32, torch.bfloat16):
            check(width, kind, "triton")
        print(width)
    check_empty("triton")
    for wrong in (torch.ones(2, 9), torch.ones(2, 8).bfloat16(), torch.ones(8, 2).t()):
        with pytest.raises(ValueError, match="row"):
            gather_pair(torch.ones(2, 8), wrong, torch.tensor([0]), impl="triton")
    print("done")
