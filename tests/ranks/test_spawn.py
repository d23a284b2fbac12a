"""The helper itself: results, reuse, failures, time-outs and no processes left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks.spawn import ROOT, RankFailure, RankPool, run_ranks


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def total(offset: float) -> torch.Tensor:
    x = torch.full((2,), dist.get_rank() + offset)
    dist.all_reduce(x)
    return x


def who() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()  # would wait for ever


def leave_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def test_many_cases_run_in_the_same_ranks() -> None:
    with RankPool(3) as pool:
        first = pool.run(who)
        assert [rank for rank, _ in first] == [0, 1, 2]
        for result in pool.run(total, offset=0.5):
            assert result.tolist() == [4.5, 4.5]
        assert pool.run(who) == first
    assert not any(alive(pid) for _, pid in first)


@pytest.mark.parametrize(("fn", "message"), [(fail_on, "ValueError: no luck on 1"), (leave_on, "exit code 7")])
def test_first_failure_is_raised_and_the_next_run_starts_afresh(fn: object, message: str) -> None:
    with RankPool(2) as pool:
        pids = [pid for _, pid in pool.run(who)]
        with pytest.raises(RankFailure, match=message) as failure:
            pool.run(fn, 1)  # type: ignore[arg-type]
        assert failure.value.rank == 1
        assert not any(alive(pid) for pid in pids)
        assert [rank for rank, _ in pool.run(who)] == [0, 1]


def test_time_out_names_the_late_ranks() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[1\] gave no answer in 4 s"):
        run_ranks(sleep_on, 2, 1, timeout=4)


def test_ranks_die_with_a_killed_test_process() -> None:
    script = """
from tests.ranks.spawn import RankPool
from tests.ranks.test_spawn import sleep_on, who
pool = RankPool(2)
print(*(pid for _, pid in pool.run(who)), flush=True)
pool.run(sleep_on, 0)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    end = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "a rank outlived the test process"
        time.sleep(0.05)
