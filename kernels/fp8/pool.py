"""The experts' weights in FP8, quantised once after each change and held beside the pool; 2 bytes a weight.

Scales that belong to other weights give wrong numbers without a word, so a use asserts that they are these weights'.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl
from moue_dist.kernels.fp8.e4m3 import quantise_weights
from moue_dist.kernels.fp8.scaled import Layouts


class Weights(Protocol):
    """A part of the pool, `weight` [n, 3fd] (`SyncedBuffer`). Every change of it raises `version`; while one is under
    way, `pending` is not None."""

    weight: Tensor
    version: int

    @property
    def pending(self) -> object | None: ...


class StaleWeights(RuntimeError):
    """Weights have changed since they were quantised."""


class QuantisedPool:
    """Both layouts of w_in [n, 2f, d] and w_out [n, d, f] of all experts held here; the slabs of a pool share it.

    `refresh` belongs to where a step or an evaluation begins: once for each version of the weights, on the stream that
    the others wait for, and never within a layer, which recompute would run twice.
    """

    def __init__(self, of: Weights, hidden: int, width: int) -> None:
        n, device = of.weight.shape[0], of.weight.device
        self._of, self._split = of, 2 * width * hidden
        self._w_in, self._w_out = Layouts.empty(n, 2 * width, hidden, device), Layouts.empty(n, hidden, width, device)
        self._seen: tuple[int, int] | None = None

    @torch.no_grad()
    def refresh(self, impl: Impl | None = None) -> None:
        """Quantise the weights, if their version is another.

        Raises StaleWeights while an update of them is under way, and where somebody wrote to them and did not tell.
        """
        now = self._now()
        if self._seen is not None and self._seen[0] == now[0]:
            self._check()
            return
        self._seen, weight = None, self._of.weight
        quantise_weights(weight[:, : self._split].unflatten(1, self._w_in.out.q.shape[1:]), self._w_in, impl)
        quantise_weights(weight[:, self._split :].unflatten(1, self._w_out.out.q.shape[1:]), self._w_out, impl)
        self._seen = now

    @property
    def w_in(self) -> Layouts:
        """[n, 2f, d] and [n, d, 2f]. Raises StaleWeights."""
        self._check()
        return self._w_in

    @property
    def w_out(self) -> Layouts:
        """[n, d, f] and [n, f, d]. Raises StaleWeights."""
        self._check()
        return self._w_out

    def tensors(self) -> list[Tensor]:
        """All of its memory."""
        return [t for layouts in (self._w_in, self._w_out) for layout in layouts for t in layout]

    def _now(self) -> tuple[int, int]:
        """The version that the weights' owner tells, and PyTorch's own count of what was written in place."""
        if self._of.pending is not None:
            raise StaleWeights("the pool's weights are used while an update of them is under way")
        return self._of.version, self._of.weight._version

    def _check(self) -> None:
        version, written = self._now()
        if self._seen is None or self._seen[0] != version:
            raise StaleWeights("the pool's weights have changed since they were quantised: refresh() must come first")
        if self._seen[1] != written:
            raise StaleWeights("the pool's weights were written to, but their version was not raised")
