"""The arithmetic of bubbles and ideals on spans made by hand, and the figure's words."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from moue_dist.cli import main
from moue_dist.measuring.slots import (
    Lane,
    Shares,
    Step,
    bubble,
    ideal,
    ideal_bubble,
    mean_times,
    read_steps,
    shares,
)
from moue_dist.parallel.recording.spans import Span
from moue_dist.report import gantt
from moue_dist.report.html import escape
from moue_dist.report.run_report import write_run_report
from moue_dist.report.style import to_svg
from tests.cpu.report.test_report import Page, write_run

F, B, S, T, O = "forward", "backward", "serve", "transfer", "optimizer"  # noqa: E741


def lane(*spans: tuple[str, float, float], stage: int = 0) -> Lane:
    return Lane(stage, stage, tuple(Span(*s) for s in spans))


def step(*lanes: Lane, microbatches: int = 1, schedule: str = "1F1B", virtual: int = 1) -> Step:
    pipeline = len({one.stage for one in lanes})
    return Step(9, pipeline, virtual, microbatches, schedule, 0, lanes)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # Nothing but work.
        ([(F, 0, 4), (B, 4, 10)], Shares(forward=4, backward=6)),
        # A transfer inside a forward is exchange, one outside is waiting; the rest is idle.
        ([(F, 0, 4), (T, 1, 3), (T, 4, 6), (B, 7, 10)], Shares(2, 3, exchange=2, waiting=2, idle=1)),
        # Expert service counts wherever it is, without its transfers.
        ([(S, 0, 4), (T, 0, 1), (T, 3, 4), (F, 4, 10), (S, 5, 6)], Shares(forward=5, serve=3, waiting=2)),
        # Two transfers at once are one wait.
        ([(F, 0, 6), (T, 1, 4), (T, 2, 5), (B, 6, 10)], Shares(2, 4, exchange=4)),
        # Two streams: the transfer of one hides behind the other; where both work, the time is halved.
        ([(F, 0, 6), (B, 4, 10), (T, 4, 6)], Shares(forward=4 + 1, backward=4 + 1)),
        # What begins before or ends after counts within the schedule only.
        ([(F, -5, 2), (B, 2, 5), (O, 5, 20)], Shares(2, 3, optimizer=5)),
        ([], Shares(idle=10)),
    ],
)
def test_every_instant_is_in_one_state(spans: list[tuple[str, float, float]], expected: Shares) -> None:
    found = shares(lane(*spans), 0, 10)
    assert found == expected
    assert found.total == 10
    assert found.bubble == pytest.approx((expected.waiting + expected.idle) / 10)


def test_the_bubble_is_the_mean_over_lanes_of_the_whole_schedule() -> None:
    one = lane((F, 0, 2), (T, 2, 6), (B, 6, 10))
    two = lane((T, 0, 2), (F, 2, 4), (B, 4, 6), (T, 6, 8), stage=1)
    # The optimizer at the end does not lengthen the schedule.
    late = replace(one, spans=(*one.spans, Span(O, 10, 30)))
    for lanes in ((one, two), (late, two)):
        made = step(*lanes)
        assert (made.start, made.end) == (0, 10)
        assert bubble(made) == pytest.approx((4 / 10 + 6 / 10) / 2)


def test_service_to_others_shrinks_the_bubble() -> None:
    idle = lane((F, 0, 2), (T, 2, 6), (B, 6, 10))
    serving = lane((F, 0, 2), (S, 2, 6), (T, 2, 3), (B, 6, 10))
    assert bubble(step(idle)) == pytest.approx(0.4)
    assert bubble(step(serving)) == pytest.approx(0.1)


def test_mean_times_leave_out_transfers_inside_and_only_those() -> None:
    made = step(lane((F, 0, 4), (T, 1, 2), (T, 1.5, 3), (T, 4, 6), (F, 6, 8), (B, 8, 10)))
    assert mean_times(made) == (pytest.approx((2 + 2) / 2), pytest.approx(2))
    # On two streams a transfer belongs to the microbatch it names.
    spans = (Span(F, 0, 4, 1), Span(B, 0, 6, 0), Span(T, 1, 2, 0))
    assert mean_times(step(Lane(0, 0, spans))) == (4, 5)


@pytest.mark.parametrize("schedule", ["1F1B", "lock-step 1F1B"])
@pytest.mark.parametrize(
    ("pipeline", "microbatches"), [(1, 1), (1, 3), (2, 1), (2, 5), (4, 3), (4, 4), (4, 9), (8, 32)]
)
def test_the_ideal_has_the_bubble_of_the_formula(schedule: str, pipeline: int, microbatches: int) -> None:
    made = Step(1, pipeline, 1, microbatches, schedule, 0, ())
    lanes = ideal(made, 1.0, 2.0)
    assert len(lanes) == pipeline
    drawn = replace(made, lanes=tuple(lanes))
    assert bubble(drawn) == pytest.approx(ideal_bubble(pipeline, microbatches))
    assert drawn.end == pytest.approx(3.0 * (microbatches + pipeline - 1))
    for one in lanes:
        for kind in (F, B):
            assert [s.microbatch for s in one.spans if s.kind == kind] == list(range(microbatches))


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), [(2, 2, 4), (2, 3, 8), (4, 2, 8)])
def test_the_interleaved_ideal_has_a_bubble_as_much_smaller(pipeline: int, virtual: int, microbatches: int) -> None:
    made = Step(1, pipeline, virtual, microbatches, "interleaved 1F1B", 0, ())
    lanes = ideal(made, 1.0, 2.0)
    assert all(len(one.spans) == 2 * virtual * microbatches for one in lanes)
    assert bubble(replace(made, lanes=tuple(lanes))) == pytest.approx(
        ideal_bubble(pipeline, microbatches, virtual), rel=1e-6
    )


@pytest.mark.parametrize("schedule", ["1F1B", "lock-step 1F1B", "interleaved 1F1B"])
def test_the_ideal_keeps_the_order_of_stages(schedule: str) -> None:
    virtual = 2 if schedule.startswith("inter") else 1
    lanes = ideal(Step(1, 4, virtual, 8, schedule, 0, ()), 1.0, 2.0)
    for one in lanes:
        ends = 0.0
        for s in one.spans:
            assert s.start >= ends  # one thing at a time
            ends = s.end
    if virtual == 1:
        when = {(s.kind, one.stage, s.microbatch): s for one in lanes for s in one.spans}
        for m in range(8):
            for s in range(3):
                assert when[F, s + 1, m].start >= when[F, s, m].end
                assert when[B, s, m].start >= when[B, s + 1, m].end


def test_lock_step_slots_are_those_of_the_design() -> None:
    """Slot t: F of microbatch t - s, then B of t - 2 (PP - 1) + s. Two stages, two microbatches, F 1 s, B 2 s."""
    lanes = ideal(Step(1, 2, 1, 2, "lock-step 1F1B", 0, ()), 1.0, 2.0)
    assert [(s.kind, s.start, s.microbatch) for s in lanes[0].spans] == [(F, 0, 0), (F, 1, 1), (B, 5, 0), (B, 7, 1)]
    assert [(s.kind, s.start, s.microbatch) for s in lanes[1].spans] == [(F, 1, 0), (B, 2, 0), (F, 4, 1), (B, 5, 1)]


# The picture.

TWO = step(
    lane((F, 0, 0.1), (F, 0.1, 0.2), (T, 0.2, 0.4), (B, 0.4, 0.6), (T, 0.45, 0.5), (B, 0.6, 0.8), (O, 0.8, 0.9)),
    lane((T, 0, 0.1), (F, 0.1, 0.2), (S, 0.2, 0.25), (B, 0.25, 0.45), (F, 0.45, 0.55), (B, 0.55, 0.75), stage=1),
    microbatches=2,
)


def test_the_words_say_what_the_picture_shows() -> None:
    words = gantt.describe_time(TWO)
    assert "Step 9, 1F1B, 2 stages, 2 microbatches: 800 ms" in words
    # Stage 0 waits 0.2 of 0.8 s; stage 1 waits 0.1 and has nothing to do for the last 0.05.
    assert f"Bubble measured {100 * (0.25 + 0.1875) / 2:.1f}%, ideal (PP-1)/(M+PP-1) = 1/3 = 33.3%." in words
    assert "stage 0: forward 25.0%, backward 43.8%, transfers inside 6.2%, waiting for a transfer 25.0%" in words
    assert "experts for other stages 6.2%" in words.split("stage 1:")[1]


def test_the_drawing_names_lanes_kinds_and_microbatches() -> None:
    lanes = [replace(one, spans=tuple(s._replace(microbatch=5) for s in one.spans)) for one in TWO.lanes]
    named = replace(TWO, lanes=tuple(lanes))
    svg = to_svg(gantt.draw_time(named))
    text = [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
    assert text.count("stage 0") == text.count("stage 1") == 2  # measured and ideal
    assert {"forward", "backward", "experts for other stages", "idle", "milliseconds"} <= set(text)
    assert text.count("5") >= 8
    assert any("ideal: forward 100 ms, backward" in str(one) for one in text)


def test_a_lane_of_many_small_spans_stays_a_small_picture() -> None:
    spans = [(F, i * 1e-3, (i + 1) * 1e-3) for i in range(2000)]
    spans += [(T, i * 2e-4, i * 2e-4 + 1e-4) for i in range(10000)]
    assert len(to_svg(gantt.draw_time(step(lane(*spans), microbatches=2000)))) < 300_000


def test_many_ranks_are_drawn_by_the_first_of_each_stage() -> None:
    lanes = [Lane(rank, rank // 8, (Span(F, 0, 1), Span(B, 1, 2))) for rank in range(16)]
    assert [one.rank for one in gantt.shown(Step(1, 2, 1, 1, "1F1B", 0, tuple(lanes)))] == [0, 8]
    assert len(gantt.shown(Step(1, 2, 1, 1, "1F1B", 0, tuple(lanes[:8])))) == 8


def test_overlapping_forward_and_backward_share_the_lane() -> None:
    assert set(gantt._bands(lane((F, 0, 4), (B, 2, 6)), 0.01).values()) == {"upper", "lower"}
    assert set(gantt._bands(lane((F, 0, 4), (B, 4, 6)), 0.01).values()) == {"whole"}
    assert gantt.without([(0, 9), (10, 11)], [(2, 4), (3, 5), (8, 10)]) == [(0, 2), (5, 8), (10, 11)]


# In the report.


def write_slots(folder: Path, *steps: Step, tail: str = "") -> None:
    rows = []
    for one in steps:
        ranks = [{"rank": x.rank, "stage": x.stage, "spans": [list(s) for s in x.spans]} for x in one.lanes]
        line = {"step": one.step, "pipeline": one.pipeline, "microbatches": one.microbatches, "ranks": ranks}
        rows.append(json.dumps(line) + "\n")
    (folder / "timeline.json").write_text("".join(rows) + tail)


def test_the_report_has_the_section_only_with_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    title = "The pipeline over time"
    assert title not in Page(write_run_report(folder)).text
    write_slots(folder, replace(TWO, step=3), TWO)
    page = Page(write_run_report(folder))
    assert title in page.text
    assert "Bubble measured 21.9%, ideal (PP-1)/(M+PP-1) = 1/3 = 33.3%." in page.text
    assert "median of 2 recorded steps 21.9%" in page.text
    assert gantt.describe_time(TWO) in page.alternatives


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture_can_stand_alone(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_run(tmp_path / "run"), tmp_path / "new" / f"time.{kind}"
    command = ["report", str(folder), "--timeline"]
    assert main([*command, str(file)]) == 2
    assert "recorded no slots: train it with train.record_slots=true" in capsys.readouterr().err
    write_slots(folder, TWO)
    assert main([*command, str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    assert file.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<svg")
    assert main([*command, str(tmp_path / "time.pdf")]) == 2
    assert ".png or .svg" in capsys.readouterr().err
    assert main(["report", str(folder), str(folder), "--timeline", str(file)]) == 2
    assert "--timeline" in capsys.readouterr().err


def one_rank(stage: int, span: str) -> str:
    ranks = f'[{{"rank": 0, "stage": {stage}, "spans": [{span}]}}]'
    return f'{{"step": 10, "pipeline": 2, "microbatches": 1, "ranks": {ranks}}}\n'


@pytest.mark.parametrize(
    "tail",
    [
        '{"step": 10, "pipe',
        "[]\n",
        one_rank(3, '["forward", 0, 1, 0, null]'),
        one_rank(0, '["optimizer", 0, 1, 0, null]'),
        one_rank(0, '["forward", 0, NaN, 0, null]'),
        one_rank(0, '["forward", 2, 1, 0, null]'),
    ],
)
def test_lines_that_cannot_be_are_left_out(tmp_path: Path, tail: str) -> None:
    folder = write_run(tmp_path / "run")
    write_slots(folder, TWO, tail=tail)
    found = read_steps(folder)
    assert found is not None and [one.step for one in found] == [9]
    write_slots(folder, tail=tail)
    assert escape("timeline.json holds no step that can be read.") in write_run_report(folder).read_text()
