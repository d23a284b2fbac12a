"""Who am I? Rank, world and meeting point from whatever started us; no other file reads these variables.

| started by                | read                                                                  |
|---------------------------|-----------------------------------------------------------------------|
| torchrun, `moue train`    | RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT |
| mpirun (Open MPI, MPICH)  | OMPI_COMM_WORLD_*; PMI_* with MPI_LOCALRANKID; MASTER_ADDR, MASTER_PORT |
| srun, one task per rank   | SLURM_PROCID, SLURM_STEP_*; the meeting point follows from the job      |
| anything else             | one process                                                           |

The first row that fits counts: mpirun starts its helpers with srun, and torchrun may run in a Slurm task.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moue_dist.config import ConfigError

Source = Literal["torchrun", "slurm", "mpi", "single"]
FIRST_PORT, PORTS = 20000, 10000  # below 32768, where Linux picks ports for outgoing connections


@dataclass(frozen=True)
class ProcessEnv:
    """One rank's place in the job. Rank 0 listens on master_addr:master_port."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: Source

    def as_variables(self) -> dict[str, str]:
        """The same in torchrun's variables, which torch.distributed and libraries read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def read_env(environ: Mapping[str, str] | None = None) -> ProcessEnv:
    """The place of this process, from `environ` (default: this process's). ConfigError if it is only half set."""
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _mpi(env, "Open MPI", "OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    if "PMI_RANK" in env and "MPI_LOCALRANKID" in env:
        return _mpi(env, "MPICH", "", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
    if "PMI_RANK" in env and "PMI_LOCAL_RANK" in env:
        return _mpi(env, "MPI", "PMI_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    if "SLURM_STEP_ID" in env:  # not in an sbatch script itself, which has SLURM_PROCID=0 but is no rank
        return _slurm(env)
    if "PMI_RANK" in env:
        raise ConfigError(
            "PMI_RANK is set but no local rank (MPI_LOCALRANKID or PMI_LOCAL_RANK): start the ranks with "
            "'mpirun -n N python -m moue_dist.launchers.mpi train CONFIG', which asks MPI itself"
        )
    return ProcessEnv(0, 1, 0, 1, "127.0.0.1", free_port(), "single")


def expand_hosts(nodelist: str) -> list[str]:
    """Slurm's short form as names, in order: 'node[08-10,12],gpu-a' -> node08 node09 node10 node12 gpu-a.

    Brackets may hold single numbers and ranges, padded with zeros, and may occur more than once in a name.
    """
    hosts: list[str] = []
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[0-9,-]+\])+(?:,(?:[^\[\],\s]|\[[0-9,-]+\])+)*", nodelist):
        raise ConfigError(f"'{nodelist}' is no Slurm host list such as node[1-3,7],gpu-a[01-04]")
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", nodelist):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            names = [name + end for name in names for end in ([text] if text else _numbers(numbers, nodelist))]
        hosts += names
    return hosts


def slurm_nodes(environ: Mapping[str, str] | None = None) -> list[str]:
    """Host names of this job step, or of the job where there is no step, in Slurm's order."""
    env = os.environ if environ is None else environ
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name):
            return expand_hosts(env[name])
    raise ConfigError("no SLURM_JOB_NODELIST in the environment: this must run inside a Slurm job (sbatch or srun)")


def slurm_host(environ: Mapping[str, str] | None = None) -> str:
    """Where rank 0 of a Slurm job listens: MASTER_ADDR if set (a faster network's name), else the first host."""
    env = os.environ if environ is None else environ
    return env.get("MASTER_ADDR") or slurm_nodes(env)[0]


def slurm_job(environ: Mapping[str, str] | None = None) -> str:
    """The job's number and how often it was requeued, such as '4711.0'."""
    env = os.environ if environ is None else environ
    return f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_RESTART_COUNT', '0')}"


def slurm_port(environ: Mapping[str, str] | None = None) -> int:
    """A port that follows from the job, so that every task names the same and two jobs on a node seldom collide."""
    env = os.environ if environ is None else environ
    if "MASTER_PORT" in env:
        return _integer(env, "MASTER_PORT")
    if "SLURM_JOB_ID" not in env:
        raise ConfigError("no SLURM_JOB_ID in the environment: this must run inside a Slurm job (sbatch or srun)")
    step = _integer(env, "SLURM_STEP_ID") if env.get("SLURM_STEP_ID") else 0
    return FIRST_PORT + (_integer(env, "SLURM_JOB_ID") + 499 * step) % PORTS


def slurm_node_rank(environ: Mapping[str, str] | None = None) -> int:
    """This task's node among the step's nodes, from 0."""
    return _integer(os.environ if environ is None else environ, "SLURM_NODEID")


def gpus_on_node(environ: Mapping[str, str] | None = None) -> int:
    """GPUs that Slurm gave this job on this node; 0 where it gave none."""
    return int((os.environ if environ is None else environ).get("SLURM_GPUS_ON_NODE") or 0)


def set_defaults(ranks: int) -> None:
    """Sets, unless they are set, what `ranks` processes on this machine need before they start."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def export(place: ProcessEnv) -> None:
    """Sets torchrun's variables in this process, for torch.distributed and for libraries that ask for them."""
    os.environ.update(place.as_variables())


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _torchrun(env: Mapping[str, str]) -> ProcessEnv:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in env]:
        raise ConfigError(
            f"the environment is set only in part: {', '.join(n for n in names if n in env)} without "
            f"{', '.join(missing)}; start with torchrun, or unset them to train in one process"
        )
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE"
    return _checked(env, ("RANK", "WORLD_SIZE", "LOCAL_RANK", local), env["MASTER_ADDR"], "torchrun")


