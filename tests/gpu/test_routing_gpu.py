"""The router's products and choice on a CUDA device against float64; and the host never waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moue_dist.config import MoEConfig
from moue_dist.kernels.backend import has_triton
from moue_dist.kernels.routing.choice import Auxiliary, Choice, Rule
from moue_dist.kernels.routing.choose import choose, route
from moue_dist.kernels.routing.products import router_logits
from moue_dist.model.router import Router, SharedRouter
from tests.routing import RULES, cancelling, case, check, check_products, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
]


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and torch.isfinite(got).all()
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def poison() -> None:
    """Leave NaN in memory that the allocator hands out next: who reads what it did not write is seen."""
    for n in (1 << 10, 1 << 16, 1 << 22):
        torch.full((n,), torch.nan, device="cuda")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, bias):
    for loss in (True, False):
        of = case(RULES[name], 37, 48, bias=bias, loss=loss, device="cuda")
        logits = of.logits_tw.clone().requires_grad_()
        poison()
        found = choose(logits, of.choice, "triton")
        found.weights_tk.backward(of.dweights_tk)
        check(found, logits.grad, of, exact(of.logits_tw, of.choice, of.dweights_tk))
        worst = (-of.logits_tw).topk(2).indices
        given = of.choice._replace(chosen_tk=of.choice.window_w[worst])
        logits.grad = None
        found = choose(logits, given, "triton")
        found.weights_tk.backward(of.dweights_tk)
        check(found, logits.grad, of._replace(choice=given), exact(of.logits_tw, given, of.dweights_tk, worst))


# 16 all of the window; 96 and 1000 no powers of two; 1024 a tile of one row; 1500 of several warps; more programs' rows
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "norm"])
@pytest.mark.parametrize(
    ("tokens", "w", "k"),
    [
        (37, 16, 16),
        (1, 5, 1),
        (333, 96, 8),
        (4099, 256, 8),
        (40000, 64, 6),
        (333, 1000, 8),
        (5000, 1024, 16),
        (9, 1500, 2),
    ],
)
def test_every_size(tokens, w, k, kind):
    of = case(Rule(kind, k), tokens, w, device="cuda")
    logits = of.logits_tw.clone().requires_grad_()
    poison()
    found = choose(logits, of.choice, "triton")
    found.weights_tk.backward(of.dweights_tk)
    check(found, logits.grad, of, exact(of.logits_tw, of.choice, of.dweights_tk))
    again = choose(of.logits_tw, of.choice, "triton")
    assert found.tally is not None and again.tally is not None
    assert all(torch.equal(a, b) for a, b in zip(found.tally, again.tally, strict=True)), "sums in one order"


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "norm"])
@pytest.mark.parametrize(
    ("tokens", "d", "w", "k"),
    [(4096, 2048, 256, 8), (8192, 1024, 64, 8), (2048, 512, 1024, 8), (77, 96, 37, 3)],
)
def test_a_whole_router_in_bf16(tokens, d, w, k, kind, record_property):
    of = case(Rule(kind, k), tokens, w, device="cuda")
    g = torch.Generator("cuda").manual_seed(w)
    x = torch.randn(tokens, d, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(w, d, generator=g, device="cuda") / d**0.5).bfloat16().requires_grad_()
    poison()
    found = route(x, weight, of.choice)
    found.weights_tk.backward(of.dweights_tk)
    logits = x.detach().double() @ weight.detach().double().T
    columns = torch.searchsorted(of.choice.window_w, found.ids_tk)
    want = exact(logits, of.choice, of.dweights_tk, columns)
    # where another expert was chosen than in float64, the two are a tie within the rounding of fp32 sums
    best = logits.topk(k).values
    torch.testing.assert_close(logits.gather(1, columns), best, rtol=0, atol=3e-5)
    single = (x.detach().float() @ weight.detach().float().T).topk(k).indices
    differ = (columns.sort().values != single.sort().values).any(1)
    record_property("tokens with another choice than fp32's", int(differ.sum()))
    assert differ.float().mean() < 1e-2
    assert relative(found.weights_tk.detach(), want.weights_tk) < 1e-5
    assert found.tally is not None and relative(found.tally.score_w, want.score_w) < 1e-5
    assert torch.equal(found.tally.count_w, want.count_w) and relative(found.tally.z, want.z) < 1e-5
    # bf16 rounds by 1.7e-3 (rms); what comes before it is checked by the products' test
    assert relative(x.grad, want.dlogits_tw @ weight.detach().double()) < 3e-3
    assert relative(weight.grad, want.dlogits_tw.T @ x.detach().double()) < 3e-3


@pytest.mark.parametrize(("tokens", "d", "w"), [(4096, 2048, 256), (333, 96, 37), (1000, 512, 32)])
def test_products_on_tensor_cores(tokens, d, w):
    x, weight, dl = cancelling(tokens, w, d, "cuda")
    logits = router_logits(x.requires_grad_(), weight.requires_grad_())
    assert logits.dtype == torch.float32
    assert relative(logits.detach(), x.detach().double() @ weight.detach().double().T) < 1e-6
    logits.backward(dl)
    check_products(x.detach(), weight.detach(), dl, x.grad, weight.grad)


def test_fp32_keeps_the_products_of_fp32():
    of = case(Rule("softmax", 8), 500, 96, device="cuda")
    x, weight = torch.randn(500, 128, device="cuda"), torch.randn(96, 128, device="cuda")
    assert torch.equal(router_logits(x, weight), torch.nn.functional.linear(x, weight))
    single = x.clone().requires_grad_()
    route(single, weight, of.choice).weights_tk.backward(of.dweights_tk)
    want = exact(x.double() @ weight.double().T, of.choice, of.dweights_tk)
    assert relative(single.grad, want.dlogits_tw @ weight.double()) < 1e-5


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "norm", "universal", "recurrent"])
def test_routers_do_not_wait_for_the_device(router, random):
    moe = MoEConfig(pool=128, top_k=4, topology="rotational", window=64, stride=32, router=router, force_balance=random)
    window, device = tuple(range(20, 84)), torch.device("cuda")
    layer, shared = Router(moe, 256, window, torch.bfloat16, device), SharedRouter(moe, device)
    torch.manual_seed(0)
    for p in (*layer.parameters(), *shared.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(512, 256, device=device).bfloat16().requires_grad_()
    state = torch.randn(512, moe.state_width, device=device).requires_grad_()
    auxiliary = Auxiliary(torch.rand(128, device=device), 0.01, 0.5, 512)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        routing = layer(x, state, shared, None, None, auxiliary)
        assert routing.tally is not None
        out = [routing.weights_tk] + ([routing.state_tr] if routing.state_tr is not None else [])
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        return routing.ids_tk, routing.weights_tk, routing.tally.count_w

    first = run()
    with no_waiting():
        second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[0].sort().values.diff() > 0).all() and first[0].min() >= 20 and first[0].max() < 84
    assert first[2].sum() == 512 * 4
    with torch.no_grad():
        assert layer(x, state, shared, None).tally is None
    again = layer(x, state, shared, None, first[0])
    assert torch.equal(again.ids_tk, first[0])
    torch.testing.assert_close(again.weights_tk, first[1])


def test_random_choices_are_even():
    choice = Choice(Rule("softmax", 8, random=True), torch.arange(256, device="cuda"), auxiliary=Auxiliary(
        torch.zeros(256, device="cuda"), 0.0, 1.0, 16384))  # fmt: skip
    torch.manual_seed(0)
    found = choose(torch.randn(16384, 256, device="cuda"), choice, "triton")
    assert found.tally is not None
    # 512 each; chi-square of 255 degrees of freedom stays below 360 (1 in 100,000)
    assert ((found.tally.count_w - 512).square() / 512).sum() < 360
