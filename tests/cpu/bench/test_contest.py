"""Several ways of one thing: held against each other, timed in turns, shown."""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moue_dist.bench.record.contest_table import show_contests, spread
from moue_dist.bench.timing import contest
from moue_dist.bench.timing.contest import MOST_CALLS, Contest, difference, measure

CPU = torch.device("cpu")


def way(value: float, seconds: float = 0.0, log: list[Any] | None = None) -> Callable[[], Sequence[Tensor]]:
    def do() -> Sequence[Tensor]:
        if log is not None:
            log.append((value, gc.isenabled()))
        time.sleep(seconds)
        return [torch.tensor([3.0, value])]

    return do


def test_ways_are_timed_in_turns_without_garbage_collection() -> None:
    log: list[Any] = []
    ends: list[int] = []
    two = Contest({"a": way(4, 0.004, log), "b": way(4, 0.001, log)}, 0.0, calls=2, after=lambda: ends.append(1))
    found = measure(two, 3, CPU)
    a, b = found["ways"]["a"], found["ways"]["b"]
    assert len(a["ms_all"]) == len(b["ms_all"]) == 3 and a["ms"] == sorted(a["ms_all"])[1]
    assert a["ms"] >= 4.0 and b["ms"] >= 1.0 and b["ratio"] == pytest.approx(b["ms"] / a["ms"]) and "ratio" not in a
    timed = [entry for entry in log if not entry[1]]
    assert len(timed) == 3 * 2 * 2 and gc.isenabled()
    assert len(ends) == 2 + 2 * 2 + 3 * 2, "once after each check, warm-up and sample, not after each call"


def test_the_order_of_a_sample_alternates() -> None:
    log: list[Any] = []
    measure(Contest({"a": way(1, 0, log), "b": way(2, 0, log)}, None, calls=1), 3, CPU)
    assert [value for value, collecting in log if not collecting] == [1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize(("calls", "wanted"), [(1, 1), (7, 7), (None, MOST_CALLS)])
def test_a_sample_is_divided_by_its_calls(calls: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts calls, each of a microsecond: of short ways there are as many as may be."""
    log: list[Any] = []

    class Counting:
        def mark(self) -> int:
            return len(log)

        def settle(self) -> None:
            pass

        def seconds(self, start: int, end: int) -> float:
            return (end - start) * 1e-6

    monkeypatch.setattr(contest, "clock_of", lambda device: Counting())
    found = measure(Contest({"a": way(1, 0, log)}, None, calls=calls), 2, CPU)
    assert found["ways"]["a"]["ms_all"] == [0.001, 0.001]
    assert len([x for x in log if not x[1]]) == 2 * wanted


def test_a_way_that_computes_something_else_is_found() -> None:
    same = measure(Contest({"a": way(4), "b": way(4.0001)}, 1e-3, calls=1), 1, CPU)
    other = measure(Contest({"a": way(4), "b": way(4.1)}, 1e-3, calls=1), 1, CPU)
    assert same["agree"] and not other["agree"]
    assert other["ways"]["b"]["difference"] == pytest.approx(0.1 / 5, rel=1e-5)
    apart = measure(Contest({"a": way(4), "b": way(9)}, None, calls=1), 1, CPU)
    assert apart["agree"] and apart["ways"]["b"]["difference"] is None


def test_a_way_that_fails_leaves_the_others() -> None:
    def broken() -> Sequence[Tensor]:
        raise RuntimeError("no such kernel")

    found = measure(Contest({"a": way(4), "b": broken, "c": way(4)}, 0.0, calls=1), 1, CPU)
    assert list(found["ways"]) == ["a", "b", "c"] and found["ways"]["b"] == {"error": "RuntimeError: no such kernel"}
    assert found["ways"]["c"]["difference"] == 0.0 and found["agree"]


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[0.0]], [[0.0]], 0.0),
        ([[3.0, 4.0], [1.0]], [[3.0, 4.0], [2.0]], 0.5),  # the worst of several tensors
        ([[float("nan")]], [[1.0]], float("inf")),
        ([[1.0]], [[float("nan")]], float("inf")),
        ([[]], [[]], 0.0),
    ],
)
def test_difference(mine: list[list[float]], other: list[list[float]], expected: float) -> None:
    assert difference([torch.tensor(x) for x in mine], [torch.tensor(x) for x in other]) == expected


def test_difference_looks_at_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "CHUNK", 8)
    a = torch.arange(40.0).view(10, 4)
    b = a.clone()
    b[9, 3] = 0
    expected = float((a - b).norm() / b.norm())
    assert difference([a], [b]) == pytest.approx(expected)
    assert difference([torch.arange(5)], [torch.arange(5)]) == 0.0
    with pytest.raises(ValueError, match="give"):
        difference([a], [a.T])


def test_spread() -> None:
    assert spread([1, 2, 3, 4, 5]) == 0.5
    assert spread([7.0]) == 0.0


def test_the_table_names_what_is_against_what() -> None:
    ways = {
        "ours": {"ms": 1.0, "ms_all": [1.0, 1.0]},
        "loop": {"ms": 2.5, "ms_all": [2.5, 2.5], "ratio": 2.5, "difference": 1e-3},
        "other": {"ms": 0.5, "ms_all": [0.5, 0.5], "ratio": 0.5, "difference": 0.3},
        "gone": {"error": "ImportError: none"},
    }
    parts: dict[str, Any] = {
        "products": {"first": "ours", "ways": ways, "tolerance": 1e-2},
        "order": {"error": "out of memory"},
    }
    out = io.StringIO()
    run = {"what": "kernels", "parts": parts, "config": {"name": "x"}, "world": 1, "machine": {}}
    show_contests(run, Console(file=out, width=100, highlight=False))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "products 1 ±0.0% loop 2.5 ±0.0% 2.500 1.0e-03" in lines
    assert any("3.0e-01, more than 1e-02" in line for line in lines)
    assert any("gone failed ImportError: none" in line for line in lines)
    assert any(line.startswith("order failed") for line in lines)
    assert "those of ours" in " ".join(lines)
