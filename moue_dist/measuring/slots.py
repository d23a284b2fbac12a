"""The arithmetic of a recorded step: what share of its time a stage worked, and the same step without any waiting.

Reads `timeline.json` (parallel/recording/spans.py says what is in it). Times are seconds since the step's common zero.

At every instant a lane is in exactly one state. A transfer inside a forward or backward counts as `exchange`; one
outside is a wait for another stage. The bubble is what is left: time in which a stage neither has a microbatch in hand
nor computes experts for others, that is `waiting` + `idle`, between the first forward and the last backward of all
stages.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from moue_dist.parallel.recording.spans import FILE, KINDS, Span

WORK = ("forward", "backward")


@dataclass(frozen=True)
class Lane:
    """One rank of one pipeline stage."""

    rank: int
    stage: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Step:
    """One recorded step."""

    step: int
    pipeline: int
    virtual: int
    microbatches: int
    schedule: str
    lag: int
    lanes: tuple[Lane, ...]

    @property
    def start(self) -> float:
        """When the first rank began its first forward."""
        return min(s.start for lane in self.lanes for s in lane.spans if s.kind in WORK)

    @property
    def end(self) -> float:
        """When the last rank was through with its last backward, or with the last service to another stage."""
        return max(s.end for lane in self.lanes for s in lane.spans if s.kind in (*WORK, "serve"))


@dataclass(frozen=True)
class Shares:
    """Seconds that a lane spent in each state within the schedule; they sum to `total`."""

    forward: float = 0.0
    backward: float = 0.0
    serve: float = 0.0
    exchange: float = 0.0  # transfers inside forward or backward
    waiting: float = 0.0  # transfers outside
    optimizer: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.serve + self.exchange + self.waiting + self.optimizer + self.idle

    @property
    def bubble(self) -> float:
        """The share of the time without work of one's own or for others."""
        return (self.waiting + self.idle) / self.total if self.total > 0 else math.nan


def shares(lane: Lane, start: float, end: float) -> Shares:
    """What the lane did from `start` to `end`.

    Spans may nest and, on two streams, overlap. Where there are fewer transfers under way than microbatches in hand,
    one of these computes, and the transfer is hidden. Time of two kinds at once is split between them.
    """
    edges: list[tuple[float, int, str]] = []
    for span in lane.spans:
        a, b = max(span.start, start), min(span.end, end)
        if b > a:
            edges += [(a, 1, span.kind), (b, -1, span.kind)]
    edges.sort(key=lambda edge: edge[0])
    spent: defaultdict[str, float] = defaultdict(float)
    active: Counter[str] = Counter()
    at = start
    for time, change, kind in [*edges, (end, 0, "idle")]:
        states = _states(active)
        for state in states:
            spent[state] += (time - at) / len(states)
        active[kind] += change
        at = time
    return Shares(**spent)


def _states(active: Counter[str]) -> tuple[str, ...]:
    """The state that the spans under way amount to; two where a forward and a backward run at once."""
    work = active["forward"] + active["backward"]
    if active["transfer"] and active["transfer"] >= work:
        return ("exchange",) if work else ("waiting",)
    if active["serve"]:
        return ("serve",)
    if work:
        return tuple(kind for kind in WORK if active[kind])
    return ("optimizer",) if active["optimizer"] else ("idle",)


def bubble(step: Step) -> float:
    """The measured bubble: mean over lanes, each within the schedule's span of all lanes."""
    start, end = step.start, step.end
    return mean(shares(lane, start, end).bubble for lane in step.lanes)


def ideal_bubble(pipeline: int, microbatches: int, virtual: int = 1) -> float:
    """(PP - 1) / (V M + PP - 1): the least that 1F1B leaves idle with equal stages and free transfers."""
    return (pipeline - 1) / (virtual * microbatches + pipeline - 1)


def mean_times(step: Step) -> tuple[float, float]:
    """Mean seconds of a forward and of a backward of one microbatch on one stage, without the transfers inside."""
    spent: dict[str, list[float]] = {kind: [] for kind in WORK}
    for lane in step.lanes:
        transfers = sorted((s for s in lane.spans if s.kind == "transfer"), key=lambda s: s.start)
        starts = [t.start for t in transfers]
        for span in lane.spans:
            if span.kind in WORK:
                near = transfers[bisect_left(starts, span.start) : bisect_right(starts, span.end)]
                inside = [t for t in near if t.end <= span.end and t.microbatch in (None, span.microbatch)]
                spent[span.kind].append(span.end - span.start - _union(inside))
    return mean(spent["forward"] or [0.0]), mean(spent["backward"] or [0.0])


