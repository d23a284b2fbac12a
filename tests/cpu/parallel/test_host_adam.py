"""The optimizer in host memory against torch.optim.AdamW, on the CPU, with DeepSpeed's real operator.

Where DeepSpeed or a compiler is missing those tests skip and the rest runs; tests/gpu has the operator on a GPU's host.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moue_dist.config import Config, ConfigError, MoEConfig, OptimizerConfig, ParallelConfig
from moue_dist.parallel.groups import ReplicaGroup
from moue_dist.parallel.megatron import cpu_host
from moue_dist.parallel.pool import host_adam, host_operator
from moue_dist.parallel.pool.host_adam import HostAdam
from moue_dist.parallel.pool.host_limits import CHUNK, HostLimits, adam_bytes, divide
from moue_dist.parallel.pool.host_operator import build_folder, load_operator
from moue_dist.parallel.pool.synced import SharedOptimizer, SyncedBuffer, check_replicas
from moue_dist.refusals.validate import validate
from tests.host_adam import needs_operator
from tests.ranks.spawn import ROOT

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
SIZES = (5003, 0, 2048, 1)  # several chunks with a ragged end, an empty share, whole blocks, one number
GIB = 2**30


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_host.install()
    monkeypatch.setattr(host_adam, "CHUNK", 1024)
    monkeypatch.setattr(host_adam, "BLOCK", 384)  # 1024 is no multiple


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=g).to(dtype) for n in SIZES]


def host(of: list[Tensor], moments: torch.dtype = torch.float32) -> HostAdam:
    return HostAdam(of, betas=BETAS, eps=EPS, weight_decay=DECAY, moments=moments)


def gradients(step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(n, generator=g) * 10 ** torch.empty(n).uniform_(-6, 1, generator=g) for n in SIZES]


def rate(step: int) -> float:
    return 1e-2 * (1 + math.cos(step / 20))


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    a, b = torch.cat(got).double(), torch.cat(want).double()
    return float((a - b).norm() / b.norm())


@needs_operator
def test_fifty_steps_are_those_of_torch() -> None:
    """Clipped gradients of all sizes, changing rates. fp32 rounds by 6e-8, and 50 steps add up to less than 2e-6."""
    ours = weights()
    exact = [torch.nn.Parameter(w.double()) for w in ours]
    start = [p.detach().clone() for p in exact]
    adam = host(ours)
    truth = torch.optim.AdamW(exact, lr=0.0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(50):
        clip = min(1.0, 30 / float(torch.cat(gradients(step)).norm()))
        scaled = [g * clip for g in gradients(step)]
        for p, g in zip(exact, scaled, strict=True):
            p.grad = g.double()
        truth.param_groups[0]["lr"] = rate(step)
        truth.step()
        pending = adam.step(scaled, rate(step))
        pending.wait()
    moved = [p.detach() - s for p, s in zip(exact, start, strict=True)]
    assert relative([w - s.float() for w, s in zip(ours, start, strict=True)], moved) < 2e-6
    for name, shares in adam.states().items():
        want = [p.detach() if name == "weight" else truth.state[p][name] for p in exact]
        assert relative(shares, want) < 2e-6, name


@needs_operator
def test_weights_are_the_masters_rounded() -> None:
    ours = weights(torch.bfloat16)
    adam = host(ours)
    before = [w.clone() for w in ours]
    adam.step(gradients(0), 1e-2).wait()
    assert all(torch.equal(w, m.bfloat16()) for w, m in zip(ours, adam.masters, strict=True))
    assert not torch.equal(ours[0], before[0])


@needs_operator
def test_moments_in_bf16_are_rounded_once_a_step() -> None:
    """Against the recurrence written out: only the stored moments are rounded, each step starts from them."""
    ours, adam = weights(), None
    master = [w.double() for w in ours]
    first, second = ([torch.zeros(n).double() for n in SIZES] for _ in range(2))
    adam = host(ours, torch.bfloat16)
    for step in range(20):
        adam.step(gradients(step), rate(step)).wait()
        for i, g in enumerate(gradients(step)):
            m, v = (
                beta * kept[i] + (1 - beta) * new
                for beta, kept, new in zip(BETAS, (first, second), (g.double(), g.double() ** 2), strict=True)
            )
            scale = [1 - beta ** (step + 1) for beta in BETAS]
            master[i] *= 1 - rate(step) * DECAY
            master[i] -= rate(step) * (m / scale[0]) / ((v / scale[1]).sqrt() + EPS)
            first[i], second[i] = m.bfloat16().double(), v.bfloat16().double()
    moments = adam.states()
    assert all(t.dtype == torch.bfloat16 for name in ("exp_avg", "exp_avg_sq") for t in moments[name])
    # fp32 and fp64 may round a number near a tie to different neighbours, 1/256 apart: a few in a thousand do.
    assert relative(moments["weight"], master) < 1e-4
    for name, want in (("exp_avg", first), ("exp_avg_sq", second)):
        got, exact = torch.cat(moments[name]).double(), torch.cat(want)
        assert float((got != exact).double().mean()) < 0.02, name


@needs_operator
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(moments: torch.dtype) -> None:
    """At 30 steps a product of betas kept from step to step has left the power that a resumed operator starts from."""
    half, whole = 30, 45
    unbroken, broken = weights(), weights()
    first = host(unbroken, moments)
    for step in range(whole):
        first.step(gradients(step), rate(step)).wait()
    second = host(broken, moments)
    for step in range(half):
        second.step(gradients(step), rate(step)).wait()
    resumed = [torch.zeros_like(w) for w in broken]
    third = host(resumed, moments)
    for name, shares in third.states().items():
        for to, of in zip(shares, second.states()[name], strict=True):
            to.copy_(of)
    third.set_steps(half)
    third.publish()
    assert all(map(torch.equal, resumed, broken))
    for step in range(half, whole):
        third.step(gradients(step), rate(step)).wait()
    assert all(map(torch.equal, resumed, unbroken))
    for name, shares in third.states().items():
        assert all(map(torch.equal, shares, first.states()[name])), name


@needs_operator
def test_what_goes_wrong_in_the_worker_comes_to_the_caller() -> None:
    adam = host(weights())
    pending = adam.step([], 1e-2)
    with pytest.raises(IndexError):
        pending.wait()


def two_buffers() -> list[SyncedBuffer]:
    alone = ReplicaGroup(None, 1, 0)
    buffers = []
    for name, rows, row in (("pool", 64, 4096), ("other", 1, 100)):
        b = SyncedBuffer(
            name,
            range(rows),
            rows,
            row,
            [(0, rows, alone)],
            pieces=1,
            dtype=torch.bfloat16 if name == "pool" else torch.float32,
            device=torch.device("cpu"),
            grad_scale=1.0,
        )
        b.weight.copy_(torch.randn(rows, row, generator=torch.Generator().manual_seed(1)))
        buffers.append(b)
    return buffers


@needs_operator
@pytest.mark.parametrize("wait", ["zero_grad", "states", "masters", "finish", "check_replicas"])
def test_a_step_under_way_ends_before_anyone_looks(wait: str) -> None:
    """The same three steps with the state on the device; the worker has 256 chunks to do when the caller goes on."""
    results = []
    for on_host in ({}, {"pool": torch.float32}):
        buffers = two_buffers()
        optimizer = SharedOptimizer(buffers, betas=BETAS, eps=EPS, weight_decay=DECAY, on_host=on_host)
        g = torch.Generator().manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            for b in buffers:
                b.grad.add_(torch.randn(b.grad.shape, generator=g))
            optimizer.reduce()
            optimizer.step(1e-2, clip=0.5)
        assert (buffers[0].pending is not None) == bool(on_host)
        match wait:
            case "zero_grad" | "finish":
                getattr(optimizer, wait)()
            case "states":
                optimizer.states(0)
            case "masters":
                assert len(optimizer.masters) == 2
            case _:
                check_replicas(buffers)
        assert buffers[0].pending is None
        results.append([*(b.weight.float() for b in buffers), *(t for i in (0, 1) for t in states(optimizer, i))])
        assert all(map(torch.equal, [b.weight.view(-1) for b in buffers], rounded(optimizer, buffers)))
    for on_device, on_host_ in zip(*results, strict=True):
        bound = 1e-6 if on_device.shape[-1] != 4096 else 1e-3  # a weight in bf16 may round to either side
        assert float((on_device - on_host_).norm() / on_device.norm()) < bound


def states(optimizer: SharedOptimizer, buffer: int) -> list[Tensor]:
    return [t for shares in optimizer.states(buffer).values() for t in shares]


def rounded(optimizer: SharedOptimizer, buffers: list[SyncedBuffer]) -> list[Tensor]:
    return [m[0].to(b.weight.dtype) for m, b in zip(optimizer.masters, buffers, strict=True)]


# Refusals and limits, which need no operator.


def test_the_host_must_have_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = HostLimits("a", frozenset({0}), 1, 10_000)
    monkeypatch.setattr(HostLimits, "here", staticmethod(lambda: poor))
    with pytest.raises(ConfigError, match=r"parallel\.pool_optimizer=host needs .* parallel\.host_state=bf16"):
        host([torch.zeros(10_000)])


@needs_operator
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ConfigError, match=r"pool_optimizer=host.*no-such-compiler.*pool_optimizer=device"):
        load_operator()


@needs_operator
def test_a_killed_build_holds_nobody_up() -> None:
    """PyTorch's lock is a file; the one of a build that was killed would be waited for without end."""
    load_operator()
    left = build_folder() / "lock"
    left.touch()
    program = "from moue_dist.parallel.pool.host_operator import load_operator; load_operator()"
    try:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60)
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_operator, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pool_optimizer=host needs DeepSpeed.*'gpu'.*pool_optimizer=device"):
        load_operator()


