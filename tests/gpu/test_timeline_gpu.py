"""Spans on a GPU: CUDA events of the current stream, read after the step; nothing waits inside it."""

from __future__ import annotations

import time

import pytest
import torch

from moue_dist.parallel.recording.timeline import DeviceClock, Timeline, clock_of


def test_spans_are_the_devices_time_and_not_the_hosts() -> None:
    timeline = Timeline(True, clock_of(torch.device("cuda")))
    assert isinstance(timeline._clock, DeviceClock)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    timeline.begin_step()
    began = time.perf_counter()
    with timeline.span("forward", 0):
        for _ in range(50):
            b = a @ a
        with timeline.span("transfer"):
            b = b + 1
    with timeline.span("backward", 0):
        for _ in range(50):
            b = a @ a
    host = time.perf_counter() - began  # launches only
    forward, transfer, backward = timeline.finish_step(1)
    assert (forward.kind, transfer.kind, backward.kind) == ("forward", "transfer", "backward")
    assert host < 0.5 * (backward.end - forward.start)
    assert 0 <= forward.start <= transfer.start <= transfer.end <= forward.end <= backward.start
    assert backward.end - backward.start == pytest.approx(forward.end - forward.start, rel=0.3)


def test_spans_of_two_streams_have_one_zero() -> None:
    timeline = Timeline(True, DeviceClock())
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    timeline.begin_step()
    with timeline.span("forward", 0):
        a @ a
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), timeline.span("backward", 0):
        a @ a
    forward, backward = timeline.finish_step(1)
    assert backward.start >= forward.end - 1e-4
