"""One task per node in, one torchrun per node out: what the scripts in `slurm/` put under srun.

    srun --ntasks-per-node=1 python -m moue_dist.launchers.slurm --nproc-per-node 8 train configs/moue_7b.yaml

Each task runs torchrun's agent of its node. The ranks meet at the first host of the job's list, on a port that follows
from the job's number, and are counted in the list's order, so that neighbours in rank are neighbours in place. `srun`
with one task per rank needs nothing of this: `srun -n 16 python -m moue_dist train CONFIG`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from moue_dist.config import ConfigError
from moue_dist.launchers.env import gpus_on_node, slurm_host, slurm_job, slurm_node_rank, slurm_nodes, slurm_port
from moue_dist.launchers.local import Nodes, launch_module

USAGE = "usage: srun ... python -m moue_dist.launchers.slurm [--nproc-per-node N] train CONFIG [OPTIONS]"


def plan_node(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[Nodes, int, list[str]]:
    """This node's place, its number of ranks (default: its GPUs) and their arguments; ConfigError if one is missing."""
    rest = list(argv)
    ranks = gpus_on_node(environ)
    if rest[:1] == ["--nproc-per-node"]:
        if len(rest) < 2 or not rest[1].isdigit() or int(rest[1]) < 1:
            raise ConfigError(f"--nproc-per-node wants a number of ranks\n{USAGE}")
        ranks, rest = int(rest[1]), rest[2:]
    if not rest:
        raise ConfigError(USAGE)
    if not ranks:
        raise ConfigError("Slurm gave this job no GPU: say how many ranks a node runs with --nproc-per-node N")
    endpoint = f"{slurm_host(environ)}:{slurm_port(environ)}"
    nodes = Nodes(len(slurm_nodes(environ)), slurm_node_rank(environ), endpoint, slurm_job(environ))
    return nodes, ranks, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this node's ranks; returns their exit code."""
    try:
        nodes, ranks, rest = plan_node(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return launch_module("moue_dist", rest, ranks, nodes)


if __name__ == "__main__":
    raise SystemExit(main())
