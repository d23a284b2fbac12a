"""The backend that plays all other ranks: every collective gives what it would if they held the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moue_dist.parallel.rehearsal import Link, rehearse

ROOT = Path(__file__).resolve().parents[3]


def test_a_transfer_takes_its_latency_and_its_bytes():
    link = Link(bytes_per_second=100e9, latency=1e-5)
    assert link.seconds(1e6) == pytest.approx(2e-5)
    assert link.seconds(0) == 0, "a group of one has no way to go"
    # What the defaults stand for: NCCL's all-to-all between two H200s, megabytes out of a GPU in milliseconds.
    for megabytes, milliseconds in ((33.5, 0.178), (120.6, 0.504), (268.4, 1.036)):
        assert Link().seconds(megabytes * 1e6) * 1e3 == pytest.approx(milliseconds, rel=0.1)


def echoes() -> None:
    """In a process of its own, since it takes torch.distributed: rank 2 of 4."""
    with rehearse(2, 4, Link()):
        assert (dist.get_rank(), dist.get_world_size()) == (2, 4)
        pair = dist.new_group([2, 3])
        assert (dist.get_rank(pair), pair.size(), dist.get_process_group_ranks(pair)) == (0, 2, [2, 3])
        x = torch.arange(4.0)

        out = torch.zeros(4)
        dist.all_to_all_single(out, x)
        assert out.tolist() == [0, 1, 2, 3]
        out = torch.full((3,), 9.0)
        dist.all_to_all_single(out, x[:2], [1, 2], [1, 1], group=pair)  # more comes than goes: the rest is zero
        assert out.tolist() == [0, 1, 0]

        total = x.clone()
        dist.all_reduce(total)
        assert total.tolist() == [0, 1, 2, 3]
        gathered = torch.zeros(8)
        dist.all_gather_into_tensor(gathered, x, group=pair)
        assert gathered.tolist() == [0, 1, 2, 3] * 2
        part = torch.zeros(1)
        dist.reduce_scatter_tensor(part, x)
        assert part.tolist() == [2], "rank 2's part"
        parts = [torch.zeros(4) for _ in range(4)]
        dist.all_gather(parts, x)
        assert all(p.tolist() == [0, 1, 2, 3] for p in parts)
        said = [None] * 4
        dist.all_gather_object(said, {"rank": 2})
        assert said == [{"rank": 2}] * 4

        got = torch.zeros(1000)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1), dist.P2POp(dist.irecv, got, 3)]):
            work.wait()
        assert 0.8 < got.std() < 1.2, "what neighbours send is random and of ordinary size"
        dist.barrier()
        dist.destroy_process_group(pair)
    assert not dist.is_initialized()
    print("done")


def test_every_collective_is_echoed():
    command = [sys.executable, "-c", "from tests.cpu.parallel.test_rehearsal import echoes; echoes()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stdout + done.stderr
