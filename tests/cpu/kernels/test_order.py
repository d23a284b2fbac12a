"""The order of gathered rows, and experts over buffers with spare room: references, and kernels in the interpreter.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moue_dist.kernels.backend import ExpertBackend, has_triton
from moue_dist.kernels.experts import weighted
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_mlp
from moue_dist.kernels.experts.swiglu import swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.kernels.rows.order import LocalOrder, order_local
from moue_dist.kernels.rows.permute import gather_rows, gather_sum
from tests.cpu.kernels.test_fp8 import Held

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())


def choices(tokens: int, k: int, pool: int, mine: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, local table) of a random choice of k different experts."""
    ids_tk = torch.rand(tokens, pool).argsort(1)[:, :k].int()
    local_p = torch.full((pool,), len(mine), dtype=torch.int16)
    local_p[mine] = torch.arange(len(mine), dtype=torch.int16)
    return ids_tk, torch.rand(tokens, k), local_p


def test_docstring_example() -> None:
    ids, weight = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    order = order_local(ids, weight, torch.tensor([2, 0, 1], dtype=torch.int16), 2, 4)
    assert order.source_c.tolist() == [0, 1, 1, -1]
    assert order.weight_c.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.0])
    assert order.position_tk.tolist() == [[-1, 0], [1, 2]]
    assert order.counts_n.tolist() == [2, 1] and int(order.live) == int(order.wanted) == 3


@pytest.mark.parametrize("capacity", [0, 5, 30, 200])
def test_every_row_of_mine_has_a_place_as_far_as_there_is_room(capacity: int) -> None:
    torch.manual_seed(0)
    ids, weight, local = choices(37, 3, 8, [1, 4, 6])
    order = order_local(ids, weight, local, 3, capacity)
    wanted = [(int(local[e]), t, j) for t, row in enumerate(ids.tolist()) for j, e in enumerate(row) if e in (1, 4, 6)]
    assert int(order.wanted) == len(wanted) and int(order.live) == min(len(wanted), capacity)
    for row, (_, t, j) in enumerate(sorted(wanted)[:capacity]):
        assert order.source_c[row] == t and order.weight_c[row] == weight[t, j] and order.position_tk[t, j] == row
    assert int((order.position_tk >= 0).sum()) == int(order.live) == int(order.counts_n.sum())
    assert (order.source_c[int(order.live) :] == -1).all() and not order.weight_c[int(order.live) :].any()


def test_nobody_of_mine_is_asked() -> None:
    ids, weight, local = choices(6, 2, 5, [0, 1])
    order = order_local(ids.clamp(min=2), weight, local, 2, 12)
    assert int(order.live) == 0 and (order.position_tk == -1).all() and order.counts_n.tolist() == [0, 0]


def slab_of(experts: int, d: int, f: int, spans: tuple[tuple[int, int], ...]) -> ExpertSlab:
    weight = torch.randn(experts, 3 * f * d, dtype=torch.float64) / d**0.5
    return ExpertSlab(weight, torch.zeros_like(weight), d, f, spans)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("spans", [((0, 3),), ((0, 1), (3, 5))])
