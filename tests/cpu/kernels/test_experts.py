"""The experts over a slab of the pool against plain autograd, their backends, SwiGLU, and the Triton kernels.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moue_dist.config import ConfigError
from moue_dist.kernels.backend import has_transformer_engine
from moue_dist.kernels.experts.grouped_gemm import LoopGemm, accumulate
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_mlp
from moue_dist.kernels.experts.swiglu import swiglu, swiglu_backward, swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.experts.wgrad import WeightGradients, add_weight_gradients

ROOT = Path(__file__).resolve().parents[3]

# (spans of visible experts among 6 held, rows of each): one span; wrapped window in its own order; an expert without
# rows at either end and inside; a span without rows; one expert; no rows at all
LAYOUTS = [
    (((1, 5),), [3, 5, 1, 2]),
    (((4, 6), (0, 2)), [2, 7, 1, 4]),
    (((0, 6),), [0, 3, 0, 0, 9, 0]),
    (((0, 1), (2, 4), (5, 6)), [4, 0, 0, 3]),
    (((3, 4),), [5]),
    (((1, 3), (4, 5)), [0, 0, 0]),
]


def make(spans, dtype=torch.float32, hidden=24, width=16, seed=0, merged=1) -> ExpertSlab:
    torch.manual_seed(seed)
    weight = (torch.randn(6, 3 * width * hidden) / hidden**0.5).to(dtype)
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(6, 3 * width * hidden, dtype=grad_dtype)  # what was there before must stay
    return ExpertSlab(weight, grad, hidden, width, spans, WeightGradients(merged))


def reference(x: torch.Tensor, slab: ExpertSlab, counts: list[int], dy: torch.Tensor):
    """(y, dx, dweight) by plain autograd in float64, one nn.Linear-like product at a time."""
    x, pool = x.detach().double().requires_grad_(), slab.weight.detach().double().requires_grad_()
    experts = [e for first, end in slab.spans for e in range(first, end)]
    f, d, out = slab.width, slab.hidden, []
    for e, rows in zip(experts, x.split(counts), strict=True):
        gate, up = pool[e, : f * d].view(f, d), pool[e, f * d : 2 * f * d].view(f, d)
        w_out = pool[e, 2 * f * d :].view(d, f)
        out.append((torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ w_out.T)
    y = torch.cat(out)
    dx, dpool = torch.autograd.grad(y, (x, pool), dy.double())
    return y.detach(), dx, dpool


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [
        ("loop", torch.float32, 1e-6),
        ("loop", torch.bfloat16, 1e-2),
        ("torch", torch.float32, 1e-6),
        ("torch", torch.bfloat16, 1e-2),
    ],
)
@pytest.mark.parametrize(("spans", "counts"), LAYOUTS)
def test_equals_autograd(spans, counts, backend, dtype, limit, host, recompute):
    slab = make(spans, dtype)
    before = slab.grad.clone()
    x = torch.randn(sum(counts), slab.hidden).to(dtype).requires_grad_()
    dy = torch.randn(sum(counts), slab.hidden).to(dtype)
    y, dx, dpool = reference(x, slab, counts, dy)
    counts_n = torch.tensor(counts)
    got = expert_mlp(x, counts_n, slab, backend=backend, recompute=recompute, counts_host=counts if host else None)
    got.backward(dy)
    assert got.dtype == dtype and x.grad.dtype == dtype and slab.weight.grad is None
    assert relative(got.detach(), y) < limit and relative(x.grad, dx) < limit
    assert relative(slab.grad - before, dpool) < limit
    without_rows = dpool.abs().sum(1) == 0
    assert torch.equal(slab.grad[without_rows], before[without_rows])  # untouched, bit for bit


@pytest.mark.parametrize(("spans", "counts"), LAYOUTS[:4])
def test_gradcheck_of_the_inputs(spans, counts):
    slab = make(spans, torch.float64, hidden=4, width=2)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    counts_n = torch.tensor(counts)
    assert torch.autograd.gradcheck(lambda x: expert_mlp(x, counts_n, slab, backend="loop"), x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_two_layers_add_up_and_recompute_does_not_count_twice(backend, use_reentrant):
    """Two layers share experts 1 and 2 and see them through different windows."""
    counts = [3, 2, 4]
    results = []
    for wrapped in (False, True):
        slab = make(((0, 3),))
        other = ExpertSlab(slab.weight, slab.grad, slab.hidden, slab.width, ((1, 4),))
        slab.grad.zero_()
        x = torch.randn(9, slab.hidden).requires_grad_()

        def layers(x, slab=slab, other=other):
            x = x + expert_mlp(x, torch.tensor(counts), slab, backend=backend)
            return x + expert_mlp(x, torch.tensor(counts), other, backend=backend)

        y = checkpoint(layers, x, use_reentrant=use_reentrant) if wrapped else layers(x)
        y.square().sum().backward()
        results.append((x.grad, slab.grad))
    torch.testing.assert_close(*results)

    pool = slab.weight.detach().requires_grad_()
    y = x = x.detach()
    for first in (0, 1):
        parts = []
        for e, rows in zip(range(first, first + 3), y.split(counts), strict=True):
            gate_up, out = pool[e, : 2 * 16 * 24].view(32, 24), pool[e, 2 * 16 * 24 :].view(24, 16)
            gate, up = (rows @ gate_up.T).chunk(2, 1)
            parts.append((torch.nn.functional.silu(gate) * up) @ out.T)
        y = y + torch.cat(parts)
    y.square().sum().backward()
    torch.testing.assert_close(results[1][1], pool.grad)


def test_weight_gradients_do_not_need_the_inputs_gradient():
    slab = make(((0, 2),))
    slab.grad.zero_()
    x = torch.randn(5, slab.hidden)
    expert_mlp(x, torch.tensor([2, 3]), slab, backend="loop").sum().backward()
    _, _, dpool = reference(x, slab, [2, 3], torch.ones(5, slab.hidden))
    assert relative(slab.grad, dpool) < 1e-6
    with torch.no_grad():
        assert not expert_mlp(x, torch.tensor([2, 3]), slab, backend="loop").requires_grad


def test_slab_views_alias_the_pool():
    slab = make(((0, 2), (5, 6)))
    assert slab.count == 3
    slab.w_in[5, 0, 0], slab.w_out[5, 23, 15], slab.g_in[1, 31, 23] = 7.0, 8.0, 9.0
    assert (slab.weight[5, 0], slab.weight[5, -1], slab.grad[1, 2 * 16 * 24 - 1]) == (7, 8, 9)
    with pytest.raises(ValueError, match="spans"):
        make(((4, 7),))
    with pytest.raises(ValueError, match="counts_host"):
        expert_mlp(torch.zeros(4, 24), torch.tensor([1, 1, 1]), slab, backend="loop", counts_host=[1, 1, 1])
    assert LoopGemm.of(((2, 4), (0, 1)), [3, 0, 2]).segments == ((2, 0, 3), (0, 3, 5))


def test_swiglu():
    z = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, z)
    assert swiglu_forward(torch.tensor([[0.0, 2.0], [20.0, 2.0]])).tolist() == [[0], [pytest.approx(40, rel=1e-6)]]
    dz, h = swiglu_backward(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]]))
    assert dz.tolist() == [[1, 0]] and h.tolist() == [[0]]
    assert swiglu_forward(torch.empty(0, 8)).shape == (0, 4)


def test_weighted_swiglu_backward():
    """What autograd gives for weight * swiglu(z)."""
    z = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    weight, dh = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    h = swiglu(z)
    (weight[:, None] * h).backward(dh)
    dz, weighted, dweight = swiglu_weighted_backward(z.detach(), dh, weight.detach())
    torch.testing.assert_close((dz, weighted, dweight), (z.grad, (weight[:, None] * h).detach(), weight.grad))
    example = swiglu_weighted_backward(torch.tensor([[20.0, 2.0]]), torch.ones(1, 1), torch.tensor([0.5]))
    torch.testing.assert_close(example, (torch.tensor([[1.0, 10.0]]), torch.tensor([[20.0]]), torch.tensor([40.0])))


def segments(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Three layers' rows over five experts: unaligned numbers, an expert that nobody uses, one that one layer uses."""
    torch.manual_seed(seed)
    counts = torch.tensor([[3, 0, 21, 1, 0], [0, 0, 2, 7, 0], [40, 0, 1, 0, 5]])
    rows = counts.sum(1).tolist()
    return [torch.randn(r, 24) for r in rows], [torch.randn(r, 40) for r in rows], counts, counts.cumsum(1) - counts


