"""Experts in FP8 on a Hopper GPU: kernels against their references, products against float64, training by layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from moue_dist.config.devices import grouped_fp8
from moue_dist.kernels.backend import has_transformer_engine, has_triton
from moue_dist.kernels.experts.mlp import ExpertSlab, expert_backward, expert_mlp
from moue_dist.kernels.experts.swiglu import swiglu_backward, swiglu_forward, swiglu_weighted_backward
from moue_dist.kernels.experts.wgrad import WeightGradients
from moue_dist.kernels.fp8.e4m3 import (
    gather_and_quantise,
    quantise_rows,
    quantise_weights,
    swiglu_backward_fp8,
    swiglu_forward_fp8,
)
from moue_dist.kernels.fp8.pool import QuantisedPool
from moue_dist.kernels.fp8.scaled import Layouts, Scaled
from moue_dist.kernels.rows.permute import gather_rows
from tests.cpu.kernels.test_fp8 import Held, rows_of
from tests.gpu.test_kernels_gpu import LAYOUTS, D, F, check_experts, no_waiting, poison, reference, relative

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
HOPPER = torch.cuda.is_available() and grouped_fp8(torch.cuda.get_device_capability())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HOPPER and has_triton()), reason="needs a Hopper GPU and Triton"),
]
needs_te = pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
ROUNDED = 4e-2  # one rounding to e4m3 with a scale a row: 2.6e-2; a product of two such: 3.75e-2
THROUGH = 9e-2  # a product behind a product


def same(a: Scaled, b: Scaled, rows: int | None = None) -> None:
    """Equal but where a last digit of fp32 decides between two neighbours in e4m3."""
    torch.testing.assert_close(a.scale[:rows], b.scale[:rows], rtol=1e-5, atol=0)
    if rows == 0:
        return
    differ = a.q[:rows].view(torch.uint8) != b.q[:rows].view(torch.uint8)
    assert differ.float().mean() < 2e-3
    torch.testing.assert_close(a.wide()[:rows], b.wide()[:rows], rtol=0.13, atol=float(b.scale[:rows].max()) * 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
# 16 less than a vector a thread; 96 and 1000 no powers of two; 8192 wide
@pytest.mark.parametrize(("d", "rows"), [(16, 1000), (96, 333), (1000, 65), (2048, 130), (8192, 7)])
def test_rows(d, rows, kind, dtype):
    torch.manual_seed(d)
    x = rows_of(kind, rows, d).to(dtype)
    x[1], x[2] = 0, 1e-30
    x = x.cuda()
    index = torch.randint(-1, rows, (3 * rows,), device="cuda")
    poison(3 * rows, d)
    same(quantise_rows(x, impl="triton"), quantise_rows(x, impl="torch"))
    same(quantise_rows(x, index, impl="triton"), quantise_rows(x, index, impl="torch"))
    same(quantise_rows(x, index.int(), impl="triton"), quantise_rows(x, index, impl="torch"))
    assert relative(quantise_rows(x, impl="triton").wide(), x) < ROUNDED
    for count in (0, 1, rows, rows + 3):
        live = torch.tensor([count], device="cuda", dtype=torch.int32)
        same(quantise_rows(x, index, "triton", live), quantise_rows(x, index, "torch"), count)
        kept, scaled = gather_and_quantise(x, index, "triton", live)
        same(scaled, quantise_rows(x, index, "torch"), count)
        assert kept.dtype == dtype and torch.equal(kept[:count], gather_rows(x, index, impl="torch")[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("f", "rows"), [(16, 300), (96, 13), (1024, 70), (1408, 33), (8192, 3)])
def test_swiglu(f, rows, dtype):
    torch.manual_seed(f)
    z, dh = (3 * torch.randn(rows, 2 * f, device="cuda")).to(dtype), torch.randn(rows, f, device="cuda").to(dtype)
    z[1], weight = 0, torch.rand(rows, device="cuda")
    poison(rows, 2 * f)
    some = torch.tensor([rows - 1], device="cuda", dtype=torch.int32)
    for live, seen in ((None, rows), (some, rows - 1)):
        h = swiglu_forward_fp8(z, "triton", live)
        same(h, swiglu_forward_fp8(z, "torch"), seen)
        assert relative(h.wide()[:seen], swiglu_forward(z.double(), "torch")[:seen]) < ROUNDED
        for by in (None, weight):
            got, by_torch = (swiglu_backward_fp8(z, dh, by, impl, live) for impl in ("triton", "torch"))
            same(got.dz8, by_torch.dz8, seen)
            exact = (
                swiglu_backward(z.double(), dh.double(), "torch")
                if by is None
                else swiglu_weighted_backward(z.double(), dh.double(), by.double(), "torch")
            )
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            for a, b in zip([got.dz_r2f, got.h_rf, got.dweight_r], [*exact, None], strict=False):
                assert (a is None) == (b is None)
                assert a is None or relative(a[:seen], b[:seen]) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("o", "i"), [(32, 16), (130, 100), (256, 2048), (70, 8192)])
def test_weights_in_both_layouts(o, i, dtype):
    torch.manual_seed(o)
    w = torch.randn(5, 3 * o * i, device="cuda").to(dtype)[:, o * i : 2 * o * i].view(5, o, i)
    w[1, 2], w[1, :, 3] = 0, 0
    poison(5, o, i)
    got, expected = (Layouts.empty(5, o, i, w.device) for _ in range(2))
    quantise_weights(w, got, "triton")
    quantise_weights(w, expected, "torch")
    for a, b in zip(got, expected, strict=True):
        same(Scaled(a.q.flatten(0, 1), a.scale.flatten()), Scaled(b.q.flatten(0, 1), b.scale.flatten()))


def make(spans, merged: int = 1, n: int = 8, hidden: int = D, width: int = F) -> ExpertSlab:
    torch.manual_seed(1)
    weight = (torch.randn(n, 3 * width * hidden, device="cuda") / hidden**0.5).bfloat16()
    pool = QuantisedPool(Held(weight), hidden, width)
    pool.refresh()
    grad = torch.randn(n, 3 * width * hidden, device="cuda")
    return ExpertSlab(weight, grad, hidden, width, spans, WeightGradients(merged), pool)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("spans", "counts"), LAYOUTS)
def test_experts(spans, counts, recompute, host):
    slab = make(spans)
    check_experts(
        slab,
        counts,
        lambda x, counts_n: expert_mlp(
            x, counts_n, slab, backend="fp8", recompute=recompute, counts_host=counts if host else None
        ),
        THROUGH,
    )


@pytest.mark.parametrize(("spans", "counts"), LAYOUTS[:6])
def test_backward_without_a_graph(spans, counts):
    slab = make(spans)
    x, dy = (torch.randn(sum(counts), D, device="cuda").bfloat16() for _ in range(2))
    weight = torch.rand(sum(counts), device="cuda")
    y, dx, dpool = reference(x, slab, counts, dy.double() * weight.double()[:, None])
    before = slab.grad.clone()
    poison(sum(counts), D)
    got_dx, dweight = expert_backward(
        x, dy, weight, torch.tensor(counts, device="cuda"), slab, backend="fp8", counts_host=counts
    )
    assert relative(got_dx, dx) < THROUGH and relative(slab.grad - before, dpool) < THROUGH
    assert relative(dweight, (y * dy.double()).sum(1)) < THROUGH


def test_more_experts_than_one_product_takes():
    """600 held, cut at 512; every other one without rows."""
    n, hidden, width = 600, 64, 32
    slab = make(((0, n),), n=n, hidden=hidden, width=width)
    counts = [(3 * e) % 7 if e % 2 else 0 for e in range(n)]
    x, dy = (torch.randn(sum(counts), hidden, device="cuda").bfloat16() for _ in range(2))
    x.requires_grad_()
    before, results = slab.grad.clone(), []
    for backend in ("loop", "fp8"):
        slab.grad.copy_(before)
        x.grad = None
        y = expert_mlp(x, torch.tensor(counts, device="cuda"), slab, backend=backend, counts_host=counts)
        y.backward(dy)
        results.append((y.detach(), x.grad, slab.grad - before))
    for got, exact in zip(results[1], results[0], strict=True):
        assert 1e-2 < relative(got, exact) < THROUGH


@pytest.mark.parametrize("recompute", [False, True])
def test_over_one_span_nothing_waits_for_the_device(recompute):
    slab = make(((1, 5),))
    x = torch.randn(100, D, device="cuda").bfloat16().requires_grad_()
    counts_n = torch.tensor([10, 0, 50, 40], device="cuda")
    for context in (nullcontext(), no_waiting()):  # compile first: loading a kernel waits for the device
        with context:
            expert_mlp(x, counts_n, slab, backend="fp8", recompute=recompute).sum().backward()
            slab.fp8._of.version += 1
            slab.fp8.refresh()


def test_merged_weight_gradients_are_those_of_each_layer_alone():
    layers, sums = [(((1, 5),), [130, 57, 0, 300]), (((5, 8), (0, 2)), [20, 70, 128, 40, 33])], []
    for merged in (1, 2):
        slab = make(((0, 8),), merged)
        for spans, counts in layers:
            torch.manual_seed(sum(counts))
            part = ExpertSlab(slab.weight, slab.grad, D, F, spans, slab.sums, slab.fp8)
            x = torch.randn(sum(counts), D, device="cuda").bfloat16().requires_grad_()
            expert_mlp(x, torch.tensor(counts, device="cuda"), part, backend="fp8").square().sum().backward()
        sums.append(slab.grad)
    assert relative(sums[1], sums[0]) < 1e-6


def train(folder: Path, name: str, *words: str) -> list[float]:
    """Losses of six steps of the debug configuration in FP8, on one GPU, in a process of its own."""
    given = ["--output", str(folder), "--name", name, "--data.cache", str(folder / "data"), "--train.steps", "6"]
    command = [sys.executable, "-m", "moue_dist", "train", "configs/debug_gpu.yaml", "--train.precision", "fp8"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    done = subprocess.run([*command, *given, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    about = json.loads((folder / name / "run.json").read_text())
    assert about["resolved"]["experts"] == ("te" if "te" in words else "fp8")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [x["loss"] for x in map(json.loads, lines) if x["kind"] == "train"]


@needs_te
@pytest.mark.timeout(1800)
def test_layouts_train_the_same(tmp_path):
    """What is refused without our experts: selective recompute, home and hybrid, side by side or with recompute."""
    kept = train(tmp_path, "kept")
    assert len(kept) == 6 and kept[-1] < kept[0]
    for name, words in {
        "selective": "--parallel.recompute selective",
        "full": "--parallel.recompute full",
        "home": "--parallel.placement home",
        "hybrid": "--parallel.placement hybrid --parallel.pool-budget-gib 1",
        "home full": "--parallel.placement home --parallel.recompute full --parallel.lag 0",
        "te": "--moe.experts te",
    }.items():
        losses = train(tmp_path, name.replace(" ", "_"), *words.split())
        assert losses[0] == pytest.approx(kept[0], rel=2e-3), name  # the same weights, forward alone
        assert losses == pytest.approx(kept, rel=3e-2), name
