"""The kernels on a CUDA device against float64: forward, backward, every backend, no hidden waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from moue_dist.kernels.backend import has_transformer_engine, has_triton
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_mlp
from moue_dist.kernels.experts.swiglu import swiglu_backward, swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.experts.wgrad import WeightGradients, add_weight_gradients
from moue_dist.kernels.rows.permute import combine, gather_dot, gather_rows, gather_sum, permute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_te = pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of ||got - exact|| / ||exact||
FP8_LIMIT = 0.2  # E4M3 rounds by 3%, E5M2 by 6% (rms), a few times in a row; a wrong gradient is off by 1


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert got.shape == exact.shape and torch.isfinite(got).all()
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-12)).item()


def poison(*shape: int) -> None:
    """Leave NaN in memory that the caching allocator hands out next: who reads what it did not write is seen."""
    for dtype in (torch.bfloat16, torch.float32):
        torch.full(shape, torch.nan, dtype=dtype, device="cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def routing(tokens: int, k: int, experts: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(position_tk, source_r, choice_r) of a random choice of k different experts per token, rows sorted by expert."""
    choice_tk = torch.rand(tokens, experts, device="cuda").argsort(1)[:, :k]
    choice_r = choice_tk.reshape(-1).argsort(stable=True)
    position_tk = torch.empty_like(choice_r)
    position_tk[choice_r] = torch.arange(tokens * k, device="cuda")
    return position_tk.reshape(tokens, k), choice_r // k, choice_r


@needs_triton
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# 16 less than a vector per thread; 96 and 1000 no powers of two; 333 unaligned rows; 8192 many tiles; 1 token; top-8
@pytest.mark.parametrize(("d", "tokens", "k"), [(16, 100, 2), (96, 333, 3), (1000, 65, 1), (333, 1, 4), (8192, 70, 8)])
def test_gather_kernels(d, tokens, k, dtype, index):
    torch.manual_seed(d)
    rows, dy = torch.randn(tokens * k, d, device="cuda").to(dtype), torch.randn(tokens, d, device="cuda").to(dtype)
    weight, scale = torch.rand(tokens, k, device="cuda"), torch.rand(tokens * k, device="cuda")
    position, source, slot = routing(tokens, k)
    position[-1, 0] = source[slot == (tokens - 1) * k] = -1  # a dropped choice
    weight[-1, 0] = scale[slot == (tokens - 1) * k] = torch.nan  # whatever stands there must not be read
    position, source = position.to(index), source.to(index)
    poison(tokens * k, d)
    for got, exact in (
        (gather_rows(dy, source, impl="triton"), gather_rows(dy.double(), source, impl="torch")),
        (gather_rows(dy, source, scale, impl="triton"), gather_rows(dy.double(), source, scale, impl="torch")),
        (gather_sum(rows, position, impl="triton"), gather_sum(rows.double(), position, impl="torch")),
        (gather_sum(rows, position, weight, impl="triton"), gather_sum(rows.double(), position, weight, impl="torch")),
    ):
        assert got.dtype == dtype and relative(got, exact) < LIMIT[dtype]
    dots = gather_dot(rows, position, dy, impl="triton")
    assert dots.dtype == torch.float32
    assert relative(dots, gather_dot(rows.double(), position, dy.double(), impl="torch")) < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permute_and_combine_with_gradients(dtype):
    torch.manual_seed(0)
    tokens, k, d = 1000, 4, 512
    position, source, slot = routing(tokens, k)
    x, dy = torch.randn(tokens, d, device="cuda").to(dtype), torch.randn(tokens, d, device="cuda").to(dtype)
    weight = torch.rand(tokens, k, device="cuda")

    def run(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = combine(permute(x, source, position, impl) * 2, weight, position, source, slot, impl)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))

    run(x, weight, dy, "triton")  # compile first: loading a kernel waits for the device
    with no_waiting():
        got = run(x, weight, dy, "triton")
    exact = run(x.double(), weight.double(), dy.double(), "torch")
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32]
    assert all(relative(g, e) < LIMIT[dtype] for g, e in zip(got, exact, strict=True))


