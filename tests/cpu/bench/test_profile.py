"""A profiled step: what is made of the profiler's events, and how it is shown."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from moue_dist.bench.record.profile_table import show_profile
from moue_dist.bench.step.profile import MOST, Event, profile_step, summary, together, union

GEMM = "void gemm_with_a_name_that_is_longer_than_any_terminal<" + "int, " * 40 + ">"
EVENTS = [  # microseconds
    Event(GEMM, 1000, 3000, 0, True),
    Event(GEMM, 4000, 5000, 0, True),
    Event("ncclDevKernel_AllGather_RING_LL", 2000, 3500, 0, True),
    Event("Memcpy DtoH (Device -> Pinned)", 5500, 5600, 0, True),
    Event("aten::item", 0, 400, 100, False),
    Event("cudaStreamSynchronize", 100, 400, 300, False),
    Event("cudaStreamSynchronize", 500, 700, 200, False),
    Event("cudaLaunchKernel", 800, 900, 100, False),
]


def test_a_gpus_numbers_are_those_of_its_kernels() -> None:
    found = summary(EVENTS, cuda=True)
    assert (found["span_ms"], found["kernels"], found["copies"]) == (4.6, 3, 1)
    assert found["busy_ms"] == pytest.approx(2.5 + 1.0 + 0.1)
    assert found["busy_without_exchange_ms"] == pytest.approx(2.0 + 1.0 + 0.1)
    assert found["table"][0] == {"name": GEMM, "count": 2, "ms": 3.0}
    assert [row["ms"] for row in found["table"]] == [3.0, 1.5, 0.1]
    assert found["waits"]["cudaStreamSynchronize"] == {"count": 2, "ms": 0.5}
    assert found["waits"]["aten::item"] == {"count": 1, "ms": 0.4}
    assert found["waits"]["cudaDeviceSynchronize"] == {"count": 0, "ms": 0.0}


def test_a_cpus_numbers_are_those_of_its_operators_without_what_they_call() -> None:
    found = summary(EVENTS, cuda=False)
    assert found["span_ms"] == 0.9
    assert {row["name"]: row["ms"] for row in found["table"]}["aten::item"] == 0.1
    assert found["busy_ms"] == pytest.approx(0.4 + 0.2 + 0.1)


def test_the_table_is_cut() -> None:
    found = summary([Event(f"kernel {i}", i, i + 1 + i / 100, 0, True) for i in range(MOST + 5)], cuda=True)
    assert len(found["table"]) == MOST and found["table"][0]["name"] == f"kernel {MOST + 4}"
    assert found["kernels"] == MOST + 5


def test_nothing_on_the_device_is_no_error() -> None:
    assert summary([], cuda=True)["span_ms"] == 0


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(0, 2), (1, 4), (6, 7)], 5), ([(6, 7), (0, 9), (1, 2)], 9), ([(0, 1), (1, 2)], 2)],
)
def test_union(intervals: list[tuple[float, float]], length: float) -> None:
    assert union(intervals) == length


def test_the_slowest_rank_is_the_one_that_computes_longest() -> None:
    """It waits least, so that its span is no longer than others'."""
    late = summary([*EVENTS, Event("adam", 6000, 9000, 0, True)], cuda=True)
    waiting = summary([*EVENTS, Event("ncclDevKernel_AllReduce", 5600, 9999, 0, True)], cuda=True)
    found = together([waiting, waiting, late, waiting], cuda=True)
    assert found["slowest"] == 2 and [rank["rank"] for rank in found["ranks"]] == [0, 2]
    assert found["busy_without_exchange_ms_by_rank"] == [3.1, 3.1, 6.1, 3.1]
    assert found["busy_ms_by_rank"][0] > found["busy_ms_by_rank"][2]
    assert len(together([late, waiting], cuda=True)["ranks"]) == 1


def test_it_is_shown_in_the_terminals_width() -> None:
    out = io.StringIO()
    entry = together([summary(EVENTS, cuda=True)], cuda=True)
    show_profile("ours", entry, Console(file=out, width=70, highlight=False))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 70
    row = next(line for line in text.splitlines() if "gemm_with" in line)
    assert "…" in row and "3.00" in row and "1500.0" in row
    assert "3 kernels, 1 copies" in text
    assert "rank 0, the slowest: span 4.6 ms, busy 3.6" in " ".join(text.split())
    assert "cudaStreamSynchronize 2 x, 0.5 ms; aten::item 1 x" in " ".join(text.split())


def test_a_step_of_this_process_is_profiled() -> None:
    from moue_dist.parallel.device import has_cuda
    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    x = torch.randn(32, 32)
    found = profile_step(lambda: (x @ x).sum().item(), None)
    (rank,) = found["ranks"]
    assert found["of"] == ("kernels" if has_cuda() else "CPU operators") and found["slowest"] == 0
    assert rank["waits"]["aten::item"]["count"] == 1
    if not has_cuda():
        assert next(row for row in rank["table"] if row["name"] == "aten::mm")["count"] == 1
    assert 0 < rank["busy_ms"] <= rank["span_ms"]
