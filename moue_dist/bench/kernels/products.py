"""The experts' matrix products: ours beside a loop of matmuls, Transformer Engine, a grouped product with addition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moue_dist.bench.kernels.inputs import Bench
from moue_dist.bench.timing.contest import Contest, Way
from moue_dist.kernels.backend import has_transformer_engine
from moue_dist.kernels.experts.grouped_gemm import Gemm, LoopGemm, TorchGemm
from moue_dist.kernels.experts.wgrad import add_weight_gradients

Maker = Callable[[], Contest]  # allocates what it needs, which is free again before the next is made
TE = "Transformer Engine"


def products(bench: Bench) -> Iterator[tuple[str, Maker]]:
    for matrix in ("w_in", "w_out"):
        yield f"{matrix} forward", lambda m=matrix: _forward(bench, m)  # type: ignore[misc]
        yield f"{matrix} dgrad", lambda m=matrix: _dgrad(bench, m)  # type: ignore[misc]
        if bench.device.type == "cuda" and has_transformer_engine():
            yield f"{matrix} forward + dgrad", lambda m=matrix: _both(bench, m)  # type: ignore[misc]
    for matrix in ("w_in", "w_out"):
        layers = len(bench.sizes.layers)
        name = f"{matrix} wgrad" + (f", {layers} layers" if layers > 1 else "")
        yield name, lambda m=matrix: _weight_gradients(bench, m)  # type: ignore[misc]


def _shape(bench: Bench, matrix: str) -> tuple[int, int]:
    """(out, in) of one of an expert's two matrices."""
    d, f = bench.sizes.hidden, bench.sizes.width
    return (2 * f, d) if matrix == "w_in" else (d, f)


def _view(pool: Tensor, bench: Bench, matrix: str) -> Tensor:
    """[n, out, in] of rows that hold w_in, then w_out, as training has them."""
    o, i = _shape(bench, matrix)
    split = 2 * bench.sizes.width * bench.sizes.hidden
    return (pool[:, :split] if matrix == "w_in" else pool[:, split:]).view(-1, o, i)


def _weights(bench: Bench, matrix: str) -> Tensor:
    numbers = 3 * bench.sizes.width * bench.sizes.hidden
    return _view(bench.normal(bench.sizes.visible, numbers, scale=0.02), bench, matrix)


def _gemms(bench: Bench) -> tuple[Gemm, Gemm, list[int]]:
    """Ours and the loop over the same rows, and their counts."""
    n, rows = bench.sizes.visible, bench.sizes.rows
    counts_n = bench.counts(n)
    counts = counts_n.tolist()
    ours = TorchGemm.of(((0, n),), counts_n, rows, counts, bench.impl)
    return ours, LoopGemm.of(((0, n),), counts), counts


def _forward(bench: Bench, matrix: str) -> Contest:
    w_noi = _weights(bench, matrix)
    ours, loop, counts = _gemms(bench)
    x_ri = bench.normal(bench.sizes.rows, w_noi.shape[2])
    ways: dict[str, Way] = {
        "ours": lambda: [ours.forward(x_ri, w_noi)],
        "loop of matmul": lambda: [loop.forward(x_ri, w_noi)],
    }
    if bench.device.type == "cuda" and has_transformer_engine():
        linear = _te_linear(w_noi)

        @torch.no_grad()
        def te() -> Sequence[Tensor]:
            return [linear(x_ri, counts)]

        ways[TE] = te
    return Contest(ways, bench.tolerance, facts=_facts(bench, w_noi, 1))


def _dgrad(bench: Bench, matrix: str) -> Contest:
    w_noi = _weights(bench, matrix)
    ours, loop, _ = _gemms(bench)
    dy_ro = bench.normal(bench.sizes.rows, w_noi.shape[1])
    ways: dict[str, Way] = {
        "ours": lambda: [ours.dgrad(dy_ro, w_noi)],
        "loop of matmul": lambda: [loop.dgrad(dy_ro, w_noi)],
    }
    return Contest(ways, bench.tolerance, facts=_facts(bench, w_noi, 1))


def _both(bench: Bench, matrix: str) -> Contest:
    """Transformer Engine has no backward without a graph, so its dgrad is timed with its forward."""
    w_noi = _weights(bench, matrix)
    ours, _, counts = _gemms(bench)
    x_ri, dy_ro = (bench.normal(bench.sizes.rows, n) for n in reversed(w_noi.shape[1:]))
    linear = _te_linear(w_noi)

    def te() -> Sequence[Tensor]:
        leaf_ri = x_ri.detach().requires_grad_()
        y_ro = linear(leaf_ri, counts)
        return [y_ro.detach(), *torch.autograd.grad(y_ro, leaf_ri, dy_ro)]

    ways: dict[str, Way] = {"ours": lambda: [ours.forward(x_ri, w_noi), ours.dgrad(dy_ro, w_noi)], TE: te}
    return Contest(ways, bench.tolerance, facts=_facts(bench, w_noi, 2))


def _te_linear(w_noi: Tensor) -> Callable[..., Tensor]:
    """Its grouped linear over these weights (not copied), which want no gradient."""
    import transformer_engine.pytorch as te

    n, o, i = w_noi.shape
    linear = te.GroupedLinear(n, i, o, bias=False, params_dtype=w_noi.dtype, device="meta")
    for e in range(n):
        setattr(linear, f"weight{e}", torch.nn.Parameter(w_noi[e], requires_grad=False))
        setattr(linear, f"bias{e}", w_noi.new_empty(0))  # what it hands on in place of a bias
    made: Callable[..., Tensor] = linear
    return made


def _weight_gradients(bench: Bench, matrix: str) -> Contest:
    """Of the layers that training adds in one pass, into buffers of all experts that they see here."""
    s, (o, i) = bench.sizes, _shape(bench, matrix)
    room = s.held, 3 * s.width * s.hidden
    mine, other = (_view(torch.zeros(room, device=bench.device), bench, matrix) for _ in range(2))
    dys, xs, gemms, counts_gn = [], [], [], torch.zeros(len(s.layers), s.held, dtype=torch.int64, device=bench.device)
    for g, spans in enumerate(s.layers):
        rows = [row for first, end in spans for row in range(first, end)]
        counts_n = bench.counts(len(rows))
        counts_gn[g, rows] = counts_n
        dys.append(bench.normal(s.rows, o))
        xs.append(bench.normal(s.rows, i))
        gemms.append(TorchGemm.of(spans, counts_n, s.rows, counts_n.tolist(), "torch"))
    starts_gn = counts_gn.cumsum(1) - counts_gn

    def ours() -> Sequence[Tensor]:
        add_weight_gradients(mine, dys, xs, counts_gn, starts_gn, bench.impl)
        return [mine]

    def grouped() -> Sequence[Tensor]:
        for gemm, dy_ro, x_ri in zip(gemms, dys, xs, strict=True):
            gemm.wgrad(dy_ro, x_ri, other)
        return [other]

    facts = _facts(bench, mine, len(s.layers))
    return Contest({"ours": ours, "grouped_mm and add": grouped}, bench.rounded_on_the_way, facts=facts)


def _facts(bench: Bench, w_noi: Tensor, products: int) -> dict[str, int]:
    n, o, i = w_noi.shape
    return {"rows": bench.sizes.rows, "experts": n, "flop": 2 * bench.sizes.rows * o * i * products}