def test_ranks_of_a_host_divide_its_cores_and_memory() -> None:
    def limits(name: str, cores: range, quota: int | None = None, free: int = 100) -> HostLimits:
        return HostLimits(name, frozenset(cores), quota or len(cores), free)

    shared = divide([limits("a", range(8)), limits("a", range(8), free=90), limits("b", range(4))], [30, 50, 7])
    assert [(f.threads, f.needed, f.free) for f in shared] == [(4, 80, 90), (4, 80, 90), (4, 7, 100)]
    bound = divide([limits("a", range(4)), limits("a", range(4, 8))], [1, 1])
    assert [f.threads for f in bound] == [4, 4]
    quota = divide([limits("a", range(64), quota=6)] * 4, [1] * 4)
    assert [f.threads for f in quota] == [1] * 4
    here = HostLimits.here()
    assert 1 <= here.quota <= len(here.cores) and here.memory > 0


def test_bytes_of_the_host() -> None:
    """A 7B pool, 6.4e9 numbers, in bf16: 72 GiB with fp32 moments, 48 with bf16 ones, staging of 96 MiB beside."""
    staging = 2 * CHUNK * 6
    assert adam_bytes(6 * GIB, moment=4, weight=2) == 72 * GIB + staging
    assert adam_bytes(6 * GIB, moment=2, weight=2) == 48 * GIB + staging
    assert adam_bytes(1000, moment=4, weight=4) == 12_000 + 2 * 8_000


