"""megatron-core compiles what GPTDataset and BlendedDataset need; here it is in numpy, for wheels that lack it."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy

_HELPERS = "megatron.core.datasets.helpers_cpp"


def ensure_helpers() -> None:
    """Put the functions below where megatron-core looks for the compiled ones, unless those are there."""
    if _HELPERS in sys.modules or importlib.util.find_spec(_HELPERS) is not None:
        return
    module = types.ModuleType(_HELPERS)
    builders: dict[str, Callable[..., Any]] = {f"build_sample_idx_int{n}": sample_index for n in (32, 64)}
    builders |= {"build_blending_indices": blend, "build_exhaustive_blending_indices": blend_all}
    vars(module).update(builders)
    sys.modules[_HELPERS] = module


def sample_index(
    sizes: numpy.ndarray,
    documents: numpy.ndarray,
    sequence_length: int,
    epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    extra: int = 1,
) -> numpy.ndarray:
    """Where each sample begins: [samples + 1, 2] of (position in `documents`, offset in that document).

    The same as build_sample_idx in megatron-core's datasets/helpers.cpp for drop_last=True.
    Example: documents of 3 and 4 tokens, sequences of 2 -> [[0, 0], [0, 2], [1, 1], [1, 3]].
    """
    if not drop_last:
        raise NotImplementedError("a last partial sequence needs megatron-core's compiled helpers")
    samples = (epochs * tokens_per_epoch - extra) // sequence_length
    lengths = sizes[documents].astype(numpy.int64)
    ends = numpy.cumsum(lengths)
    at = numpy.arange(samples + 1, dtype=numpy.int64) * sequence_length
    document = numpy.searchsorted(ends, at, side="right")
    kind = numpy.int32 if max(len(documents), int(sizes.max())) <= numpy.iinfo(numpy.int32).max else numpy.int64
    return numpy.stack([document, at - (ends[document] - lengths[document])], axis=1).astype(kind)


def blend(
    parts_n: numpy.ndarray, samples_n: numpy.ndarray, weights: Sequence[float], parts: int, size: int, verbose: bool
) -> None:
    """Write whose turn it is, and with which of its samples, into `parts_n` and `samples_n`: the part furthest behind.

    The same as build_blending_indices in helpers.cpp. Weights 0.75 and 0.25 -> parts 0, 1, 0, 0.
    """
    taken = [0] * parts
    for i in range(size):
        behind = [weight * max(i, 1) - count for weight, count in zip(weights, taken, strict=True)]
        part = behind.index(max(behind))
        parts_n[i], samples_n[i] = part, taken[part]
        taken[part] += 1


def blend_all(parts_n: numpy.ndarray, samples_n: numpy.ndarray, sizes: Sequence[int], parts: int) -> None:
    """The same until part i has given sizes[i] samples, as build_exhaustive_blending_indices in helpers.cpp."""
    taken, total = [0] * parts, sum(sizes)
    for i in range(total):
        open_parts = [part for part in range(parts) if taken[part] < sizes[part]]
        part = max(open_parts, key=lambda part: sizes[part] / total * max(i, 1) - taken[part])
        parts_n[i], samples_n[i] = part, taken[part]
        taken[part] += 1
