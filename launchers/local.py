"""Ranks on this machine: `moue train` outside of torchrun, Slurm and MPI comes here to become N processes."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from moue_dist.launchers.env import set_defaults

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Nodes:
    """One node's place in a job of several: rank 0 listens at `endpoint` ("host:port") on node 0."""

    count: int
    rank: int
    endpoint: str
    job: str


def launch(config_path: str, argv: Sequence[str], nproc: int) -> int:
    """Runs `python -m moue_dist train CONFIG ARGV...` in `nproc` ranks through torchrun and waits for them.

    Returns the exit code: 0, or the first failed rank's (128 + n for signal n, as a shell has it). Ctrl-C and a
    termination signal are passed on. When one rank fails the others are ended; none outlives this process.
    """
    return launch_module("moue_dist", ["train", config_path, *argv], nproc)


def launch_module(module: str, argv: Sequence[str], nproc: int, nodes: Nodes | None = None) -> int:
    """`launch` for any module, `python -m MODULE ARGV...`, here and, with `nodes`, as one node's part of a job."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    set_defaults(nproc)
    count = nodes.count if nodes else 1
    settings = LaunchConfig(
        min_nodes=count,
        max_nodes=count,
        nproc_per_node=nproc,
        run_id=nodes.job if nodes else uuid.uuid4().hex,
        rdzv_backend="static" if nodes else "c10d",
        rdzv_endpoint=nodes.endpoint if nodes else "localhost:0",
        rdzv_configs={"rank": nodes.rank} if nodes else {},
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=None if nodes else "localhost",
    )
    command = [sys.executable, "-u", "-m", module, *argv]
    if setpriv := shutil.which("setpriv"):  # Linux ends the ranks even if this process is killed outright
        command = [setpriv, "--pdeathsig", "KILL", "--", *command]
    logging.disable(logging.ERROR)  # a failed rank has said why; no table of all ranks, no warnings on Ctrl-C
    try:
        with _nothing_left_behind():
            elastic_launch(settings, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = _culprit(error.failures)
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code != 2:  # 2: a refused configuration, already explained
            print(f"rank {rank} of {nproc * count} ended with exit code {code}; others were stopped", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval.value
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        logging.disable(logging.NOTSET)
    return 0


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Ends what the ranks leave: helpers of a rank that died, or ranks after a second Ctrl-C cut short the first.

    After a signal further ones stay ignored, for the caller is about to exit.
    """
    before = set(psutil.Process().children(recursive=True))
    handlers = {sign: signal.getsignal(sign) for sign in STOP_SIGNALS}
    _adopt_orphans(True)
    try:
        yield
        stopped = False
    except BaseException as error:
        stopped = hasattr(error, "sigval") or isinstance(error, KeyboardInterrupt)
        raise
    finally:
        with contextlib.suppress(Exception, KeyboardInterrupt):  # one that came a moment ago
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for sign in STOP_SIGNALS:
            signal.signal(sign, signal.SIG_IGN)
        while left := set(psutil.Process().children(recursive=True)) - before:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        _adopt_orphans(False)
        if not stopped:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _adopt_orphans(yes: bool) -> None:
    """Processes whose parent dies become children of this one instead of init's, where they would be lost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, int(yes), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _culprit(failures: dict[int, Any]) -> tuple[int, Any]:
    """The rank that failed first. Times are whole seconds: among equals it is one that a signal killed, since that
    takes the others along, and not one that was told to stop."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        code = item[1].exitcode
        return code == -signal.SIGTERM, code >= 0, item[1].timestamp

    return min(failures.items(), key=order)
