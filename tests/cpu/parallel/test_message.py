"""Messages of rows with a number beside each: what was put in comes out, and rows are as long as is documented."""

from __future__ import annotations

import pytest
import torch

from moue_dist.parallel.lockstep.message import open_message, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "tables"), [(8, 1), (8, 2), (3, 1), (5, 2), (1, 1)])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_there_and_back(d: int, tables: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(d)
    given = tuple(torch.randn(4, d).to(dtype) for _ in range(tables))
    index, number = torch.randint(4, (rows,)), torch.randn(rows)  # fp32 in all its bits, whatever the rows' type
    message = pack(given, index, number)
    size = message.shape[1] * message.element_size()
    used = tables * d * message.element_size()
    assert size % 16 == 0 and used + 16 <= size < used + 32
    found = open_message(message, d, tables)
    assert torch.equal(found.number_a, number)
    for table, got in zip(given, found.rows, strict=True):
        assert torch.equal(got, table[index])
