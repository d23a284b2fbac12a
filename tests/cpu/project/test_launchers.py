"""How processes come to be: the environment read, and ranks started for real on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moue_dist.config import ConfigError
from moue_dist.launchers.env import expand_hosts, read_env, slurm_port
from moue_dist.launchers.local import launch_module
from moue_dist.launchers.slurm import plan_node

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NODELIST": "gpu[09-10]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "b", "MASTER_PORT": "23456",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "c"}


def place(environ: dict[str, str]) -> tuple[object, ...]:
    e = read_env(environ)
    return e.rank, e.world_size, e.local_rank, e.local_world_size, e.master_addr, e.source


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0, 1, "127.0.0.1", "single")),
        ({**TORCHRUN, "MASTER_PORT": "29500"}, (5, 8, 1, 4, "a", "torchrun")),
        ({**TORCHRUN, "MASTER_PORT": "29500", **SRUN}, (5, 8, 1, 4, "a", "torchrun")),  # torchrun in a Slurm task
        (SRUN, (3, 4, 1, 2, "gpu09", "slurm")),
        ({**SRUN, "MASTER_ADDR": "ib-gpu09"}, (3, 4, 1, 2, "ib-gpu09", "slurm")),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu10,gpu12"}, (3, 4, 1, 2, "gpu10", "slurm")),
        # The batch script itself has SLURM_PROCID=0 and the job's SLURM_NTASKS, but is no rank.
        ({k: v for k, v in SRUN.items() if "STEP" not in k}, (0, 1, 0, 1, "127.0.0.1", "single")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1, "127.0.0.1", "single")),  # srun --pty bash
        (OPENMPI, (2, 4, 2, 4, "b", "mpi")),
        ({**OPENMPI, **SRUN, "MASTER_ADDR": "b"}, (2, 4, 2, 4, "b", "mpi")),  # mpirun starts its daemons with srun
        ({**MPICH, "MASTER_PORT": "23456"}, (1, 2, 0, 1, "c", "mpi")),
        ({**SRUN, "PMI_RANK": "3"}, (3, 4, 1, 2, "gpu09", "slurm")),  # srun --mpi=pmi2
    ],
)
def test_place_of_a_process(environ: dict[str, str], expected: tuple[object, ...]) -> None:
    assert place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"),
        (TORCHRUN, "without MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "29500", "WORLD_SIZE": "5"}, "contradicts itself"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}, "no SLURM_JOB_NODELIST"),
        ({k: v for k, v in OPENMPI.items() if k != "MASTER_PORT"}, "moue_dist.launchers.mpi"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "moue_dist.launchers.mpi"),
    ],
)
def test_half_set_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_env(environ)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("node[1-3,7],gpu-a[01-04]", ["node1", "node2", "node3", "node7", *(f"gpu-a0{i}" for i in range(1, 5))]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("a,b[2]", ["a", "b2"]),
    ],
)
def test_host_list(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=8, unique=True), st.integers(1, 4))
def test_host_list_keeps_order_and_padding(numbers: list[int], width: int) -> None:
    names = [str(n).zfill(width) for n in numbers]
    assert expand_hosts(f"x[{','.join(names)}]y,z") == [*(f"x{n}y" for n in names), "z"]


@pytest.mark.parametrize("nodelist", ["", "n[", "n[1-", "n[]", "n[3-1]", "n[a]", "a,,b", ",a", "a b", "n[1,]"])
def test_bad_host_list(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="host list"):
        expand_hosts(nodelist)


def test_port_follows_from_the_job() -> None:
    port = slurm_port({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"})
    assert port == slurm_port({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"})
    assert port != slurm_port({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1"})
    ports = {slurm_port({"SLURM_JOB_ID": str(job)}) for job in range(99_990, 100_010)}
    assert len(ports) == 20 and all(1024 < p < 32768 for p in ports)
    assert slurm_port({"SLURM_JOB_ID": "1", "MASTER_PORT": "777"}) == 777


def test_one_node_of_a_slurm_job() -> None:
    nodes, ranks, rest = plan_node(["--nproc-per-node", "8", "train", "c.yaml", "--train.steps", "1"], SRUN)
    assert (nodes.count, nodes.rank, ranks) == (2, 1, 8)
    assert nodes.endpoint == f"gpu09:{slurm_port(SRUN)}"
    assert rest == ["train", "c.yaml", "--train.steps", "1"]
    assert plan_node(["train", "c.yaml"], {**SRUN, "SLURM_GPUS_ON_NODE": "4"})[1] == 4
    for bad in (["train", "c.yaml"], ["--nproc-per-node"], ["--nproc-per-node", "0", "train"]):
        with pytest.raises(ConfigError, match="--nproc-per-node"):
            plan_node(bad, SRUN)
    with pytest.raises(ConfigError, match="inside a Slurm job"):
        plan_node(["--nproc-per-node", "8", "train", "c.yaml"], {})


def test_ranks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and put back what the launcher sets
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch_module("tests.ranks.program", ["sum", str(tmp_path)], 3) == 0
    assert [(tmp_path / f"sum{r}").read_text() for r in range(3)] == ["3", "3", "3"]
    _, source, threads = (tmp_path / "rank0").read_text().split()
    assert source == "torchrun" and int(threads) == max(1, len(os.sched_getaffinity(0)) // 3)


LAUNCH = "import sys; from moue_dist.launchers.local import *; sys.exit(launch_module('tests.ranks.program', %r, 2))"


def started(action: str, folder: Path) -> subprocess.Popen[str]:
    """A launcher in a process of its own, once both of its ranks have a helper."""
    script = LAUNCH % [action, str(folder)]
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not all((folder / f"helper{r}").exists() for r in (0, 1)) and launcher.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return launcher


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(folder: Path, *kinds: str) -> None:
    pids = [int(file.read_text().split()[0]) for kind in kinds for file in folder.glob(f"{kind}?")]
    assert len(pids) == 2 * len(kinds)
    end = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "a process outlived its launcher"
        time.sleep(0.05)


def test_a_failed_rank_ends_the_others(tmp_path: Path) -> None:
    launcher = started("fail", tmp_path)
    _, error = launcher.communicate(timeout=120)
    assert launcher.returncode == 5
    assert error == "rank 1 gives up\nrank 1 of 2 ended with exit code 5; others were stopped\n"
    assert_gone(tmp_path, "rank", "helper")


@pytest.mark.parametrize("times", [1, 2], ids=["once", "impatient"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(tmp_path: Path, sent: signal.Signals, times: int) -> None:
    launcher = started("wait", tmp_path)
    for _ in range(times):
        launcher.send_signal(sent)
        time.sleep(0.02)
    _, error = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + sent
    assert error == ""
    assert_gone(tmp_path, "rank", "helper")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    launcher = started("wait", tmp_path)
    launcher.kill()
    launcher.wait()
    assert_gone(tmp_path, "rank")
    for file in tmp_path.glob("helper?"):  # no one is left who could
        os.kill(int(file.read_text()), signal.SIGKILL)
    launcher.communicate()


def test_ranks_that_mpirun_starts(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not mpirun or not importlib.util.find_spec("mpi4py"):
        pytest.skip("needs mpirun and mpi4py (the dev extra has both)")
    script = (
        "import sys, types; cli = types.ModuleType('moue_dist.cli'); from tests.ranks.program import main;"
        "cli.main = main; sys.modules['moue_dist.cli'] = cli; from moue_dist.launchers import mpi;"
        f"sys.exit(mpi.main([sys.argv[1], {str(tmp_path)!r}]))"
    )
    base = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable, "-c", script]
    done = subprocess.run([*base, "sum"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"sum{r}").read_text() for r in range(3)] == ["3", "3", "3"]
    done = subprocess.run([*base, "fail"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5, done.stderr  # and the two that wait are ended at once


def test_mpi_launcher_without_mpi4py_says_what_to_install() -> None:
    script = "import sys; sys.modules['mpi4py'] = None; from moue_dist.launchers.mpi import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install mpi4py" in done.stderr and "Traceback" not in done.stderr
