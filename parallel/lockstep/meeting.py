"""The rows that meet at an owner in one round, in two orders: by source and by expert.

By source, this rank's own rows come first, which no message carries, then those of the other cells in the order of
cells. By expert, the rows of an expert stand in the order of cells, wherever it lives: so an expert that moves computes
the same sums, bit by bit. A source's rows are sorted by expert, so both orders follow from counts alone.

Legend: B blocks of rows, this cell's own and one of each other cell; n a cell's rows of the pool, padded to the
largest; q rows that meet; R rows of this rank as a source, the first of which stay; T its tokens, k choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moue_dist.parallel.dispatch.routes import inverse, to_expert_order


@dataclass(frozen=True, eq=False)
class Counts:
    """How many rows each block has for each expert here, [B, n] int64, on the device and on the host."""

    device_bn: Tensor
    host_bn: Tensor

    def blocks(self, first: int, end: int) -> Counts:
        return Counts(self.device_bn[first:end], self.host_bn[first:end])

    @staticmethod
    def join(parts: list[Counts]) -> Counts:
        return Counts(torch.cat([p.device_bn for p in parts]), torch.cat([p.host_bn for p in parts]))

    @property
    def rows(self) -> list[int]:
        """Of each block."""
        return self.host_bn.sum(1).tolist()


@dataclass(frozen=True, eq=False)
class Meeting:
    """Example, counts [[1, 1], [1, 0]] of this cell and another: own rows 0 and 1, their row 2; by expert 0, 2, 1."""

    counts_n: Tensor  # [held] int64 on the device: rows of each expert here
    counts_host: list[int]
    own: int  # rows of this rank
    theirs: list[int]  # rows of each other cell
    to_expert_q: Tensor  # where the rows by source stand by expert
    from_source_q: Tensor  # its inverse

    @staticmethod
    def of(counts: Counts, held: int, cell: int) -> Meeting:
        """`held` experts are here, in this `cell`, which stands behind as many others."""
        own, *theirs = counts.rows
        to_expert_q = to_expert_order(counts.device_bn, own + sum(theirs), cell)
        return Meeting(
            counts.device_bn.sum(0)[:held],
            counts.host_bn.sum(0)[:held].tolist(),
            own,
            theirs,
            to_expert_q,
            inverse(to_expert_q),
        )

    def tokens(self, source_r: Tensor, tokens: int) -> Tensor:
        """Where the rows by expert come from: this rank's `tokens`, behind them what the others sent, one by one.

        `source_r` tells the token of each row of this rank. For `gather_pair`. Example as above, rows 0 and 1 being
        token 4 of 5: 4, 5, 4.
        """
        theirs = torch.arange(tokens, tokens + sum(self.theirs), device=source_r.device)
        return torch.cat([source_r[: self.own], theirs])[self.from_source_q]

    def results(self, position_tk: Tensor, rows: int) -> Tensor:
        """Where the results of a token's choices stand: among `rows` by expert, behind them what the others returned.

        `position_tk` tells the row of each choice of this rank. For `gather_sum_pair`. Example as above, with a third
        row of its own, which went to the other cell: position [[1], [0], [2]] and 3 rows -> [[2], [0], [3]].
        """
        returned = torch.arange(rows, rows + position_tk.numel() - self.own, device=position_tk.device)
        return torch.cat([self.to_expert_q[: self.own], returned])[position_tk]