def test_weight_gradients_of_several_layers():
    dys, xs, counts, starts = segments()
    total = torch.randn(5, 24, 40)
    expected = total.clone()
    for dy, x, count in zip(dys, xs, counts.tolist(), strict=True):
        for n, (a, b) in enumerate(zip(dy.split(count), x.split(count), strict=True)):
            expected[n] += a.T @ b
    before = total[1].clone()
    add_weight_gradients(total, dys, xs, counts, starts, "torch")
    torch.testing.assert_close(total, expected)
    assert torch.equal(total[1], before)
    example = torch.tensor([[[0.0]], [[1.0]]])
    column = torch.tensor([[1.0], [1.0], [2.0]])
    given = [torch.tensor([[1.0], [2.0], [3.0]])], [column], torch.tensor([[2, 1]]), torch.tensor([[0, 2]])
    add_weight_gradients(example, *given, "torch")
    assert example.flatten().tolist() == [3, 7]


@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_weight_gradients_wait_for_each_other(backend):
    """Two of three backward passes are added together, the third by `flush`; the sum is that of adding each at once."""
    sums = []
    for merged in (1, 2):
        slab = make(((4, 6), (0, 2)), merged=merged)
        before = slab.grad.clone()
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(12, slab.hidden).requires_grad_()
            expert_mlp(x, torch.tensor([5, 0, 4, 3]), slab, backend=backend).square().sum().backward()
            if merged == 2:
                assert torch.equal(slab.grad, before) == (seed == 0)
        if merged == 2:
            waiting = slab.grad.clone()
            slab.sums.flush()
            assert not torch.equal(slab.grad, waiting)
        sums.append(slab.grad)
    torch.testing.assert_close(*sums)
    before = slab.grad.clone()
    expert_mlp(x, torch.tensor([5, 0, 4, 3]), slab, backend=backend).sum().backward()
    slab.sums.drop()
    slab.sums.flush()
    assert torch.equal(slab.grad, before)