@needs_triton
def test_empty_inputs():
    none, no_tokens = torch.empty(0, dtype=torch.int64, device="cuda"), torch.empty(0, 2, dtype=torch.int64).cuda()
    x = torch.empty(0, 64, device="cuda", requires_grad=True)
    y = combine(permute(x, none, no_tokens), torch.empty(0, 2, device="cuda"), no_tokens, none, none)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    nobody = torch.full((3, 2), -1, device="cuda")
    assert gather_sum(torch.empty(0, 64, device="cuda"), nobody).tolist() == [[0] * 64] * 3
    assert swiglu_forward(torch.empty(0, 64, device="cuda")).shape == (0, 32)


@needs_triton
def test_offsets_past_two_billion():
    """2**20 + 8 rows of 2048 numbers: the last rows lie beyond what 32-bit offsets reach."""
    rows, d = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 4 * rows * d * 2:
        pytest.skip("needs 17 GB of free device memory")
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    x[-1], x[0] = 3, 5
    index = torch.arange(rows - 1, -1, -1, device="cuda")
    y = gather_rows(x, index, impl="triton")
    assert (y[0] == 3).all() and (y[-1] == 5).all() and y[1:-1].count_nonzero() == 0
    sums = gather_sum(y, index.view(-1, 1), impl="triton")
    assert (sums[-1] == 3).all() and (sums[0] == 5).all()
    assert gather_dot(y, index.view(-1, 1), x, impl="triton")[[0, -1], 0].tolist() == [25 * d, 9 * d]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "f"), [(1000, 8), (77, 96), (130, 1408), (5, 8192)])  # 1408: no power of two
def test_swiglu(rows, f, dtype):
    torch.manual_seed(f)
    z, dh = (3 * torch.randn(rows, 2 * f, device="cuda")).to(dtype), torch.randn(rows, f, device="cuda").to(dtype)
    poison(rows, 2 * f)
    dz, h = swiglu_backward(z, dh, "triton")
    exact_dz, exact_h = swiglu_backward(z.double(), dh.double(), "torch")
    assert relative(swiglu_forward(z, "triton"), exact_h) < LIMIT[dtype]
    assert relative(dz, exact_dz) < LIMIT[dtype] and relative(h, exact_h) < LIMIT[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# 256 x 128 whole tiles; 200 x 72 parts of tiles; 333 x 96 unaligned
@pytest.mark.parametrize(("o", "i"), [(256, 128), (200, 72), (333, 96)])
def test_weight_gradients_of_several_layers(o, i, dtype):
    counts = torch.tensor([[3, 0, 210, 1, 64], [0, 0, 20, 7, 0], [400, 0, 1, 0, 129]], device="cuda")
    starts, rows = counts.cumsum(1) - counts, counts.sum(1).tolist()
    dys, xs = ([torch.randn(r, width, device="cuda").to(dtype) for r in rows] for width in (o, i))
    pool = torch.randn(5, 3 * o * i, device="cuda")
    total = pool[:, o * i : 2 * o * i].view(5, o, i)  # a part of a row, as w_in and w_out are
    before, exact = pool.clone(), total.double()
    for dy, x, count in zip(dys, xs, counts.tolist(), strict=True):
        for n, (a, b) in enumerate(zip(dy.split(count), x.split(count), strict=True)):
            exact[n] += a.double().T @ b.double()
    poison(1000, o)
    with no_waiting():
        add_weight_gradients(total, dys, xs, counts, starts, "triton")
    assert relative(total, exact) < LIMIT[torch.float32]
    assert torch.equal(pool[1], before[1]) and torch.equal(pool[:, : o * i], before[:, : o * i])


@needs_triton
@pytest.mark.parametrize("many", [True, False])
def test_weight_gradients_of_one_layer_by_either_kernel(many: bool) -> None:
    """Many rows to an expert take the copy engine's kernel; tails, an expert without rows, room behind the last."""
    from moue_dist.kernels.experts import wgrad_triton

    torch.manual_seed(3)
    sizes = [4099, 0, 3000, 2500] if many else [99, 0, 30, 2500]
    o, i, rows = 320, 264, sum(sizes)
    dy, x = (torch.randn(rows + 50, n, device="cuda").bfloat16() for n in (o, i))
    dy[rows:], x[rows:] = torch.nan, torch.nan
    counts = torch.tensor([sizes], device="cuda")
    total = torch.ones(4, o, i, device="cuda")
    if torch.cuda.get_device_capability() >= (9, 0):
        assert wgrad_triton.takes_tensor_copies(total, [dy]) is many
    with no_waiting():
        add_weight_gradients(total, [dy], [x], counts, counts.cumsum(1) - counts, "triton")
    for n, (a, b) in enumerate(zip(dy[:rows].split(sizes), x[:rows].split(sizes), strict=True)):
        exact = a.double().T @ b.double() + 1
        assert relative(total[n], exact) < LIMIT[torch.float32]


@needs_triton
def test_rows_of_one_expert_beyond_32_bits_of_numbers() -> None:
    """1,048,576 rows of width 2048 are 2**31 numbers: the rows behind them count, too."""
    rows = 2**20 + 96
    dy, x = torch.zeros(rows, 2048, device="cuda").bfloat16(), torch.zeros(rows, 16, device="cuda").bfloat16()
    dy[-1], x[-1] = 2.0, 3.0
    both = [torch.zeros(2, 2048, 16, device="cuda") for _ in range(2)]
    for total, layers in zip(both, (1, 2), strict=True):
        counts = torch.tensor([[0, rows]] * layers, device="cuda")
        add_weight_gradients(total, [dy] * layers, [x] * layers, counts, torch.zeros_like(counts), "triton")
        assert (total[1] == 6.0 * layers).all() and not total[0].any()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("f", "rows"), [(8, 300), (96, 13), (1024, 70), (2100, 2)])
