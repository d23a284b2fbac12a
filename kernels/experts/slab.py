"""Rows of the pool that one MoE layer sees: views of weights and gradients, cut into an expert's two matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PoolView:
    """What the kernels need of a layer's experts. It holds views: build it after the pool has its final storage."""

    weight: Tensor  # [n, 3*f*d] model dtype: rows of the experts held here (a view of the pool)
    grad: Tensor  # [n, 3*f*d] fp32: accumulation buffer
    hidden: int  # d
    width: int  # f
    spans: tuple[tuple[int, int], ...]  # the layer's visible experts as ranges of rows, in order

    def __post_init__(self) -> None:
        shape = (self.weight.shape[0], 3 * self.width * self.hidden)
        if self.weight.shape != shape or self.grad.shape != shape:
            raise ValueError(f"expected weight and grad {shape}, got {self.weight.shape} and {self.grad.shape}")
        if self.weight.stride(1) != 1 or self.grad.stride(1) != 1:
            raise ValueError("a row of the pool must be contiguous")
        if any(not 0 <= first < end <= shape[0] for first, end in self.spans):
            raise ValueError(f"spans {self.spans} are empty or leave the {shape[0]} experts held here")

    @property
    def count(self) -> int:
        """Visible experts. Example: spans ((0, 2), (6, 8)) -> 4."""
        return sum(end - first for first, end in self.spans)

    @property
    def w_in(self) -> Tensor:
        """[n, 2f, d], a strided view: gate rows, then up rows."""
        return self._in(self.weight)

    @property
    def w_out(self) -> Tensor:
        """[n, d, f], a strided view."""
        return self._out(self.weight)

    @property
    def g_in(self) -> Tensor:
        """[n, 2f, d], the part of `grad` that belongs to `w_in`."""
        return self._in(self.grad)

    @property
    def g_out(self) -> Tensor:
        """[n, d, f], the part of `grad` that belongs to `w_out`."""
        return self._out(self.grad)

    @cached_property
    def row_ids(self) -> Tensor:
        """[count] int64 on the weights' device: the rows of the visible experts, in the order of `spans`."""
        ids = [row for first, end in self.spans for row in range(first, end)]
        return torch.tensor(ids, dtype=torch.int64, device=self.weight.device)

    def _in(self, pool: Tensor) -> Tensor:
        return pool[:, : 2 * self.width * self.hidden].view(-1, 2 * self.width, self.hidden)

    def _out(self, pool: Tensor) -> Tensor:
        return pool[:, 2 * self.width * self.hidden :].view(-1, self.hidden, self.width)
