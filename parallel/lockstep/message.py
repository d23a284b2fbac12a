"""Rows with a number beside each, in one message: gradients and routing weights travel together.

A message's row holds one or two rows of d numbers and, in its last four bytes, the bits of an fp32 number. It is a
multiple of 16 bytes long, so that what stands in it can be read as it came (`costs.row_with_number`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moue_dist.kernels.rows.pair import gather_pair
from moue_dist.parallel.placement.costs import row_with_number


class Opened(NamedTuple):
    """What a message of A rows holds; views of it."""

    rows: tuple[Tensor, ...]  # [A, d] each, apart by the length of a message's row
    number_a: Tensor  # [A] fp32


def pack(tables: tuple[Tensor, ...], index_a: Tensor, number_a: Tensor) -> Tensor:
    """A message with row index[a] of every table [_, d], side by side, and number[a]."""
    d, size = tables[0].shape[1], tables[0].element_size()
    width = row_with_number(len(tables) * d * size) // size
    message = tables[0].new_empty(index_a.shape[0], width)
    for i, table in enumerate(tables):
        gather_pair(table, table[:0], index_a, out=message[:, i * d : (i + 1) * d])
    message.view(torch.float32)[:, -1] = number_a
    return message


def open_message(message: Tensor, d: int, tables: int) -> Opened:
    """What `pack` put in."""
    rows = tuple(message[:, i * d : (i + 1) * d] for i in range(tables))
    return Opened(rows, message.view(torch.float32)[:, -1])
