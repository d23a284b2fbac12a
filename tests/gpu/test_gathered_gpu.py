"""The order of gathered rows and experts over buffers with spare room, on the device."""

from __future__ import annotations

import pytest
import torch

from moue_dist.config.devices import grouped_fp8
from moue_dist.kernels.backend import ExpertBackend
from moue_dist.kernels.experts import weighted
from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.kernels.rows.order import LocalOrder, order_local
from moue_dist.kernels.rows.permute import gather_rows, gather_sum
from tests.cpu.kernels.test_fp8 import Held
from tests.gpu.test_kernels_gpu import poison

D, F = 256, 128
HOPPER = torch.cuda.is_available() and grouped_fp8(torch.cuda.get_device_capability())
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def choices(tokens: int, k: int, pool: int, mine: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids_tk = torch.rand(tokens, pool, device="cuda").topk(k, dim=1).indices.int()
    local_p = torch.full((pool,), len(mine), dtype=torch.int16)
    local_p[mine] = torch.arange(len(mine), dtype=torch.int16)
    return ids_tk, torch.rand(tokens, k, device="cuda"), local_p.cuda()


@pytest.mark.parametrize(("tokens", "capacity"), [(4099, 40000), (4099, 12000), (1, 8)])
def test_the_order_is_the_references(tokens: int, capacity: int) -> None:
    torch.manual_seed(0)
    ids, weight, local = choices(tokens, 8, 64, list(range(0, 64, 2)))
    found = order_local(ids, weight, local, 32, capacity, "triton")
    for name, a, b in zip(
        LocalOrder._fields, found, order_local(ids, weight, local, 32, capacity, "torch"), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("backend", "limit"), [("torch", 1e-2), pytest.param("fp8", 9e-2, marks=needs_hopper)])
@pytest.mark.parametrize("spans", [((0, 32),), ((0, 20), (30, 42))])
def test_weighted_rows_against_float64(
    spans: tuple[tuple[int, int], ...], backend: ExpertBackend, limit: float, keep: bool
) -> None:
    """Buffers with room, whose rest is poison, against one expert after the other in float64."""
    torch.manual_seed(1)
    tokens, k = 1500, 4
    pool = torch.randn(48, 3 * F * D, device="cuda") / D**0.5
    weights = pool.bfloat16()
    quantised = QuantisedPool(Held(weights), D, F)
    quantised.refresh()
    slab = ExpertSlab(weights, torch.zeros_like(pool), D, F, spans, fp8=quantised)
    ids, weight, local = choices(tokens, k, 64, list(range(slab.count)))
    order = order_local(ids, weight, local, slab.count, 4096)
    rows = weighted.rows_of(slab, order.counts_n, 4096, backend=backend, live=order.live)
    x, dy = (torch.randn(tokens, D, device="cuda").bfloat16() for _ in range(2))
    poison(4096, 2 * F)
    out, z = weighted.forward(rows, x, order.source_c)
    y = gather_sum(out, order.position_tk, weight)
    x_c, live = rows.fetch(x, order.source_c), int(order.live)
    x_c[live:] = z[live:] = float("nan")
    poison(4096, 2 * F)
    dx_c, dw_c, add = weighted.backward(rows, x_c, z if keep else None, dy, order.source_c, order.weight_c)
    add()
    slab.sums.flush()
    dx = gather_sum(dx_c, order.position_tk)
    dw = gather_rows(dw_c[:, None], order.position_tk.reshape(-1)).view(tokens, k)

    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    p64 = slab.weight.double().requires_grad_()
    y64 = torch.zeros_like(x64)
    for i, row in enumerate(e for a, b in spans for e in range(a, b)):
        hit = ids == i
        t = hit.any(1).nonzero()[:, 0]
        w_in, w_out = p64[row, : 2 * F * D].view(2 * F, D), p64[row, 2 * F * D :].view(D, F)
        gate, up = (x64[t] @ w_in.t()).chunk(2, -1)
        y64 = y64.index_add(0, t, (w64 * hit)[t].sum(1)[:, None] * ((torch.nn.functional.silu(gate) * up) @ w_out.t()))
    y64.backward(dy.double())
    for name, a, b in (("y", y, y64), ("dx", dx, x64.grad), ("dw", dw, w64.grad), ("pool", slab.grad, p64.grad)):
        assert float((a.double() - b).norm() / b.norm()) < limit, name
