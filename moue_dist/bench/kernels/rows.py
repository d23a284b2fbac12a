"""Choosing experts, ordering rows and moving them: ours beside plain PyTorch.

Legend: t token, k choice, r row, w column of the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moue_dist.bench.kernels.inputs import Bench
from moue_dist.bench.kernels.products import Maker
from moue_dist.bench.timing.contest import Contest
from moue_dist.kernels.backend import Impl
from moue_dist.kernels.routing.choice import Auxiliary, Choice, Rule
from moue_dist.kernels.routing.choose import choose
from moue_dist.kernels.rows.order import order_local
from moue_dist.kernels.rows.permute import gather_dot, gather_rows, gather_sum
from moue_dist.parallel.dispatch.routes import RouteTable, order_rows


def rows(bench: Bench) -> Iterator[tuple[str, Maker]]:
    yield "choice, forward and backward", lambda: _choice(bench)
    yield "order of rows", lambda: _order(bench)
    yield "gather rows", lambda: _gather(bench)
    yield "gather rows, scaled", lambda: _gather_scaled(bench)
    yield "sum rows by token", lambda: _sum(bench)
    yield "products of rows and tokens", lambda: _dot(bench)


def _choice(bench: Bench) -> Contest:
    """From logits to weights with the losses hung on them, and back to the gradient of the logits."""
    s = bench.sizes
    logits_tw = bench.wide(s.tokens, s.window).requires_grad_()
    dweight_tk = bench.wide(s.tokens, s.top_k)
    auxiliary = Auxiliary(torch.full((s.window,), 0.01, device=bench.device), 0.001, 1.0, s.tokens)
    choice = Choice(Rule("softmax", s.top_k), torch.arange(s.window, device=bench.device), auxiliary=auxiliary)

    def by(impl: Impl) -> Sequence[Tensor]:
        weights_tk = choose(logits_tw, choice, impl).weights_tk
        return [weights_tk.detach(), *torch.autograd.grad(weights_tk, logits_tw, dweight_tk)]

    ways = {"ours": lambda: by(bench.impl), "plain PyTorch": lambda: by("torch")}
    return Contest(ways, 1e-3, facts={"tokens": s.tokens, "window": s.window})


def _order(bench: Bench) -> Contest:
    """What finds this rank's rows among the gathered choices of all."""
    s = bench.sizes
    ids_tk = bench.choices(s.tokens * s.expert_ranks)
    weight_tk = bench.wide(*ids_tk.shape).softmax(-1)
    experts = -(-s.window // s.expert_ranks)
    column_p = torch.arange(s.window, device=bench.device)
    local_p = torch.where(column_p % s.expert_ranks == 0, column_p // s.expert_ranks, experts).to(torch.int16)
    room = s.rows if s.expert_ranks == 1 else math.ceil(s.rows * s.headroom / 16) * 16
    live = int(order_local(ids_tk, weight_tk, local_p, experts, ids_tk.numel(), "torch").live)
    room = max(room, live)

    def ours() -> Sequence[Tensor]:
        found = order_local(ids_tk, weight_tk, local_p, experts, room, bench.impl)
        return [found.source_c[:live], found.weight_c[:live], found.position_tk, found.counts_n]

    def plain() -> Sequence[Tensor]:
        key_r = local_p[ids_tk.flatten()].long()
        here = (key_r < experts).nonzero().squeeze(1)
        choice_r = here[torch.argsort(key_r[here], stable=True)]
        position_r = torch.full_like(key_r, -1)
        position_r[choice_r] = torch.arange(choice_r.numel(), device=choice_r.device)
        counts_n = torch.bincount(key_r[here], minlength=experts)
        return [choice_r // s.top_k, weight_tk.flatten()[choice_r], position_r.view(ids_tk.shape), counts_n]

    return Contest({"ours": ours, "nonzero and argsort": plain}, 0.0, facts={"rows": live, "choices": ids_tk.numel()})


class _Moved:
    """Tokens, their choices and the rows' order, as they leave a rank."""

    def __init__(self, bench: Bench) -> None:
        s = bench.sizes
        columns = [e % s.expert_ranks for e in range(s.window)]
        table = RouteTable.build(columns, range(s.window), s.expert_ranks, 0, bench.device)
        self.order = order_rows(bench.choices(s.tokens), table)
        self.source_r = self.order.source_r.long()
        self.x_td = bench.normal(s.tokens, s.hidden)
        self.weight_tk = bench.wide(s.tokens, s.top_k).softmax(-1)
        self.weight_r = self.weight_tk.flatten()[self.order.choice_r.long()]
        row = self.x_td[:1].nbytes
        self.facts = {"rows": s.rows, "bytes": row * (s.tokens + s.rows)}

    def rows(self, bench: Bench) -> Tensor:
        return bench.normal(bench.sizes.rows, bench.sizes.hidden)


def _gather(bench: Bench) -> Contest:
    m = _Moved(bench)
    ways = {
        "ours": lambda: [gather_rows(m.x_td, m.order.source_r, impl=bench.impl)],
        "index_select": lambda: [m.x_td.index_select(0, m.source_r)],
    }
    return Contest(ways, 0.0, facts=m.facts)


def _gather_scaled(bench: Bench) -> Contest:
    m = _Moved(bench)
    ways = {
        "ours": lambda: [gather_rows(m.x_td, m.order.source_r, m.weight_r, impl=bench.impl)],
        "index_select": lambda: [m.x_td.index_select(0, m.source_r) * m.weight_r[:, None].to(m.x_td.dtype)],
    }
    return Contest(ways, bench.rounded_on_the_way, facts=m.facts)


def _sum(bench: Bench) -> Contest:
    m = _Moved(bench)
    rows_rd = m.rows(bench)

    def index_add() -> Sequence[Tensor]:
        weighted_rd = rows_rd * m.weight_r[:, None].to(rows_rd.dtype)
        return [torch.zeros_like(m.x_td).index_add_(0, m.source_r, weighted_rd)]

    ways = {
        "ours": lambda: [gather_sum(rows_rd, m.order.position_tk, m.weight_tk, impl=bench.impl)],
        "index_add": index_add,
    }
    return Contest(ways, bench.rounded_on_the_way, facts=m.facts)


def _dot(bench: Bench) -> Contest:
    m = _Moved(bench)
    rows_rd, position_r = m.rows(bench), m.order.position_tk.flatten().long()

    def plain() -> Sequence[Tensor]:
        chosen_tkd = rows_rd.index_select(0, position_r).view(*m.weight_tk.shape, -1)
        return [(chosen_tkd.float() * m.x_td[:, None].float()).sum(-1)]

    ways = {
        "ours": lambda: [gather_dot(rows_rd, m.order.position_tk, m.x_td, impl=bench.impl)],
        "index_select": plain,
    }
    return Contest(ways, bench.tolerance, facts=m.facts)
