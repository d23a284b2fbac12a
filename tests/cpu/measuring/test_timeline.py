"""The recorder of spans: what it costs when off, what it keeps when on, and a real run of two pipeline stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moue_dist.config import Config, DataConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moue_dist.config.load import dump_config
from moue_dist.measuring.slots import Step, ideal_bubble, mean_times, read_steps, shares
from moue_dist.measuring.slots import bubble as measured_bubble
from moue_dist.parallel.recording.spans import KINDS, Span
from moue_dist.parallel.recording.timeline import OFF, HostClock, Timeline, clock_of

ROOT = Path(__file__).resolve().parents[3]


class Ticks:
    """A clock that moves by one second per mark."""

    def __init__(self) -> None:
        self.at, self.settled = -1.0, 0

    def mark(self) -> float:
        self.at += 1
        return self.at

    def settle(self) -> None:
        self.settled += 1

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_off_hands_out_one_shared_context_and_takes_no_mark() -> None:
    clock = Ticks()
    for timeline in (Timeline(False, clock), Timeline(True, clock), OFF):
        assert timeline.span("forward", 1) is timeline.span("transfer") is OFF.span("serve")
        with timeline.span("forward"):
            pass
    off = Timeline(False, clock)
    off.begin_step()
    assert not off.recording and off.finish_step(1) == [] and off.gather() == [[]]
    assert clock.at == -1 and clock.settled == 0


def test_spans_nest_and_come_in_order_of_their_starts() -> None:
    clock = Ticks()
    timeline = Timeline(True, clock)
    timeline.begin_step()  # zero is tick 0
    with timeline.span("forward", microbatch=3):
        with timeline.span("transfer", layer=2):
            pass
    with timeline.span("optimizer"):
        pass
    settled = clock.settled
    spans = timeline.finish_step(7)
    assert clock.settled == settled + 1  # one wait, after the step
    assert spans == [Span("forward", 1, 4, 3), Span("transfer", 2, 3, None, 2), Span("optimizer", 5, 6)]
    assert timeline.gather() == [spans]
    assert not timeline.recording and timeline.finish_step(8) == []


def test_a_step_that_broke_off_leaves_nothing_behind() -> None:
    timeline = Timeline(True, Ticks())
    timeline.begin_step()
    with pytest.raises(ValueError), timeline.span("forward"):
        raise ValueError
    timeline.begin_step()
    with timeline.span("backward", 0):
        pass
    assert [s.kind for s in timeline.finish_step(1)] == ["backward"]


def test_the_host_clock_measures_on_cpu() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    a = clock.mark()
    assert 0 <= clock.seconds(a, clock.mark()) < 1


SMALL = Config(
    name="slots",
    model=ModelConfig(layers=2, hidden_size=16, heads=2, sequence_length=16),
    moe=MoEConfig(pool=8, top_k=2, expert_width=16, topology="rotational", window=4, stride=4, router="universal"),
    parallel=ParallelConfig(pipeline_parallel=2),
    train=TrainConfig(
        steps=8, global_batch_size=5, micro_batch_size=1, eval_interval=7, eval_batches=1, record_slots=True
    ),
    data=DataConfig(source=str(ROOT / "moue_dist" / "config" / "options.py")),
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two gloo ranks, started as a user starts it."""
    folder = tmp_path_factory.mktemp("slots")
    (folder / "config.yaml").write_text(dump_config(SMALL))
    command = [sys.executable, "-m", "moue_dist", "train", str(folder / "config.yaml"), "--output", str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder / "slots"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.json").read_text().splitlines()]


def test_a_run_records_early_steps_those_before_a_validation_and_the_last(run_folder: Path) -> None:
    recorded = lines(run_folder)
    assert [line["step"] for line in recorded] == [3, 4, 5, 7, 8]
    for line in recorded:
        assert (line["pipeline"], line["microbatches"], line["schedule"]) == (2, 5, "1F1B")
        assert [(rank["rank"], rank["stage"]) for rank in line["ranks"]] == [(0, 0), (1, 1)]


def test_every_microbatch_passes_every_stage_once_each_way_in_order(run_folder: Path) -> None:
    for line in lines(run_folder):
        start: dict[tuple[str, int, int], float] = {}
        end: dict[tuple[str, int, int], float] = {}
        for rank in line["ranks"]:
            spans = [Span(*row) for row in rank["spans"]]
            assert {s.kind for s in spans} == set(KINDS) - {"serve"}
            assert all(0 <= s.start <= s.end for s in spans)
            for kind in ("forward", "backward"):
                mine = [s for s in spans if s.kind == kind]
                assert [s.microbatch for s in mine] == list(range(5))
                for s in mine:
                    start[kind, rank["stage"], s.microbatch], end[kind, rank["stage"], s.microbatch] = s.start, s.end
            assert max(s.end for s in spans if s.kind == "backward") <= min(
                s.start for s in spans if s.kind == "optimizer"
            )
        slack = 0.05  # seconds between the ranks' zeros, on a busy machine
        for m in range(5):
            assert start["forward", 1, m] >= end["forward", 0, m] - slack
            assert start["backward", 0, m] >= end["backward", 1, m] - slack


def test_the_report_draws_the_run_and_tells_both_bubbles(run_folder: Path) -> None:
    steps = read_steps(run_folder)
    assert steps is not None and len(steps) == 5
    step = steps[-1]
    assert isinstance(step, Step) and 0 < measured_bubble(step) < 1
    total = shares(step.lanes[0], step.start, step.end).total
    assert total == pytest.approx(step.end - step.start)
    assert all(t > 0 for t in mean_times(step))
    page = (run_folder / "report.html").read_text()
    assert "The pipeline over time" in page
    assert f"(PP-1)/(M+PP-1) = 1/6 = {100 * ideal_bubble(2, 5):.1f}%" in page
    assert f"Bubble measured {100 * measured_bubble(step):.1f}%" in page
