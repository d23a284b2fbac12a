"""A rank killed while stages exchange tokens ends the whole job soon, by name, and the newest checkpoint goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks.spawn import ROOT

PATIENCE = 240.0  # seconds for a start on a busy machine
SOON = 60.0  # seconds in which a job must have ended


def command(folder: Path, world: int, ep: int, steps: int, *more: str) -> list[str]:
    options = {
        "name": "run",
        "output": folder,
        "parallel.placement": "home",
        "parallel.pipeline_parallel": 2,
        "parallel.expert_parallel": ep,
        "model.hidden_size": 32,
        "model.sequence_length": 32,
        "moe.expert_width": 16,
        "train.steps": steps,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 1,
        "train.eval_interval": 0,
        "train.eval_batches": 1,
        "train.save_interval": 3,
        "data.max_megabytes": 0.3,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "moue_dist", "train", "configs/tiny.yaml", "--nproc", str(world), *words, *more]


def lines(folder: Path, kind: str) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def rank_process(job: psutil.Process, rank: int) -> psutil.Process:
    """The process of a rank: of those with its number, the one that the others descend from."""
    found = []
    for process in job.children(recursive=True):
        try:
            if process.environ().get("RANK") == str(rank):
                found.append(process)
        except psutil.Error:
            continue
    pids = {p.pid for p in found}
    (chosen,) = [p for p in found if p.ppid() not in pids]
    return chosen


@pytest.mark.parametrize(("world", "ep", "victim"), [(2, 1, 1), (4, 2, 2)])
def test_a_killed_rank_ends_the_job_and_the_newest_checkpoint_goes_on(
    world: int, ep: int, victim: int, tmp_path: Path
) -> None:
    with (tmp_path / "err").open("w") as err, (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(command(tmp_path, world, ep, 100_000), cwd=ROOT, stdout=out, stderr=err)
    try:
        everyone = _kill_one(psutil.Process(job.pid), tmp_path, victim)
        killed = time.monotonic()
        code = job.wait(timeout=SOON)
        took = time.monotonic() - killed
    finally:
        job.kill()
        job.wait()
    said = (tmp_path / "err").read_text()
    assert code == 128 + signal.SIGKILL, said
    assert took < SOON
    assert f"rank {victim} of {world} ended" in said.splitlines()[-1], said
    gone, left = psutil.wait_procs(everyone, timeout=5)
    assert not left and len(gone) >= world

    saved = int((tmp_path / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert saved >= 3 and saved % 3 == 0
    steps = saved + 2
    again = command(tmp_path, world, ep, steps, "--parallel.replace_interval", "1")
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / f'step_{saved:08d}'}" in done.stdout
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train] == list(range(1, steps + 1))
    assert train[-1]["loss"] < train[0]["loss"] + 0.5
    moves = [line for line in lines(tmp_path, "event") if "placed the pool anew" in line["what"]]
    assert [line["step"] for line in moves] == [saved + 1]


def _kill_one(job: psutil.Process, folder: Path, victim: int) -> list[psutil.Process]:
    """Kill a rank at a random moment of the steps after the first checkpoint; returns all processes of the job."""
    end = time.monotonic() + PATIENCE
    while not lines(folder, "event"):
        assert job.is_running() and job.status() != psutil.STATUS_ZOMBIE, (folder / "err").read_text()
        assert time.monotonic() < end, "no checkpoint was saved"
        time.sleep(0.05)
    began = lines(folder, "train")[-1]["step"]
    while lines(folder, "train")[-1]["step"] == began:
        time.sleep(0.01)
    time.sleep(random.random())
    everyone = job.children(recursive=True)
    rank_process(job, victim).kill()
    return everyone
