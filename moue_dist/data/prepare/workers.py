"""Units of work spread over processes, each with a tokenizer of its own. Free of torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from moue_dist.config import ConfigError
from moue_dist.data.prepare.shard import Found, write_shard
from moue_dist.data.prepare.sources import Unit
from moue_dist.data.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Task:
    """What all units have in common. longest: bytes of a document."""

    tokenizer: str  # bytes, or the path of a tokenizer.json
    end_mark: str  # "": the tokenizer's own
    field: str
    longest: int
    folder: str  # of the shards


_mine: tuple[Task, Tokenizer] | None = None  # of a worker: a tokenizer cannot travel with every unit


def shards(task: Task, tokenizer: Tokenizer, units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, Found]]:
    """Write the units' shards; each as it is finished. Workers end with the process that started them."""
    if workers == 1 or len(units) <= 1:  # none: all were there already
        for unit in units:
            yield unit, write_shard(unit, tokenizer, task.field, task.longest, Path(task.folder))
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(units)), mp_context=spawn, initializer=_begin, initargs=(task, os.getpid())
    )
    try:
        running: dict[Future[Found], Unit] = {}
        for unit in units:
            running[pool.submit(_shard, unit)] = unit
            if len(running) >= 2 * workers:  # a few ahead, not a million
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise ConfigError(
            f"one of {workers} workers was ended, perhaps for want of memory: call the command again, it goes on where "
            "it was; fewer --workers need less"
        ) from None
    except BaseException:
        for process in list((pool._processes or {}).values()):  # its unit may take hours; it will be done again
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[Found], Unit]) -> Iterator[tuple[Unit, Found]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=lambda future: running[future].number):
        yield running.pop(future), future.result()


def _begin(task: Task, parent: int) -> None:
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _mine = (task, open_tokenizer(task.tokenizer, task.end_mark))


def _end_with(parent: int) -> None:
    """A process that was killed cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _shard(unit: Unit) -> Found:
    assert _mine is not None
    task, tokenizer = _mine
    return write_shard(unit, tokenizer, task.field, task.longest, Path(task.folder))
