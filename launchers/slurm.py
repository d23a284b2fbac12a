"""One task per node in, one torchrun per node out: what the scripts in `slurm/` put under srun.

    srun --ntasks-per-node=1 python -m moue_dist.launchers.slurm --nproc-per-node 8 train configs/moue_7b.yaml

Each task replaces itself by this node's torchrun. The ranks meet at the first host of the job's list, on a port that
follows from the job's number, and are counted in the list's order, so that neighbours in rank are neighbours in place.
`srun` with one task per rank needs nothing of this: `srun -n 16 python -m moue_dist train CONFIG`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from moue_dist.config import ConfigError
from moue_dist.launchers.env import gpus_on_node, set_defaults, slurm_host, slurm_node_rank, slurm_nodes, slurm_port

USAGE = "usage: srun ... python -m moue_dist.launchers.slurm [--nproc-per-node N] train CONFIG [OPTIONS]"


def torchrun_command(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[list[str], int]:
    """The command line of this node's torchrun and its number of ranks; ConfigError if something is missing."""
    rest = list(argv)
    ranks = gpus_on_node(environ)
    if rest[:1] == ["--nproc-per-node"]:
        if len(rest) < 2 or not rest[1].isdigit() or rest[1] == "0":
            raise ConfigError(f"--nproc-per-node wants a number of ranks\n{USAGE}")
        ranks, rest = int(rest[1]), rest[2:]
    if not rest:
        raise ConfigError(USAGE)
    if not ranks:
        raise ConfigError("Slurm gave this job no GPU: say how many ranks a node runs with --nproc-per-node N")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(slurm_nodes(environ))}",
        f"--node-rank={slurm_node_rank(environ)}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={slurm_host(environ)}",
        f"--master-port={slurm_port(environ)}",
        "--max-restarts=0",
        "-m",
        "moue_dist",
        *rest,
    ], ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Becomes torchrun; returns only if it cannot."""
    try:
        command, ranks = torchrun_command(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_defaults(ranks)
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(main())