def test_weighted_swiglu_backward(f, rows, dtype):
    torch.manual_seed(0)
    z, dh = (3 * torch.randn(rows, 2 * f, device="cuda")).to(dtype), torch.randn(rows, f, device="cuda").to(dtype)
    weight = torch.rand(rows, device="cuda")
    poison(rows, 2 * f)
    got = swiglu_weighted_backward(z, dh, weight, "triton")
    exact = swiglu_weighted_backward(z.double(), dh.double(), weight.double(), "torch")
    assert all(relative(a, b) < LIMIT[dtype] for a, b in zip(got, exact, strict=True))


# (spans of visible experts among 8 held, rows of each): one span; a wrapped window; experts without rows; a span
# without rows; one expert; all rows in one expert; no rows at all
LAYOUTS = [
    (((1, 5),), [130, 57, 1, 300]),
    (((5, 8), (0, 2)), [20, 70, 128, 40, 33]),
    (((0, 8),), [0, 64, 0, 0, 90, 0, 7, 0]),
    (((0, 1), (2, 4), (6, 8)), [40, 0, 0, 96, 31]),
    (((3, 4),), [50]),
    (((2, 6),), [0, 0, 256, 0]),
    (((0, 2), (5, 7)), [0, 0, 0, 0]),
]
D, F = 256, 128  # multiples of 128: legal for every FP8 recipe


def make(spans: tuple[tuple[int, int], ...], merged: int = 1) -> ExpertSlab:
    torch.manual_seed(1)
    weight = (torch.randn(8, 3 * F * D, device="cuda") / D**0.5).bfloat16()
    return ExpertSlab(weight, torch.randn(8, 3 * F * D, device="cuda"), D, F, spans, WeightGradients(merged))


