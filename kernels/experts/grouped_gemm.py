"""The three matrix products of one linear layer per expert, over rows sorted by expert.

Legend: r row, n expert, i in, o out. Expert n's weight is w[n] [o, i] as in nn.Linear; rows of expert n are
consecutive. `forward`: y = x w^T; `dgrad`: dx = dy w; `wgrad`: grad[n] += dy^T x, in place, only for experts with
rows. Two implementations, chosen once per call of the expert MLP:

- `LoopGemm`, the reference: one matmul per expert with rows; weight gradients accumulate in the buffer's type.
- `TorchGemm`: PyTorch's grouped GEMM. With one span of experts nothing waits for the device. Its weight gradient
  comes in the inputs' type (bf16) and is added to the fp32 buffer; where Triton is, `wgrad.py` does both in one
  kernel instead (`fused`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moue_dist.kernels.backend import Impl

Spans = tuple[tuple[int, int], ...]
MOST_GROUPS = 512  # PyTorch's grouped GEMM refuses 1024 groups and more


class Gemm(Protocol):
    """What the expert MLP needs; see this file's head. `fused`: weight gradients are left to `wgrad.py`'s kernel."""

    @property
    def fused(self) -> bool: ...
    def forward(self, x_ri: Tensor, w_noi: Tensor) -> Tensor: ...
    def dgrad(self, dy_ro: Tensor, w_noi: Tensor) -> Tensor: ...
    def wgrad(self, dy_ro: Tensor, x_ri: Tensor, grad_noi: Tensor) -> None: ...


@dataclass(frozen=True)
class LoopGemm:
    """`segments`: (expert, first row, end row) of the experts that have rows."""

    segments: tuple[tuple[int, int, int], ...]
    fused = False

    @staticmethod
    def of(spans: Spans, counts: list[int]) -> LoopGemm:
        """Example: spans ((2, 4), (0, 1)), counts [3, 0, 2] -> segments ((2, 0, 3), (0, 3, 5))."""
        experts = [e for first, end in spans for e in range(first, end)]
        segments, row = [], 0
        for e, count in zip(experts, counts, strict=True):
            if count:
                segments.append((e, row, row + count))
            row += count
        return LoopGemm(tuple(segments))

    def forward(self, x_ri: Tensor, w_noi: Tensor) -> Tensor:
        y_ro = x_ri.new_empty(x_ri.shape[0], w_noi.shape[1])
        for e, a, b in self.segments:
            torch.mm(x_ri[a:b], w_noi[e].t(), out=y_ro[a:b])
        return y_ro

    def dgrad(self, dy_ro: Tensor, w_noi: Tensor) -> Tensor:
        dx_ri = dy_ro.new_empty(dy_ro.shape[0], w_noi.shape[2])
        for e, a, b in self.segments:
            torch.mm(dy_ro[a:b], w_noi[e], out=dx_ri[a:b])
        return dx_ri

    def wgrad(self, dy_ro: Tensor, x_ri: Tensor, grad_noi: Tensor) -> None:
        for e, a, b in self.segments:
            grad_noi[e].addmm_(dy_ro[a:b].t().to(grad_noi.dtype), x_ri[a:b].to(grad_noi.dtype))


@dataclass(frozen=True)
class TorchGemm:
    """`parts`: per span of experts its (first, end) expert, (first, end) row, row counts and end offsets (int32)."""

    parts: tuple[tuple[tuple[int, int], tuple[int, int], Tensor, Tensor], ...]
    impl: Impl

    @property
    def fused(self) -> bool:
        return self.impl == "triton"

    @staticmethod
    def of(spans: Spans, counts_n: Tensor, rows: int, counts_host: list[int] | None, impl: Impl) -> TorchGemm:
        """Several spans, or more than MOST_GROUPS experts, need counts on the host to cut the rows: without
        `counts_host` this waits for the device.
        """
        spans = _narrow(spans)
        if len(spans) == 1:
            return TorchGemm(((spans[0], (0, rows), counts_n, _offsets(counts_n)),), impl)
        counts = counts_n.tolist() if counts_host is None else counts_host
        parts, seen, row = [], 0, 0
        for first, end in spans:
            here = slice(seen, seen + end - first)
            end_row = row + sum(counts[here])
            if end_row > row:
                parts.append(((first, end), (row, end_row), counts_n[here], _offsets(counts_n[here])))
            seen, row = here.stop, end_row
        return TorchGemm(tuple(parts), impl)

    @staticmethod
    def covering(spans: Spans, row_ids: Tensor, counts_n: Tensor, rows: int, impl: Impl) -> TorchGemm:
        """One group for every expert from the first visible one to the last, those between them without rows.

        `row_ids` are the visible experts, on the device. So nothing waits for the device, and `rows` may be more than
        there are. Where that range is wider than MOST_GROUPS, or the spans do not
        ascend, the rows are cut after all (`of`).
        """
        first, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        if len(spans) < 2 or end - first > MOST_GROUPS or list(spans) != sorted(spans):
            return TorchGemm.of(spans, counts_n, rows, None, impl)
        wide_n = counts_n.new_zeros(end - first).index_copy_(0, row_ids - first, counts_n)
        return TorchGemm((((first, end), (0, rows), wide_n, _offsets(wide_n)),), impl)

    def forward(self, x_ri: Tensor, w_noi: Tensor) -> Tensor:
        return join([grouped_mm(x_ri[a:b], w_noi[e:f].transpose(-2, -1), o) for (e, f), (a, b), _, o in self.parts])

    def dgrad(self, dy_ro: Tensor, w_noi: Tensor) -> Tensor:
        return join([grouped_mm(dy_ro[a:b], w_noi[e:f], o) for (e, f), (a, b), _, o in self.parts])

    def wgrad(self, dy_ro: Tensor, x_ri: Tensor, grad_noi: Tensor) -> None:
        for (e, f), (a, b), counts, offsets in self.parts:
            accumulate(grad_noi[e:f], grouped_mm(dy_ro[a:b].t(), x_ri[a:b], offsets), counts)


def _narrow(spans: Spans) -> Spans:
    """Spans of at most MOST_GROUPS experts. With MOST_GROUPS 512: ((0, 600),) -> ((0, 512), (512, 600))."""
    return tuple((first, min(first + MOST_GROUPS, end)) for a, end in spans for first in range(a, end, MOST_GROUPS))


def accumulate(total_noi: Tensor, part_noi: Tensor, counts_n: Tensor) -> None:
    """total[n] += part[n] where counts[n] > 0. `part` is rounded lower than `total`, the sum is not.

    PyTorch's grouped GEMM leaves the weight gradients of experts without rows unwritten on some GPUs (pytorch issue
    172439). Example: total = [[1], [1]], part = [[2], [nan]], counts = [5, 0] -> [[3], [1]].
    """
    total_noi.add_(part_noi.masked_fill_((counts_n == 0)[:, None, None], 0))


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's grouped GEMM: public since 2.10, private before."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public(a, b, offs=offsets) if public else torch._grouped_mm(a, b, offs=offsets)


def _offsets(counts_n: Tensor) -> Tensor:
    return torch.cumsum(counts_n, 0, dtype=torch.int32)


def join(parts: list[Tensor]) -> Tensor:
    """The spans' rows one after the other; one span's are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
