"""`moue bench kernels`: its sizes, and that the two ways of each kernel are the same, Triton's in its interpreter.

Triton decides at import whether it interprets, so its cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moue_dist.bench.kernels.inputs import Bench
from moue_dist.bench.kernels.run import contests
from moue_dist.bench.kernels.sizes import MOST_NUMBERS, Sizes, sizes_of, small
from moue_dist.bench.timing.contest import difference, measure
from moue_dist.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
TINY = Sizes(20, 3, 32, 16, 12, 2, (((0, 4), (6, 8)), ((2, 8),)), 1500, 1.0)  # 60 rows: tiles are not full

NAMES = [name for name, _ in contests(Bench(TINY, torch.device("cpu"), torch.float32, "torch"))]


def test_sizes_are_those_of_a_rank() -> None:
    sizes = sizes_of(load_config(ROOT / "configs" / "moue_7b.yaml", ["--train.micro-batch-size", "2"]), 4)
    assert (sizes.tokens, sizes.top_k, sizes.hidden, sizes.width) == (2 * 4096, 8, 2048, 1024)
    assert (sizes.window, sizes.visible, sizes.rows) == (256, 64, 8 * 8192)
    assert sizes.layers == (((0, 64),), ((16, 80),), ((32, 96),), ((48, 112),)) and sizes.held == 112
    assert sizes.numbers == MOST_NUMBERS


def test_sizes_of_the_plain_model() -> None:
    words = ["--parallel.expert-parallel", "2", "--parallel.tensor-parallel", "2"]
    sizes = sizes_of(load_config(ROOT / "configs" / "plain_tiny.yaml", words), 1)
    config = load_config(ROOT / "configs" / "plain_tiny.yaml", [])
    assert sizes.tokens == config.train.micro_batch_size * config.model.sequence_length // 2
    assert sizes.layers == (((0, config.moe.pool // config.moe_layers // 2),),)
    assert sizes.numbers == config.moe.pool * 3 * config.model.hidden_size * config.moe.expert_width // 4


def test_small_sizes_keep_what_makes_a_difference() -> None:
    sizes = small(sizes_of(load_config(ROOT / "configs" / "moue_7b.yaml", []), 4))
    assert sizes.held == 8 and sizes.visible == 6 and len(sizes.layers) == 2 and sizes.expert_ranks == 2
    assert max(sizes.tokens, sizes.hidden, sizes.width) <= 96 and sizes.rows == 3 * 96


@pytest.mark.parametrize(
    "name", [name for name, _ in contests(Bench(TINY, torch.device("cpu"), torch.float32, "torch"))]
)
def test_both_ways_are_the_same(name: str) -> None:
    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    for sizes in (TINY, replace(TINY, expert_ranks=1, layers=(((0, 12),),), top_k=1)):
        bench = Bench(sizes, torch.device("cpu"), torch.float32, "torch")
        make = dict(contests(bench)).get(name)
        if make is not None:  # the layers are in a name
            found = measure(make(), 1, bench.device)
            assert found["agree"] and len(found["ways"]) == 2, found


def test_triton_kernels_are_the_same() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cpu.bench.test_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "17 contests" in done.stdout, done.stdout + done.stderr


def main() -> None:
    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    from triton.runtime import interpreter

    from tests.cpu.kernels.test_experts import LenientInt

    interpreter.int = LenientInt("int", (), {})
    bench = Bench(TINY, torch.device("cpu"), torch.float32, "triton")
    held = 0
    for name, make in contests(bench):
        contest = make()
        first, *others = [list(way()) for way in contest.ways.values()]
        for other in others:
            far = difference(other, first)
            assert far <= (contest.tolerance or 0.0), f"{name}: {far}"
        held += 1
    print(f"{held} contests")


if __name__ == "__main__":
    main()
