"""The orders of rows around an exchange, against sorting them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moue_dist.parallel.dispatch.routes import RouteTable, inverse, key_type, order_rows, to_expert_order


@given(st.integers(1, 5), st.integers(1, 7), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_to_expert_order_is_a_stable_sort_by_expert(sources: int, width: int, draw: object) -> None:
    counts = torch.tensor([[draw.choice((0, 0, 1, 3)) for _ in range(width)] for _ in range(sources)])  # type: ignore[attr-defined]
    rows = [(source, e) for source in range(sources) for e in range(width) for _ in range(counts[source, e])]
    for first in range(sources):
        place = [first, *(source for source in range(sources) if source != first)]  # of each source, among equals
        in_order = sorted(range(len(rows)), key=lambda row: (rows[row][1], place[rows[row][0]]))
        assert inverse(to_expert_order(counts, len(rows), first)).tolist() == in_order
    example = torch.tensor([[1, 1], [1, 0]])
    assert to_expert_order(example, 3).tolist() == [0, 2, 1] and to_expert_order(example, 3, 1).tolist() == [1, 2, 0]


def test_rows_by_bin() -> None:
    table = RouteTable.build((0, 1, 0, 1, 0), (0, 1, 2, 4), 2, 0, torch.device("cpu"))
    assert table.bin_p.tolist() == [0, 3, 1, -1, 2] and table.bin_p.dtype == torch.int16
    order = order_rows(torch.tensor([[1, 0], [4, 1], [2, 0]]), table)
    assert order.choice_r.tolist() == [1, 5, 4, 2, 0, 3]
    assert order.source_r.tolist() == [0, 2, 2, 1, 0, 1]
    assert order.position_tk.tolist() == [[4, 0], [3, 5], [2, 1]]
    assert order.counts_ow.tolist() == [[2, 1, 1], [2, 0, 0]]


def test_keys_are_wide_enough() -> None:
    assert key_type(2**15) == torch.int16 and key_type(2**15 + 1) == torch.int32
    assert torch.tensor(2**15 - 1, dtype=key_type(2**15)) == 2**15 - 1
