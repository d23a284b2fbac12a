"""Ranks for tests: gloo processes that start once and run many cases.

    pool = RankPool(4)                      # nothing starts yet
    results = pool.run(losses, layout="pp2")    # losses(layout="pp2") in every rank; a list, one entry per rank
    pool.run(other_case)                    # the same four processes

The function and what it returns are pickled: functions stand at module level, tensors come back as copies. Inside, the
default process group is up (`torch.distributed.get_rank()`). The first rank that fails ends the others, its traceback
is raised here, and the next `run` starts fresh processes. Ranks die with the test process, however it ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0  # the first start imports torch and megatron-core


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time. `rank` is the first that did."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class RankPool:
    """`world` gloo ranks on this machine, started at the first `run` and kept until a failure or `close`."""

    def __init__(self, world: int, timeout: float = 120.0) -> None:
        """`timeout` is in seconds, for one `run`."""
        self.world = world
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Result], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Result]:
        """Calls fn(*args, **kwargs) in every rank and returns their results in rank order; raises RankFailure."""
        if not self._processes:
            self._start()
        task = pickle.dumps((fn, args, kwargs))
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(task)
                except OSError:
                    raise RankFailure(rank, f"rank {rank} of {self.world} had ended before the run") from None
            return self._collect(getattr(fn, "__name__", repr(fn)), self.timeout if timeout is None else timeout)
        except BaseException:  # Ctrl-C too: ranks that are half-way through a case are of no more use
            self._kill()
            raise

    def close(self) -> None:
        """Ends the ranks; the pool can be used again."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        end = time.monotonic() + 5
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self._kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = _context()
        self._folder = tempfile.TemporaryDirectory(prefix="moue-ranks-")
        port = _free_port()
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            worker = (rank, self.world, f"{self._folder.name}/store", port, START_SECONDS + self.timeout, theirs)
            process = context.Process(target=_serve, args=worker, name=f"rank {rank}", daemon=True)
            with _importable():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        try:
            self._collect("start", START_SECONDS)
        except BaseException:
            self._kill()
            raise

    def _collect(self, what: str, timeout: float) -> list[Any]:
        """One answer from every rank, or RankFailure for the first that fails."""
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(results) < self.world:
            waiting = {self._pipes[r]: r for r in range(self.world) if r not in results}
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                self._dump_stacks(list(waiting.values()))
                late = min(waiting.values())
                raise RankFailure(late, f"{what}: ranks {sorted(waiting.values())} gave no answer in {timeout:g} s")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    good, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    raise RankFailure(rank, f"{what}: rank {rank} of {self.world} died with exit code {code}") from None
                if not good:
                    raise RankFailure(rank, f"{what}: rank {rank} of {self.world} failed\n{results[rank]}")
        return [results[rank] for rank in range(self.world)]

    def _dump_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            print(f"--- stack of rank {rank}, which gave no answer", file=sys.stderr, flush=True)
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
                time.sleep(0.3)  # the rank prints it itself: one after the other

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def run_ranks(fn: Callable[..., Result], world: int, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Result]:
    """Runs fn(*args, **kwargs) once in `world` fresh ranks; for many cases keep a RankPool."""
    with RankPool(world, timeout) as pool:
        return pool.run(fn, *args, **kwargs)


def _serve(rank: int, world: int, store: str, port: int, timeout: float, pipe: Connection) -> None:
    """A rank's life: join the group, then answer tasks until an empty one or the end of the test process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        pipe.send_bytes(pickle.dumps((True, None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    try:
        while task := pipe.recv_bytes():
            pipe.send_bytes(_answer(task))
    except EOFError:  # the test process is gone
        return
    dist.destroy_process_group()


def _end_with_parent() -> None:
    """Ends this rank with the test process, even out of a collective that hangs."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _answer(task: bytes) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(task)
        return pickle.dumps((True, fn(*args, **kwargs)))
    except BaseException:  # SystemExit as well: it would leave the parent waiting
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        gc.collect()  # a case's process groups keep polling threads until the cycles they hang in are collected


def _context() -> Any:
    """Forks ranks from a server that has imported torch and megatron-core; spawns them where a GPU may be in use."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling small fusions costs minutes of start-up
    if Path("/dev/nvidiactl").exists():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.preload"])
    return context


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """PYTHONPATH for what starts inside: the fork server does not get this process's sys.path. Tests that start other
    programs get the environment as it was."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