def _mpi(env: Mapping[str, str], kind: str, prefix: str, names: tuple[str, str, str, str]) -> ProcessEnv:
    full = tuple(prefix + name for name in names)
    if _integer(env, full[1]) > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise ConfigError(
            f"started by {kind} without a meeting point: use 'mpirun -n N python -m moue_dist.launchers.mpi train "
            "CONFIG', or set MASTER_ADDR (rank 0's host) and MASTER_PORT for every rank"
        )
    return _checked(env, (full[0], full[1], full[2], full[3]), env.get("MASTER_ADDR", "127.0.0.1"), "mpi")


def _slurm(env: Mapping[str, str]) -> ProcessEnv:
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if env.get(size, "1") == "1":  # srun --pty bash and the like: local ranks may still be started
        return ProcessEnv(0, 1, 0, 1, "127.0.0.1", free_port(), "single")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or env[size]
    node = _integer(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    local = {**env, "tasks on this node": str(_tasks_per_node(tasks)[node])}
    host = slurm_host(env)
    local["MASTER_PORT"] = str(slurm_port(env))
    return _checked(local, ("SLURM_PROCID", size, "SLURM_LOCALID", "tasks on this node"), host, "slurm")


def _checked(env: Mapping[str, str], names: tuple[str, str, str, str], host: str, source: Source) -> ProcessEnv:
    rank, world, local, local_world = (_integer(env, name) for name in names)
    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else free_port()
    place = ProcessEnv(rank, world, local, local_world, host, port, source)
    if not (0 <= rank < world and 0 <= local < local_world <= world and 0 < port < 65536):
        raise ConfigError(f"the environment contradicts itself: {place}")
    return place


def _integer(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise ConfigError(f"{name} is not set in the environment, though its companions are")
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name}='{env[name]}' in the environment is not a whole number") from None


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """'08-10,12' -> ['08', '09', '10', '12']."""
    found: list[str] = []
    for piece in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"'{piece}' in the Slurm host list '{nodelist}' is no number and no rising range")
        found += [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def _tasks_per_node(text: str) -> list[int]:
    """'2(x3),1' -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece)
        if not match:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE='{text}' is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
