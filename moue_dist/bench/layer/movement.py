"""A layer's data movement, forward and backward, without expert products: rows one by one, and tokens once a rank.

Experts hand back what they get, so y[t] = x[t] * sum of its weights. Where training weights a row inside SwiGLU's
backward, the gathered way does it here in two passes of its own.

Legend: T tokens of this rank, k choices, E ranks, C rows with room, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.bench.timing.contest import Contest
from moue_dist.kernels.backend import ExpertBackend, default_impl
from moue_dist.kernels.experts.mlp import ExpertSlab
from moue_dist.kernels.experts.weighted import Rows
from moue_dist.kernels.rows.permute import gather_dot, gather_rows
from moue_dist.parallel.dispatch.all_to_all import AllToAllDispatcher
from moue_dist.parallel.dispatch.gathered import GatheredExchange, GatheredExperts
from moue_dist.parallel.dispatch.routes import RouteTable
from moue_dist.parallel.pool.pool import ExpertPool

CALLS = 4  # in a sample


class Untouched:
    """`gathered.Products` that multiply nothing: a row's output is the row."""

    def rows_of(
        self, slab: ExpertSlab, counts_n: Tensor, rows: int, *, backend: ExpertBackend, live: Tensor | None
    ) -> Rows:
        gemm: Any = None
        return Rows(slab, counts_n, gemm, default_impl(counts_n.device), live, None)

    def forward(self, rows: Rows, x_nd: Tensor, source_c: Tensor) -> tuple[Tensor, None]:
        return rows.fetch(x_nd, source_c), None

    def backward(
        self, rows: Rows, x_cd: Tensor, z_c2f: Tensor | None, dy_nd: Tensor, source_c: Tensor, weight_c: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[], None]]:
        dy_cd = rows.fetch(dy_nd, source_c)
        each_c = torch.arange(x_cd.shape[0], dtype=torch.int32, device=x_cd.device)
        dx_cd = gather_rows(dy_cd, each_c, weight_c, live=rows.live)
        return dx_cd, gather_dot(x_cd, each_c[:, None], dy_cd).squeeze(1), lambda: None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What arrives at the layer on this rank, and the gradient of what leaves it."""

    x_td: Tensor
    ids_tk: Tensor
    weight_tk: Tensor  # fp32
    dy_td: Tensor

    @classmethod
    def draw(cls, tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, seed: int) -> Inputs:
        """Random tokens, choices without repetition, weights that sum to 1; on the current device."""
        from moue_dist.parallel.device import this_device

        device = this_device()
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        return cls(
            normal(tokens, hidden).to(dtype).requires_grad_(),
            normal(tokens, experts).topk(top_k, -1).indices,
            normal(tokens, top_k).softmax(-1).requires_grad_(),
            normal(tokens, hidden).to(dtype),
        )

    def with_gradients(self, y_td: Tensor) -> Sequence[Tensor]:
        """(y, dx, dweight)."""
        dx_td, dweight_tk = torch.autograd.grad(y_td, (self.x_td, self.weight_tk), self.dy_td)
        return y_td.detach(), dx_td, dweight_tk


def movement(pool: ExpertPool, inputs: Inputs, group: Any, world: Any, headroom: float) -> Contest:
    """Both ways over `group`, the expert-parallel ranks (None: one). `pool` has as many experts as the layer sees.

    Collective over `world`: it makes sure that the gathered way has room for all rows.
    """
    placement, device = pool.placement, inputs.x_td.device
    visible = range(placement.pool)
    table = RouteTable.build(placement.columns, visible, placement.expert_parallel, pool.ep_rank, device)
    dispatcher = AllToAllDispatcher(group)
    exchange = GatheredExchange(pool, group, backend="loop", recompute=False, headroom=headroom, products=Untouched())
    experts: GatheredExperts = exchange.layer(visible, 0)

    def gathered() -> Sequence[Tensor]:
        begun = experts.begin(inputs.x_td)
        return inputs.with_gradients(experts(inputs.x_td, inputs.ids_tk, inputs.weight_tk, begun))

    def all_to_all() -> Sequence[Tensor]:
        rows_rd, _, _, handle = dispatcher.dispatch(inputs.x_td, inputs.ids_tk, table)
        return inputs.with_gradients(dispatcher.combine(rows_rd, inputs.weight_tk, handle))

    gathered()
    while exchange.make_room(world):
        gathered()
    _, _, _, handle = dispatcher.dispatch(inputs.x_td, inputs.ids_tk, table)
    facts = {
        "tokens": inputs.x_td.shape[0],
        "headroom": exchange.headroom,
        "gb_out_of_a_gpu": {
            "gathered": _mean(_gathered_bytes(inputs, exchange.ranks), device, world) / 1e9,
            "all_to_all": _mean(_row_bytes(inputs, handle.send, handle.receive, pool.ep_rank), device, world) / 1e9,
        },
    }
    # both add in fp32 and round once more for each rank that tokens or sums pass
    tolerance = 1e-5 if inputs.x_td.dtype == torch.float32 else 1e-2
    return Contest({"gathered": gathered, "all_to_all": all_to_all}, tolerance, CALLS, facts)


def _gathered_bytes(inputs: Inputs, ranks: int) -> float:
    """Forward and backward: tokens or gradients gathered and sums scattered, choices gathered, weights' scattered."""
    each = 4 * inputs.x_td.nbytes + 3 * inputs.weight_tk.nbytes
    return each * (ranks - 1)


def _row_bytes(inputs: Inputs, send: list[int] | None, receive: list[int] | None, me: int) -> float:
    """Forward and backward: rows for others leave twice, rows from others return twice. Counts are left out."""
    if send is None or receive is None:
        return 0.0
    others = sum(send) - send[me] + sum(receive) - receive[me]
    return 2.0 * others * inputs.x_td.shape[1] * inputs.x_td.element_size()


def _mean(mine: float, device: torch.device, world: Any) -> float:
    total = torch.tensor([mine], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=world)
    return float(total) / dist.get_world_size(world)
