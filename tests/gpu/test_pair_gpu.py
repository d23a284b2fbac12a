"""Rows of two tensors moved as those of one, on the device against the reference."""

from __future__ import annotations

import pytest
import torch

from moue_dist.kernels.rows.pair import gather_pair, gather_sum_pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "a", "b", "k"), [(16, 100, 40, 2), (2048, 333, 77, 8), (1000, 5, 0, 1), (333, 0, 9, 4)])
def test_pairs(d: int, a: int, b: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(d)
    first = torch.randn(a, d, device="cuda").to(dtype)
    second = torch.randn(b, d + 8, device="cuda").to(dtype)[:, :d]
    index = torch.randint(-1, a + b, (500 * k,), device="cuda")
    out = torch.zeros(500 * k, d + 8, dtype=dtype, device="cuda")
    expected = gather_pair(first, second, index, impl="torch")
    assert torch.equal(gather_pair(first, second, index), expected)
    assert torch.equal(gather_pair(first, second, index, out=out[:, :d]), expected) and not out[:, d:].any()
    weight = torch.rand(500, k, device="cuda")
    near = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for weight_tk in (None, weight):
        got, wanted = (gather_sum_pair(first, second, index.view(500, k), weight_tk, impl) for impl in (None, "torch"))
        torch.testing.assert_close(got, wanted, **near)
