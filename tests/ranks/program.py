"""A program for the launchers' tests: `python -m tests.ranks.program ACTION ARGS...` in every rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from moue_dist.launchers.env import export, read_env


def main(argv: list[str]) -> int:
    place = read_env()
    export(place)
    action, folder = argv[0], Path(argv[1])
    (folder / f"rank{place.rank}").write_text(f"{os.getpid()} {place.source} {os.environ.get('OMP_NUM_THREADS')}")
    if action == "sum":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", "env://", world_size=place.world_size, rank=place.rank)
        x = torch.tensor(float(place.rank))
        dist.all_reduce(x)
        (folder / f"sum{place.rank}").write_text(f"{x.item():g}")
        dist.destroy_process_group()
    if action in ("fail", "wait"):
        helper = subprocess.Popen(["sleep", "300"])  # as a checkpoint writer: outlives its rank unless someone cares
        (folder / f"helper{place.rank}").write_text(str(helper.pid))
    if action == "fail" and place.rank == 1:
        while not (folder / "helper0").exists():
            time.sleep(0.01)
        print("rank 1 gives up", file=sys.stderr, flush=True)
        os._exit(5)
    if action in ("fail", "wait"):
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(120)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