def _union(spans: Sequence[Span]) -> float:
    total, reached = 0.0, -math.inf
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def ideal(step: Step, forward: float, backward: float) -> list[Lane]:
    """The step's schedule with every forward and backward of the given length and nothing else; starts at 0."""
    if step.schedule.startswith("lock-step"):
        return _ideal_lockstep(step.pipeline, step.microbatches, forward, backward)
    orders = [_order(step.pipeline, step.virtual, step.microbatches, stage) for stage in range(step.pipeline)]
    return _play(orders, step.pipeline, step.virtual, forward, backward)


def _ideal_lockstep(stages: int, microbatches: int, forward: float, backward: float) -> list[Lane]:
    """Slot t: F of microbatch t - s, then B of microbatch t - 2 (PP - 1) + s. Sub-slots that no stage has take no time.

    A lag moves backward sub-slots behind later forward ones, and changes neither their number nor the bubble.
    """
    spans: list[list[Span]] = [[] for _ in range(stages)]
    ramp, at = stages - 1, 0.0
    for slot in range(microbatches + 2 * ramp):
        for kind, length in (("forward", forward), ("backward", backward)):
            at_work = False
            for s in range(stages):
                m = slot - s if kind == "forward" else slot - 2 * ramp + s
                if 0 <= m < microbatches:
                    spans[s].append(Span(kind, at, at + length, m))
                    at_work = True
            at += length * at_work
    return [Lane(s, s, tuple(mine)) for s, mine in enumerate(spans)]


Task = tuple[str, int, int]  # kind, microbatch, chunk


def _order(stages: int, chunks: int, microbatches: int, stage: int) -> list[Task]:
    """What a stage does one after the other in megatron-core's schedules (schedules.py:798 and 2093)."""
    table = [
        (m, chunk)
        for first in range(0, microbatches, stages if chunks > 1 else microbatches)
        for chunk in range(chunks)
        for m in range(first, min(microbatches, first + (stages if chunks > 1 else microbatches)))
    ]
    forwards: list[Task] = [("forward", m, chunk) for m, chunk in table]
    backwards: list[Task] = [("backward", m, chunks - 1 - chunk) for m, chunk in table]
    ramp = stages - 1 - stage
    warm = min(len(table), ramp if chunks == 1 else 2 * ramp + (chunks - 1) * stages)
    steady = [task for pair in zip(forwards[warm:], backwards, strict=False) for task in pair]
    return forwards[:warm] + steady + backwards[len(table) - warm :]


def _play(orders: list[list[Task]], stages: int, chunks: int, forward: float, backward: float) -> list[Lane]:
    """Every stage starts its next task as soon as it is free and its input is there."""
    done: dict[tuple[str, int, int], float] = {}  # kind, microbatch, virtual stage -> when
    spans: list[list[Span]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for p, order in enumerate(orders):
            while len(spans[p]) < len(order):
                kind, m, chunk = order[len(spans[p])]
                v = chunk * stages + p
                if kind == "forward":
                    needs = [("forward", m, v - 1)] if v else []
                else:
                    needs = [("backward", m, v + 1)] if v + 1 < stages * chunks else []
                    needs.append(("forward", m, v))
                if any(need not in done for need in needs):
                    break
                free = spans[p][-1].end if spans[p] else 0.0
                start = max([free, *(done[need] for need in needs)])
                done[kind, m, v] = start + (forward if kind == "forward" else backward)
                spans[p].append(Span(kind, start, done[kind, m, v], m))
                moved = True
    return [Lane(p, p, tuple(mine)) for p, mine in enumerate(spans)]


def read_steps(folder: Path) -> list[Step] | None:
    """The recorded steps of a run folder, oldest first; None without a file. What is not sound is left out."""
    try:
        rows = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    steps = [_step(row) for row in rows if row.strip()]
    return sorted((step for step in steps if step is not None), key=lambda step: step.step)


def _step(row: str) -> Step | None:
    try:
        line = json.loads(row)
        pipeline, microbatches = int(line["pipeline"]), int(line["microbatches"])
        lanes = [Lane(int(r["rank"]), int(r["stage"]), _spans(r["spans"])) for r in line["ranks"]]
        lanes = [lane for lane in lanes if any(s.kind in WORK for s in lane.spans)]
        if not lanes or pipeline < 1 or microbatches < 1 or not all(0 <= lane.stage < pipeline for lane in lanes):
            return None
        return Step(
            int(line["step"]),
            pipeline,
            max(1, int(line.get("virtual", 1))),
            microbatches,
            str(line.get("schedule", "1F1B")),
            int(line.get("lag", 0)),
            tuple(sorted(lanes, key=lambda lane: (lane.stage, lane.rank))),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _spans(rows: list[list[Any]]) -> tuple[Span, ...]:
    spans = [Span(str(kind), float(a), float(b), m, layer) for kind, a, b, m, layer in rows]
    return tuple(s for s in spans if s.kind in KINDS and math.isfinite(s.start) and s.start <= s.end < math.inf)
