"""Choosing experts: the reference and the Triton kernels against the formulas in float64, and the router's products.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moue_dist.kernels.routing.choice import Choice, Rule
from moue_dist.kernels.routing.choose import choose, route
from moue_dist.kernels.routing.products import gradients, router_logits, split
from tests.routing import RULES, Case, cancelling, case, check, check_products, exact

ROOT = Path(__file__).resolve().parents[3]
WINDOW = torch.tensor([2, 5, 7, 9])


def test_docstring_examples():
    assert router_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == [[11, 2]]
    logits = torch.tensor([[0.0, math.log(3), 0.0, math.log(4)]])
    chosen = choose(logits, Choice(Rule("softmax", 2), WINDOW))
    assert chosen.ids_tk.tolist() == [[9, 5]] and chosen.tally is None
    torch.testing.assert_close(chosen.weights_tk, torch.tensor([[4 / 9, 3 / 9]]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_the_formulas(name, bias):
    of = case(RULES[name], 37, 12, bias=bias)
    judge(of, "torch")
    # without a loss the gradient is that of the weights alone; given columns need not be the best
    judge(case(RULES[name], 37, 12, bias=bias, loss=False), "torch")
    judge_given(of, "torch")
    masked = case(RULES[name], 37, 12, bias=bias, mask=True)
    judge(masked, "torch")
    without = exact(masked.logits_tw, masked.choice._replace(mask_w=None), masked.dweights_tk)
    assert not torch.equal(without.columns_tk, exact(masked.logits_tw, masked.choice, masked.dweights_tk).columns_tk)


def judge(of: Case, impl: str) -> None:
    logits = of.logits_tw.clone().requires_grad_()
    found = choose(logits, of.choice, impl)
    found.weights_tk.backward(of.dweights_tk)
    check(found, logits.grad, of, exact(of.logits_tw, of.choice, of.dweights_tk))


def judge_given(of: Case, impl: str) -> None:
    worst = (-of.logits_tw).topk(of.choice.rule.top_k).indices
    given = of.choice._replace(chosen_tk=of.choice.window_w[worst])
    logits = of.logits_tw.clone().requires_grad_()
    found = choose(logits, given, impl)
    found.weights_tk.backward(of.dweights_tk)
    check(found, logits.grad, of._replace(choice=given), exact(of.logits_tw, given, of.dweights_tk, worst))


def test_a_split_gradient_is_nearly_all_of_it():
    dl = torch.randn(50, 30) * torch.logspace(-20, 5, 30)
    hi, lo = split(dl).double().chunk(2, 1)
    assert ((hi + lo - dl).abs() <= 2**-16 * dl.abs()).all()
    assert ((hi - dl).abs() > 2**-11 * dl.abs()).any(), "one half is not enough, or this proves nothing"


def test_products_of_bf16_on_tensor_cores():
    """Their CPU form: logits to fp32's rounding; gradients whose sums nearly cancel, so that one half would not do."""
    x, weight, dl = cancelling(40, 24, 64)
    logits = router_logits(x.requires_grad_(), weight.requires_grad_(), tensor_cores=True)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.detach().double(), x.double() @ weight.double().T, rtol=1e-6, atol=0)
    logits.backward(dl)
    check_products(x.detach(), weight.detach(), dl, x.grad, weight.grad)
    assert gradients(split(dl), x.detach(), weight.detach(), (False, False)) == (None, None)


def test_elsewhere_products_are_fp32s():
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    assert torch.equal(router_logits(x, weight), torch.nn.functional.linear(x, weight))
    x, weight = x.bfloat16(), weight.bfloat16()
    assert torch.equal(router_logits(x, weight), torch.nn.functional.linear(x.float(), weight.float()))


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [*RULES, "windows", "steps", "whole", "ties", "random", "empty", "done"]


def interpret() -> None:
    for name, rule in RULES.items():
        for bias in (False, True):
            judge(case(rule, 37, 48, bias=bias), "triton")
        judge(case(rule, 37, 48, loss=False), "triton")
        judge(case(rule, 37, 48, mask=True), "triton")
        judge_given(case(rule, 37, 48, bias=True), "triton")
        print(name)
    # 16 and 4 all of the window; 96 and 1000 no powers of two; 1024 a tile of one row; 2048 of several warps
    for w, k in ((16, 16), (4, 4), (5, 1), (96, 8), (1000, 8), (1000, 1), (1024, 3), (1500, 2)):
        for kind in ("softmax", "sigmoid", "norm"):
            judge(case(Rule(kind, k), 37 if w < 1000 else 5, w), "triton")  # type: ignore[arg-type]
    print("windows")
    several_rows_a_program()
    print("steps")
    whole_router()
    print("whole")
    ties_and_what_is_no_number()
    print("ties")
    random_choice()
    print("random")
    of = case(Rule("softmax", 2), 0, 48)
    judge(of, "triton")
    print("empty")