def test_accumulate_skips_experts_without_rows():
    total, part = torch.ones(2, 1, 1), torch.tensor([2.0, torch.nan]).view(2, 1, 1)
    accumulate(total, part, torch.tensor([5, 0]))
    assert total.flatten().tolist() == [3, 1]


def test_sizes_that_the_grouped_gemm_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        expert_mlp(torch.zeros(1, 6), torch.tensor([1]), make(((0, 1),), hidden=6), backend="torch")


@pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is installed: tests/gpu runs it")
def test_te_without_transformer_engine_says_what_to_install():
    with pytest.raises(ConfigError, match="extra 'gpu'"):
        expert_mlp(torch.zeros(1, 32), torch.tensor([1]), make(((0, 1),), hidden=32), backend="te")


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["8", "96", "2100", "gradients", "experts", "done"]


class LenientInt(type):
    """`int` for Triton 3.6's interpreter: of an array with one number, too, where a loop ends at a loaded number.

    NumPy 2.4 no longer allows that.
    """

    def __call__(cls, x):
        return x.item() if hasattr(x, "item") else int(x)

    def __instancecheck__(cls, x):
        return isinstance(x, int)


def interpret() -> None:
    from triton.runtime import interpreter

    interpreter.int = LenientInt("int", (), {})
    # 8 smaller than a tile's row; 96 no power of two; 2100 more than one tile wide
    for f, rows in ((8, 300), (96, 13), (2100, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(f)
            z, dh = (3 * torch.randn(rows, 2 * f)).to(dtype), torch.randn(rows, f).to(dtype)
            # the interpreter truncates to bf16 where the device rounds: one unit in the last place
            near = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(swiglu_forward(z, "triton"), swiglu_forward(z, "torch"), **near)
            torch.testing.assert_close(swiglu_backward(z, dh, "triton"), swiglu_backward(z, dh, "torch"), **near)
            weight = torch.rand(rows)
            got, expected = (swiglu_weighted_backward(z, dh, weight, impl) for impl in ("triton", "torch"))
            torch.testing.assert_close(got, expected, **(near | {"atol": 1e-5 * f}))
        print(f)
    totals = []
    for impl in ("torch", "triton"):
        dys, xs, counts, starts = segments()
        pool = torch.ones(5, 2000)[:, 7 : 7 + 960]  # a part of a row, as w_in and w_out are
        add_weight_gradients(pool.view(5, 24, 40), dys, xs, counts, starts, impl)
        totals.append(pool)
    torch.testing.assert_close(*totals)
    from moue_dist.kernels.experts import wgrad_triton

    torch.manual_seed(0)
    counts = torch.tensor([[70, 0, 3, 64, 200]])  # one layer: tiles brought by the copy engine, and their tails
    dy, x, starts = torch.randn(340, 24), torch.randn(340, 40), counts.cumsum(1) - counts
    dy[337:], x[337:] = torch.nan, torch.nan  # room behind the rows
    totals = [torch.ones(5, 24, 40) for _ in range(2)]
    add_weight_gradients(totals[0], [dy], [x], counts, starts, "torch")
    wgrad_triton.add_weight_gradients(totals[1], [dy], [x], counts, starts, wgrad_triton.TENSOR_COPIES)
    torch.testing.assert_close(*totals)
    print("gradients")
    results = []
    for impl, merged in (("torch", 1), ("triton", 1), ("triton", 3)):
        slab = make(((4, 6), (0, 2)), merged=merged)
        torch.manual_seed(0)
        x = torch.randn(12, slab.hidden).requires_grad_()
        other = ExpertSlab(slab.weight, slab.grad, slab.hidden, slab.width, ((0, 6),), slab.sums)
        y = expert_mlp(x, torch.tensor([5, 0, 4, 3]), slab, backend="torch", impl=impl)
        y = expert_mlp(y, torch.tensor([2, 2, 0, 7, 1, 0]), other, backend="torch", impl=impl)
        y.square().sum().backward()
        slab.sums.flush()
        results.append((y.detach(), x.grad, slab.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert swiglu_forward(torch.empty(0, 8), "triton").shape == (0, 4)
    print("experts")


if __name__ == "__main__":
    interpret()
    print("done")
