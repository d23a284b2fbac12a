"""megatron-core compiles one function that GPTDataset needs; here it is in numpy, for wheels that lack it."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import numpy

_HELPERS = "megatron.core.datasets.helpers_cpp"


def ensure_helpers() -> None:
    """Put the function below where GPTDataset looks for the compiled one, unless that is there."""
    if _HELPERS in sys.modules or importlib.util.find_spec(_HELPERS) is not None:
        return
    module = types.ModuleType(_HELPERS)
    builders: dict[str, Callable[..., numpy.ndarray]] = {f"build_sample_idx_int{n}": sample_index for n in (32, 64)}
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