def test_weighted_rows_with_room_have_the_gradients_of_autograd(keep: bool, spans: tuple[tuple[int, int], ...]) -> None:
    """float64, against the graph of `expert_mlp`; what stands behind the live rows is poison."""
    torch.manual_seed(1)
    d, f, capacity = 6, 4, 20
    slab = slab_of(5, d, f, spans)
    mine = list(range(slab.count))
    ids, weight, local = choices(11, 2, 6, mine)
    weight = weight.double().requires_grad_()
    x = torch.randn(11, d, dtype=torch.float64, requires_grad=True)
    order = order_local(ids, weight.detach(), local, len(mine), capacity)
    live = int(order.live)
    assert 0 < live < capacity

    rows = expert_mlp(x[order.source_c[:live].long()], order.counts_n, slab, backend="loop")
    position = order.position_tk
    parts = [rows[position[:, j].clamp(min=0).long()] * (weight[:, j] * (position[:, j] >= 0))[:, None] for j in (0, 1)]
    y = parts[0] + parts[1]
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = slab.grad.clone()
    slab.grad.zero_()

    described = weighted.rows_of(slab, order.counts_n, capacity, backend="loop", live=order.live)
    out, z = weighted.forward(described, x.detach(), order.source_c)
    w_c = torch.zeros(capacity, dtype=torch.float64)
    w_c[:live] = weight.detach().reshape(-1)[(position.reshape(-1) >= 0).nonzero()[:, 0]][
        position.reshape(-1)[position.reshape(-1) >= 0].argsort()
    ]
    torch.testing.assert_close(gather_sum(poisoned(out, live), position, weight.detach()), y.detach())
    x_c = poisoned(described.fetch(x.detach(), order.source_c), live)
    z = poisoned(z, live) if keep else None
    dx_c, dw_c, add = weighted.backward(described, x_c, z, dy, order.source_c, w_c)
    add()
    torch.testing.assert_close(gather_sum(poisoned(dx_c, live), position), x.grad)
    torch.testing.assert_close(gather_rows(dw_c[:, None], position.reshape(-1)).view(11, 2), weight.grad)
    torch.testing.assert_close(slab.grad, expected)


@pytest.mark.parametrize("backend", ["loop", "fp8"])
def test_a_layer_without_experts_here_gives_nothing(backend: ExpertBackend) -> None:
    slab = slab_of(5, 16, 16, ())
    slab = dataclasses.replace(slab, fp8=QuantisedPool(Held(slab.weight), 16, 16))
    ids, weight, local = choices(11, 2, 6, [])
    order = order_local(ids, weight, local, 0, 8)
    rows = weighted.rows_of(slab, order.counts_n, 8, backend=backend, live=order.live)
    x = torch.randn(11, 16, dtype=torch.float64)
    out, z = weighted.forward(rows, x, order.source_c)
    assert not gather_sum(out, order.position_tk, weight.double()).any()
    dx, dweight, add = weighted.backward(rows, x[:8], z, x, order.source_c, order.weight_c.double())
    add()
    assert not gather_sum(dx, order.position_tk).any() and not slab.grad.any()
    assert not gather_rows(dweight[:, None], order.position_tk.reshape(-1)).any()


def poisoned(rows: Tensor, live: int) -> Tensor:
    rows = rows.clone()
    rows[live:] = float("nan")
    return rows


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_triton_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    torch.manual_seed(2)
    for tokens, k, pool, mine, capacity in [
        (37, 3, 8, [1, 4, 6], 200),
        (37, 3, 8, [1, 4, 6], 20),  # too little room
        (700, 2, 5, [0, 1, 2, 3, 4], 1400),  # more rows than a block; all of them mine
        (3, 1, 4, [2], 128),
    ]:
        ids, weight, local = choices(tokens, k, pool, mine)
        found = order_local(ids, weight, local, len(mine), capacity, "triton")
        for name, a, b in zip(
            LocalOrder._fields, found, order_local(ids, weight, local, len(mine), capacity, "torch"), strict=True
        ):
            assert torch.equal(a, b), f"{name} of {tokens}, {k}, {pool}, {capacity}"
    for live in (0, 1, 23, 64):
        count, rows, f, d = torch.tensor([live], dtype=torch.int32), 64, 24, 40
        x, index = torch.randn(9, d), torch.randint(9, (rows,))
        torch.testing.assert_close(
            gather_rows(x, index, impl="triton", live=count)[:live], gather_rows(x, index, impl="torch")[:live]
        )
        z, dh, w = torch.randn(rows, 2 * f), torch.randn(rows, f), torch.rand(rows)
        torch.testing.assert_close(swiglu_forward(z, "triton", count)[:live], swiglu_forward(z, "torch")[:live])
        for a, b in zip(
            swiglu_weighted_backward(z, dh, w, "triton", count),
            swiglu_weighted_backward(z, dh, w, "torch"),
            strict=True,
        ):
            torch.testing.assert_close(a[:live], b[:live])


if __name__ == "__main__":
    main()
