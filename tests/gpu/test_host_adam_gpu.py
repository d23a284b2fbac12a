"""The optimizer in host memory on a GPU's host, with DeepSpeed's operator as built there: right, and how fast.

Timings are printed: `pytest -s tests/gpu/test_host_adam_gpu.py`.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from moue_dist.parallel.groups import ReplicaGroup
from moue_dist.parallel.pool.synced import SharedOptimizer, SyncedBuffer
from tests.host_adam import needs_operator

pytestmark = [pytest.mark.timeout(900), needs_operator]  # the operator's first build takes a minute or two

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
ROW = 3 * 1024 * 2048  # an expert of 6.3 million numbers
GIB = 2**30


def optimizer(rows: int, dtype: torch.dtype, on_host: torch.dtype | None) -> SharedOptimizer:
    buffer = SyncedBuffer(
        "pool",
        range(rows),
        rows,
        ROW,
        [(0, rows, ReplicaGroup(None, 1, 0))],
        pieces=1,
        dtype=dtype,
        device=torch.device("cuda", torch.cuda.current_device()),
        grad_scale=1.0,
    )
    g = torch.Generator("cuda").manual_seed(1)
    for row in buffer.weight:
        row.copy_(torch.randn(ROW, generator=g, device="cuda") * 0.02)
    where = {} if on_host is None else {"pool": on_host}
    return SharedOptimizer([buffer], betas=BETAS, eps=EPS, weight_decay=DECAY, on_host=where)


def one_step(shared: SharedOptimizer, step: int) -> None:
    """Gradients are drawn on the current stream right before the step: a copy that came too early would miss them."""
    shared.zero_grad()
    g = torch.Generator("cuda").manual_seed(100 + step)
    for row in shared.buffers[0].grad:
        row.add_(torch.randn(ROW, generator=g, device="cuda"))
    shared.reduce()
    shared.step(1e-3 * (1 + step % 3), clip=0.3)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.float().cpu() - other.float().cpu()).norm() / other.float().norm().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_steps_are_those_of_the_device(dtype: torch.dtype) -> None:
    """14 rows make 11 chunks, the last one ragged; 0.3 GiB of masters."""
    here, there = optimizer(14, dtype, None), optimizer(14, dtype, torch.float32)
    for step in range(10):
        one_step(here, step)
        one_step(there, step)
    a, b = here.states(0), there.states(0)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert b[name][0].device.type == "cpu"
        assert apart(b[name][0], a[name][0]) < 2e-6, name
    weight, master = there.buffers[0].weight, b["weight"][0]
    assert torch.equal(weight.view(-1).cpu(), master.to(dtype))
    assert apart(weight, here.buffers[0].weight) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_bf16_moments_follow_fp32_ones() -> None:
    """The moments' rounding is 1/512 at most, so an update is off by as much, on the average much less."""
    start = optimizer(4, torch.bfloat16, torch.float32)
    before = start.states(0)["weight"][0].clone()
    short = optimizer(4, torch.bfloat16, torch.bfloat16)
    for step in range(10):
        one_step(start, step)
        one_step(short, step)
    moved = start.states(0)["weight"][0] - before
    assert apart(short.states(0)["weight"][0] - before, moved) < 5e-3


def test_the_device_keeps_no_state() -> None:
    """Beside weights (2 bytes a number) and gradients (4) the step takes no memory that grows with the pool."""
    rows = 48
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shared = optimizer(rows, torch.bfloat16, torch.float32)
    one_step(shared, 0)
    shared.finish()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < rows * ROW * 6 + 16 * ROW  # two fp32 rows while a gradient is drawn, with room


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_time_of_a_step(moments: torch.dtype) -> None:
    """96 rows: 0.6 billion numbers, 6.8 GiB of state in fp32. The step must hand back at once and cost what it says."""
    rows, steps = 96, 4
    shared = optimizer(rows, torch.bfloat16, moments)
    state = rows * ROW * (4 + 2 * moments.itemsize) / GIB
    handed_back, whole = [], []
    for _ in range(steps + 2):
        shared.zero_grad()
        shared.buffers[0].grad.normal_()
        torch.cuda.synchronize()
        began = time.perf_counter()
        shared.step(1e-3, clip=0.5)
        handed_back.append(time.perf_counter() - began)
        shared.finish()
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - began)
    seconds = sorted(whole[2:])[steps // 2]  # the first step touches the moments' pages for the first time
    threads = shared.adams[0].threads  # type: ignore[attr-defined]
    print(
        f"\nhost Adam, {moments}: {state:.2f} GiB of state, {threads} threads: {seconds:.3f} s a step, "
        f"{seconds / state:.4f} s per GiB of state, {rows * ROW / seconds / 1e9:.2f} billion numbers a second; "
        f"first step {whole[0]:.3f} s; handed back after {max(handed_back[2:]) * 1e3:.1f} ms"
    )
    assert max(handed_back[2:]) < seconds / 2