@pytest.mark.parametrize(
    ("parallel", "optim", "message"),
    [
        ({"host_state": "bf16"}, {}, r"host_state=bf16 is only for parallel\.pool_optimizer=host"),
        ({"pool_optimizer": "host", "host_state": "bf16"}, {"beta2": 0.999}, r"optim\.beta2=0\.999 .* at most 0\.99"),
        ({"pool_optimizer": "host", "host_state": "bf16"}, {"beta1": 0.995}, r"optim\.beta1=0\.995"),
        ({"pool_optimizer": "host"}, {"beta2": 0.999}, None),
        ({"pool_optimizer": "host", "host_state": "bf16"}, {}, None),
        (
            {"pool_optimizer": "host", "placement": "home", "replace_interval": 5},
            {},
            r"replace_interval=5 is not proven with parallel\.pool_optimizer=host",
        ),
    ],
)
def test_refusals(parallel: dict[str, object], optim: dict[str, float], message: str | None) -> None:
    config = Config(moe=MoEConfig(pool=16, topology="full"), optim=OptimizerConfig(**optim))
    config = replace(config, parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    if message is None:
        validate(config, None, cuda=False)
        return
    with pytest.raises(ConfigError, match=message):
        validate(config, None, cuda=False)


def test_bf16_moments_stand_still_above_the_refused_betas() -> None:
    """Why 0.99: a decay by 0.999 rounds back to where it was, one by 0.99 does not, whatever the number."""
    v = torch.arange(1.0, 2.0, 2**-7).bfloat16()
    assert torch.equal((v.float() * 0.999).bfloat16(), v)
    assert not torch.any((v.float() * 0.99).bfloat16() == v)
