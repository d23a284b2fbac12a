"""Python's garbage collector, kept out of what is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, then not until the end of the block.

    Every timed part runs in it, ours and what ours is measured against alike: a collection falls on one step or the
    other by chance. Training leaves the collector on.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