def reference(
    x: torch.Tensor, slab: ExpertSlab, counts: list[int], dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dweight) in float64 by plain autograd, expert by expert."""
    x, pool = x.detach().double().requires_grad_(), slab.weight.double().requires_grad_()
    out = []
    experts = [e for first, end in slab.spans for e in range(first, end)]
    for e, rows in zip(experts, x.split(counts), strict=True):
        gate, up = (rows @ pool[e, : 2 * F * D].view(2 * F, D).T).chunk(2, 1)
        out.append((torch.nn.functional.silu(gate) * up) @ pool[e, 2 * F * D :].view(D, F).T)
    y = torch.cat(out)
    return (y.detach(), *torch.autograd.grad(y, (x, pool), dy.double()))


def check_experts(
    slab: ExpertSlab, counts: list[int], run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], limit: float
) -> None:
    """`run` twice, so that FP8 scales that look back have something to look at; the second time is judged."""
    x = torch.randn(sum(counts), D, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(sum(counts), D, device="cuda").bfloat16()
    y, dx, dweight = reference(x, slab, counts, dy)
    for _ in range(2):
        x.grad = None
        before = slab.grad.clone()
        poison(8, D, 3 * F)
        got = run(x, torch.tensor(counts, device="cuda"))
        got.backward(dy)
    assert got.dtype == x.grad.dtype == torch.bfloat16
    assert relative(got.detach(), y) < limit and relative(x.grad, dx) < limit
    assert relative(slab.grad - before, dweight) < limit
    without_rows = dweight.abs().sum(1) == 0
    assert torch.equal(slab.grad[without_rows], before[without_rows])  # untouched, bit for bit


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["loop", "torch", pytest.param("te", marks=needs_te)])
@pytest.mark.parametrize(("spans", "counts"), LAYOUTS)
def test_experts_in_bf16(spans, counts, backend, recompute, host):
    slab = make(spans)
    check_experts(
        slab,
        counts,
        lambda x, counts_n: expert_mlp(
            x, counts_n, slab, backend=backend, recompute=recompute, counts_host=counts if host else None
        ),
        LIMIT[torch.bfloat16],
    )


def recipe(name: str):
    """Transformer Engine's recipe, or a skip with its own reason why this device has none."""
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    kinds = {
        "delayed": (recipes.DelayedScaling, State.is_fp8_available),
        "tensorwise": (recipes.Float8CurrentScaling, State.is_fp8_available),
        "blockwise": (recipes.Float8BlockScaling, State.is_fp8_block_scaling_available),
        "mxfp8": (recipes.MXFP8BlockScaling, State.is_mxfp8_available),
    }
    kind, available = kinds[name]
    fits, why = available()
    if not fits:
        pytest.skip(why)
    return kind()


@needs_te
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize(("spans", "counts"), LAYOUTS)
def test_experts_in_fp8(spans, counts, name, recompute):
    import transformer_engine.pytorch as te

    slab, fp8 = make(spans), recipe(name)
    autocast = getattr(te, "autocast", None)

    def run(x: torch.Tensor, counts_n: torch.Tensor) -> torch.Tensor:
        with autocast(enabled=True, recipe=fp8) if autocast else te.fp8_autocast(enabled=True, fp8_recipe=fp8):
            return expert_mlp(x, counts_n, slab, backend="te", recompute=recompute, counts_host=counts)

    check_experts(slab, counts, run, FP8_LIMIT)


@pytest.mark.parametrize("recompute", [False, True])
def test_grouped_gemm_over_one_span_does_not_wait_for_the_device(recompute):
    slab = make(((1, 5),))
    x = torch.randn(100, D, device="cuda").bfloat16().requires_grad_()
    counts_n = torch.tensor([10, 0, 50, 40], device="cuda")
    for context in (nullcontext(), no_waiting()):  # compile first: loading a kernel waits for the device
        with context:
            expert_mlp(x, counts_n, slab, backend="torch", recompute=recompute).sum().backward()


@needs_triton
def test_merged_weight_gradients_are_those_of_each_layer_alone():
    layers, sums = [(((1, 5),), [130, 57, 0, 300]), (((5, 8), (0, 2)), [20, 70, 128, 40, 33])], []
    for merged in (1, 2):
        slab = make(((0, 8),), merged)
        for spans, counts in layers:
            torch.manual_seed(sum(counts))
            part = ExpertSlab(slab.weight, slab.grad, D, F, spans, slab.sums)
            x = torch.randn(sum(counts), D, device="cuda").bfloat16().requires_grad_()
            expert_mlp(x, torch.tensor(counts, device="cuda"), part, backend="torch").square().sum().backward()
        sums.append(slab.grad)
    assert relative(sums[1], sums[0]) < LIMIT[torch.float32]


@needs_te
def test_two_layers_that_share_experts_add_up_under_te():
    """The fused accumulation must never overwrite: the second layer's gradient joins the first's."""
    slab = make(((0, 3),))
    other = ExpertSlab(slab.weight, slab.grad, D, F, ((1, 4),))
    counts, grads = [30, 20, 50], []
    x = torch.randn(100, D, device="cuda").bfloat16()
    for backend in ("loop", "te"):
        slab.grad.zero_()
        y = x.clone().requires_grad_()
        for layer in (slab, other):
            y = y + expert_mlp(y, torch.tensor(counts, device="cuda"), layer, backend=backend, counts_host=counts)
        y.float().square().sum().backward()
        grads.append(slab.grad.clone())
    assert relative(grads[1], grads[0]) < 2 * LIMIT[torch.bfloat16]
    assert not any(w.grad is not None for w in slab.te.fc1.parameters())
