"""What the optimizer in host memory takes of a host, and what a process may use of it: cores and memory.

A container or a batch job often may use less than the machine has; the limits stand in Linux's control groups. Free of
torch where no process group is asked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")  # names a running host; container names may repeat


CHUNK = 1 << 23  # elements that travel at once: 32 MiB of gradients
STAGES = 2  # one chunk computes while the next comes in and the last goes out


def adam_bytes(elements: int, *, moment: int, weight: int) -> int:
    """Host memory of `host_adam.HostAdam` over `elements`; `moment` and `weight` are bytes of one number each.

    An fp32 master and two moments an element, and staging for a gradient and a weight of the elements in flight.
    """
    return elements * (4 + 2 * moment) + STAGES * min(elements, CHUNK) * (4 + weight)


@dataclass(frozen=True)
class HostLimits:
    """One process's view: `cores` it may run on and their number after quotas, free `memory` in bytes."""

    host: str
    cores: frozenset[int]
    quota: int
    memory: int

    @staticmethod
    def here() -> HostLimits:
        cores = frozenset(os.sched_getaffinity(0))
        groups = _control_groups()
        quota = min([len(cores), *(n for g in groups if (n := _cpu_quota(g)) is not None)])
        free = [psutil.virtual_memory().available, *(m for g in groups if (m := _free_memory(g)) is not None)]
        return HostLimits(BOOT.read_text().strip() if BOOT.exists() else "", cores, quota, min(free))


@dataclass(frozen=True)
class Fit:
    """What a rank gets: `threads` to compute with, and what its host's ranks need and have together, in bytes."""

    threads: int
    needed: int
    free: int


def divide(limits: list[HostLimits], needs: list[int]) -> list[Fit]:
    """Every rank's part, from all ranks' limits and needs of memory in bytes.

    Ranks of one host that may run on the same cores divide them. Example: two ranks on cores {0, 1, 2, 3} -> 2 threads
    each; two ranks bound to {0, 1} and {2, 3} -> 2 each, too.
    """
    fits = []
    for mine in limits:
        neighbours = [i for i, other in enumerate(limits) if other.host == mine.host]
        sharing = sum(limits[i].cores == mine.cores for i in neighbours)
        needed, free = sum(needs[i] for i in neighbours), min(limits[i].memory for i in neighbours)
        fits.append(Fit(max(1, mine.quota // sharing), needed, free))
    return fits


def agree(need: int) -> list[Fit]:
    """`divide` over the ranks of the default process group (collective), or this process alone where there is none."""
    import torch.distributed as dist

    mine = (HostLimits.here(), need)
    if not dist.is_initialized():
        return divide([mine[0]], [need])
    everyone: list[tuple[HostLimits, int]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return divide([limits for limits, _ in everyone], [n for _, n in everyone])


def _control_groups() -> list[Path]:
    """This process's control group and those above it (version 2)."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    paths = (
        [line[3:].strip("/") for line in own.read_text().splitlines() if line.startswith("0::")] if own.exists() else []
    )
    group = root / paths[0] if paths else root
    return [g for g in (group, *group.parents) if g == root or root in g.parents]


def _cpu_quota(group: Path) -> int | None:
    words = _words(group / "cpu.max")
    return -(-int(words[0]) // int(words[1])) if len(words) == 2 and words[0] != "max" else None


def _free_memory(group: Path) -> int | None:
    limit, used = _words(group / "memory.max"), _words(group / "memory.current")
    if not limit or limit[0] == "max" or not used:
        return None
    cached = next((int(w[1]) for w in _lines(group / "memory.stat") if w[0] == "inactive_file"), 0)
    return int(limit[0]) - int(used[0]) + cached  # the cache of files yields


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0] if lines else []


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return []
