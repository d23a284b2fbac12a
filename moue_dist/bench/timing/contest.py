"""Several ways of one thing: checked to compute the same, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.bench.timing.quiet import no_garbage_collection
from moue_dist.parallel.recording.timeline import clock_of

Way = Callable[[], Sequence[Tensor]]  # does it once and gives what it computed
LEAST_SECONDS = 2e-4  # of a covered sample: shorter ways are called several times in it
MOST_CALLS = 50
CHUNK = 2**26  # numbers that are compared at once
TICKS = 2e9  # a second of torch.cuda._sleep, at most


@dataclass(frozen=True, eq=False)
class Contest:
    """`ways` by name; the first is the one that the others are held against.

    `tolerance`: how far, relatively, any result of another way may be from the first's; None where they draw random
    numbers of their own. `calls` in a sample, back to back, so that a host that is slower than the device shows; None:
    one way at a time on a device that is kept busy until all is issued, so that it does not. `facts` go to the record.
    """

    ways: Mapping[str, Way]
    tolerance: float | None
    calls: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    after: Callable[[], Any] = lambda: None  # ends a sample, and counts in it


def measure(contest: Contest, samples: int, device: torch.device, world: Any = None) -> dict[str, Any]:
    """The contest's entry in the record: each way's `ms` (median), `ms_all`, `ratio` to the first, `difference`.

    Collective over `world`, where there is one: a sample is its slowest rank's, a difference the largest. In a single
    process another way that fails has an `error` in place of its numbers.
    """
    found, errors = _differences(contest, device, world)
    able = replace(contest, ways={name: way for name, way in contest.ways.items() if name not in errors})
    times, hosts = _times(able, samples, device, world)
    first = next(iter(contest.ways))
    ways: dict[str, Any] = {}
    for name in contest.ways:
        if name in errors:
            ways[name] = {"error": errors[name]}
            continue
        ms = times[name]
        ways[name] = {"ms": median(ms), "ms_all": ms, "host_ms": hosts[name]}
        if name != first:
            ways[name] |= {"ratio": median(ms) / median(times[first]), "difference": found[name]}
    agree = not any(x is not None and x > (contest.tolerance or 0.0) for x in found.values())
    return {"first": first, "ways": ways, "tolerance": contest.tolerance, "agree": agree, **contest.facts}


def difference(mine: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest relative distance |a - b| / |b| of two lists of tensors; infinite where one is not finite.

    Example: [[3, 4]], [[0]] against [[3, 4.1]], [[0]] -> about 0.02.
    """
    return max(_distance(a.detach(), b.detach()) for a, b in zip(mine, other, strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"two ways of one thing give {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    a, b = (x[None] if x.dim() == 0 else x for x in (a, b))
    rows = max(1, CHUNK * a.shape[0] // a.numel())  # whole rows, so that a strided tensor is not copied
    apart = size = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        x, y = x.double(), y.double()
        apart, size = apart + (x - y).square().sum(), size + y.square().sum()
    ratio = float((apart / size.clamp_min(1e-300)).sqrt())
    return ratio if ratio == ratio else float("inf")


def _differences(contest: Contest, device: torch.device, world: Any) -> tuple[dict[str, float | None], dict[str, str]]:
    """Of every way but the first, on several ranks the largest; and why ways failed."""
    (_, first), *others = contest.ways.items()
    expected = first()
    contest.after()
    found: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    for name, way in others:
        try:
            got = way()
        except Exception as error:  # not installed as we think, out of memory: the other ways are still measured
            if world is not None:
                raise
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        contest.after()
        found[name] = None
        if contest.tolerance is not None:
            worst = torch.tensor([difference(got, expected)], dtype=torch.float64, device=device)
            if world is not None:
                dist.all_reduce(worst, dist.ReduceOp.MAX, group=world)
            found[name] = float(worst)
    return found, errors


def _times(
    contest: Contest, samples: int, device: torch.device, world: Any
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of a call by way, and of the host to issue it."""
    clock = clock_of(device)

    def sample(way: Way, calls: int, cover: float) -> tuple[float, float]:
        clock.settle()
        if world is not None:
            dist.barrier(group=world)
            clock.settle()
        if cover and device.type == "cuda":
            torch.cuda._sleep(int(cover * TICKS))
        start, begun = clock.mark(), time.perf_counter()
        for _ in range(calls):
            way()
        contest.after()
        issued, end = time.perf_counter() - begun, clock.mark()
        clock.settle()
        return clock.seconds(start, end) / calls, issued / calls

    plans = {}
    for name, way in contest.ways.items():
        seconds, host = min(sample(way, contest.calls or 1, 0.0) for _ in range(2))  # the warm-up, too
        if contest.calls is None:
            calls = min(MOST_CALLS, max(1, round(LEAST_SECONDS / max(seconds, 1e-7))))
            plans[name] = way, calls, min(1.2 * host * calls, 0.02)
        else:
            plans[name] = way, contest.calls, 0.0
    times: dict[str, list[float]] = {name: [] for name in plans}
    hosts: dict[str, list[float]] = {name: [] for name in plans}
    with no_garbage_collection():
        for i in range(samples):
            for name in list(plans) if i % 2 == 0 else list(reversed(plans)):
                seconds, host = sample(*plans[name])
                times[name].append(seconds * 1e3)
                hosts[name].append(host * 1e3)
    if world is not None:
        table = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=world)
        times = dict(zip(times, table.tolist(), strict=True))
    rounded = {name: [round(x, 6) for x in ms] for name, ms in times.items()}
    return rounded, {name: round(median(ms), 6) for name, ms in hosts.items()}
