"""The job scripts on a real Slurm cluster of two nodes: to the checkpoint, and on from it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240  # four ranks that import megatron-core on a small machine


def steps(run: Path) -> list[int]:
    """The finished steps in the order in which they were written."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["step"] for line in lines if line["kind"] == "train"]


def saved(run: Path) -> int:
    """The step that checkpoints/latest stands for; 0 if there is none."""
    latest = run / "checkpoints/latest"
    if not latest.exists():
        return 0
    text = latest.read_text().strip() if latest.is_file() else latest.resolve().name
    return int(text.rpartition("_")[2])


def test_srun_starts_ranks_without_torchrun(cluster: Cluster, tmp_path: Path) -> None:
    program = (sys.executable, "-m", "tests.ranks.program", "sum", str(tmp_path))
    cluster.call("srun", "-N2", "--ntasks-per-node=2", *program, cwd=ROOT)
    assert [(tmp_path / f"sum{rank}").read_text() for rank in range(4)] == ["6"] * 4
    assert {(tmp_path / f"rank{rank}").read_text().split()[1] for rank in range(4)} == {"slurm"}


def test_large_job_is_accepted(cluster: Cluster) -> None:
    said = cluster.call("sbatch", "--test-only", "slurm/moue_7b.sh", cwd=ROOT)
    assert "node[1-2]" in said
    said = cluster.call("sbatch", "--test-only", "--gpus-per-node=9", "slurm/moue_7b.sh", cwd=ROOT, check=False)
    assert "node[1-2]" not in said  # the nodes have eight: the answer above means something


@pytest.mark.timeout(5 * START_SECONDS)
def test_job_trains_to_its_checkpoint_and_goes_on_from_it(cluster: Cluster, tmp_path: Path) -> None:
    log, run = tmp_path / "job.log", tmp_path / "slurm_debug"

    def submit(last: int) -> str:
        options = ("--train.steps", str(last), "--train.save-interval", "2", "--train.eval-interval", "0")
        place = ("--output", str(tmp_path), "--name", "slurm_debug", "--data.max-megabytes", "1")
        return cluster.submit(f"--output={log}", "slurm/debug.sh", *options, *place, cwd=ROOT)

    # Requeued half-way: Slurm starts it again and it goes on.
    job = submit(14)
    end = time.monotonic() + START_SECONDS
    while saved(run) < 2:
        assert time.monotonic() < end and cluster.state(job) in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.1)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait(job, 2 * START_SECONDS) == "COMPLETED", log.read_text()
    assert f"job {job}, start 1," in log.read_text()
    assert saved(run) == 14
    after = steps(run)
    assert after[-1] == 14 and set(after) == set(range(1, 15))
    assert after.count(1) == 1, "the requeued job began from the start"

    # Submitted again with more to do: it goes on once more.
    job = submit(16)
    assert cluster.wait(job, START_SECONDS) == "COMPLETED", log.read_text()
    assert saved(run) == 16
    assert steps(run)[len(after) :] == [15, 16]