def several_rows_a_program() -> None:
    """Few programs, so that each goes over several tiles and the last ones lie beyond the tokens."""
    from moue_dist.kernels.routing import choose_triton

    before = choose_triton.PROGRAMS, choose_triton.PROGRAMS_OF_ONE_ROW
    choose_triton.PROGRAMS = choose_triton.PROGRAMS_OF_ONE_ROW = 3
    judge(case(Rule("softmax", 2), 37, 300), "triton")
    judge(case(Rule("norm", 3), 41, 700, bias=True), "triton")
    choose_triton.PROGRAMS, choose_triton.PROGRAMS_OF_ONE_ROW = before


def whole_router() -> None:
    """From x and the weight in bf16 to their gradients, in one node."""
    from moue_dist.kernels.routing import fused

    torch.manual_seed(0)
    for kind in ("softmax", "sigmoid", "norm"):
        of = case(Rule(kind, 3, scale=2.0), 37, 48, mask=kind != "norm")  # type: ignore[arg-type]
        x, weight = torch.randn(37, 64).bfloat16().requires_grad_(), torch.randn(48, 64).bfloat16().requires_grad_()
        found = fused.route(x, weight, of.choice)
        found.weights_tk.backward(of.dweights_tk)
        want = exact(x.double() @ weight.double().T, of.choice, of.dweights_tk)
        assert torch.equal(found.ids_tk, of.choice.window_w[want.columns_tk])
        torch.testing.assert_close(found.weights_tk.detach().double(), want.weights_tk, rtol=1e-4, atol=1e-6)
        for got, exactly in (
            (x.grad, want.dlogits_tw @ weight.double()),
            (weight.grad, want.dlogits_tw.T @ x.double()),
        ):
            assert got.dtype == torch.bfloat16
            largest = exactly.abs().max().item()
            torch.testing.assert_close(got.double(), exactly.detach(), rtol=2**-8, atol=2e-5 * largest)
        # fp32 takes the products of the reference and the same kernels
        single = x.detach().float().requires_grad_()
        route(single, weight.detach().float(), of.choice, "triton").weights_tk.backward(of.dweights_tk)
        exactly = (want.dlogits_tw @ weight.double()).detach()
        torch.testing.assert_close(single.grad.double(), exactly, rtol=1e-4, atol=1e-6 * exactly.abs().max().item())


def ties_and_what_is_no_number() -> None:
    """Equal scores: the lowest columns. NaN and infinity: still k different experts of the window."""
    choice = Choice(Rule("softmax", 3), WINDOW)
    rows = {
        (1.0, 1.0, 1.0, 1.0): [2, 5, 7],
        (0.0, 2.0, -0.0, 2.0): [5, 9, 2],
        (-0.0, -1.0, -2.0, 0.0): [2, 9, 5],
        (-1e9, -1e9, 3.0, -1e9): [7, 2, 5],
        (-math.inf, -math.inf, 0.0, -math.inf): [7, 2, 5],
        (1.0, math.inf, -3.0, 2.0): [5, 9, 2],
        (1.0, math.nan, -3.0, 2.0): [5, 9, 2],
        (math.nan,) * 4: [2, 5, 7],
    }
    found = choose(torch.tensor(list(rows)), choice, "triton")
    assert found.ids_tk.tolist() == list(rows.values())
    negative_nan = torch.tensor([[-1] * 4], dtype=torch.int32).view(torch.float32)
    assert choose(negative_nan, choice, "triton").ids_tk.tolist() == [[2, 5, 7]]


def random_choice() -> None:
    of = case(Rule("softmax", 4, random=True), 500, 48, bias=True)
    torch.manual_seed(5)
    first, second = (choose(of.logits_tw, of.choice, "triton") for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(choose(of.logits_tw, of.choice, "triton").ids_tk, first.ids_tk)
    same = (first.ids_tk.sort().values == second.ids_tk.sort().values).all(1).sum()
    assert same < 5, "another draw, other experts"
    columns = torch.searchsorted(of.choice.window_w, first.ids_tk)
    assert (columns.sort().values.diff() > 0).all()
    want = exact(of.logits_tw, of.choice, of.dweights_tk, columns)
    check(first, want.dlogits_tw, of, want)
    # 2000 assignments to 48 experts, 41.7 each: chi-square of 47 degrees of freedom stays below 95 (1 in 20,000)
    assert first.tally is not None
    assert ((first.tally.count_w - 2000 / 48).square() / (2000 / 48)).sum() < 95
    pairs = torch.zeros(48, 48).index_put_((columns[:, 0], columns[:, 1]), torch.ones(500), accumulate=True)
    assert pairs.max() < 7, "choices of a token are independent of each other"


if __name__ == "__main__":
    interpret()
    print("done")
