"""What a placement costs: bytes in each cell, and bytes that a step sends, against counting them one by one."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moue_dist.parallel.placement.costs import (
    COUNT_BYTES,
    cell_bytes,
    row_wire_bytes,
    step_traffic,
)
from moue_dist.parallel.placement.placement import common_pieces, pieces_of_a_row
from tests.cpu.parallel.test_planner import EACH, MANY, Case, budgets, cases


@MANY
@given(cases(), st.floats(0, 1.2))
def test_bytes_are_those_of_the_gradient_buffers(case: Case, part: float) -> None:
    """Against the real cut of shares, rank by rank; and every number of the optimizer's state exists once."""
    from moue_dist.parallel.groups import ReplicaGroup
    from moue_dist.parallel.pool.synced import Span

    for placement in (case.plan("replicate"), case.plan("hybrid", budgets(case, part))):
        found = cell_bytes(placement, EACH, case.expert_data)
        pieces, everything = pieces_of_a_row(placement, case.expert_data, EACH.row), 0
        unit, cells = EACH.row // pieces, list(itertools.product(range(case.pipeline), range(case.ep)))
        found_in_cells = [s for stage, ep in cells for s in placement.segments(stage, ep)]
        needs = [(s.stop - s.start, len(s.stages) * case.expert_data) for s in found_in_cells]
        assert pieces == common_pieces(needs, EACH.row)
        for stage, ep in cells:
            rows = len(placement.rows(stage, ep))
            assert found["weights"][stage, ep] == rows * EACH.row * 2
            assert found["gradients"][stage, ep] == rows * EACH.row * 4
            by_rank = []
            for replica in range(case.expert_data):
                mine = 0
                for s in placement.segments(stage, ep):
                    size = len(s.stages) * case.expert_data
                    me = s.stages.index(stage) * case.expert_data + replica
                    share = -(-(s.stop - s.start) * (EACH.row // unit) // size) * unit
                    a, b = Span(s.start * EACH.row, s.stop * EACH.row, share, ReplicaGroup(None, size, me)).mine
                    mine += b - a
                by_rank.append(mine)
            assert found["optimizer"][stage, ep] == max(by_rank) * 12
            everything += sum(by_rank)
        assert everything == case.topology.pool * EACH.row


@MANY
@given(cases(), st.floats(0, 1), st.integers(1, 9), st.booleans())
def test_traffic_is_what_counting_every_message_gives(case: Case, part: float, microbatches: int, lean: bool) -> None:
    """Against a walk over all rows of all ranks and all rounds of the schedule that the run uses."""
    from moue_dist.parallel.lockstep.schedule import Schedule

    placement = case.plan("hybrid", budgets(case, part))
    use, rows = case.shares(), 10**6
    layers = [Counter(case.stages)[s] for s in range(case.pipeline)]
    row = row_wire_bytes(8, 2, lock_step=True, recompute=lean)
    found = step_traffic(
        placement, use, rows=rows, row_bytes=row, layers=layers, microbatches=microbatches, each=EACH,
        expert_data=case.expert_data, lock_step=True, recompute=lean,
    )  # fmt: skip
    across = within = 0.0
    for s, e, source in itertools.product(range(case.pipeline), range(case.topology.pool), range(case.ep)):
        size = use[s, e] * rows / case.ep * row
        if placement.server(e, s) != s:
            across += size
        elif placement.columns[e] != source:
            within += size
    rounds = len(Schedule(case.pipeline, microbatches).forward_slots) * max(layers)
    width = max(len(placement.rows(s, c)) for s in range(case.pipeline) for c in range(case.ep))
    ranks = case.pipeline * case.ep * case.expert_data
    across += rounds * ranks * (case.pipeline - 1) * case.ep * width * COUNT_BYTES
    within += rounds * ranks * (case.ep - 1) * width * COUNT_BYTES
    assert (found.across, found.within) == pytest.approx((across, within), rel=1e-6, abs=2)
    assert 0 <= found.local_tokens <= 1 and 0 <= found.local_experts <= 1
    assert (found.across == 0) == (case.pipeline == 1)


def test_bytes_of_a_row_by_hand() -> None:
    """Forward out and back; backward out, with the weight and perhaps the row, and back with the weight's gradient."""
    for size, lean, parts in (
        (16, False, (16, 16, 16 + 16, 16 + 16)),
        (4096, True, (4096, 4096, 2 * 4096 + 16, 4096 + 16)),
        (20, False, (20, 20, 32 + 16, 32 + 16)),  # filled up to a multiple of 16
        (24, True, (24, 24, 48 + 16, 32 + 16)),
    ):
        assert row_wire_bytes(size // 2, 2, lock_step=True, recompute=lean) == sum(parts)
    assert row_wire_bytes(10, 4, lock_step=False, recompute=False) == 160
    assert row_wire_bytes(10, 4, lock_step=False, recompute=True) == 240


@given(cases())
@settings(max_examples=60, deadline=None)
def test_replicas_send_what_a_ring_sends(case: Case) -> None:
    placement, data = case.plan("replicate"), case.expert_data
    found = step_traffic(
        placement, case.shares(), rows=1, row_bytes=1, layers=[1], microbatches=1, each=EACH, expert_data=data,
        lock_step=False,
    )  # fmt: skip
    total = across = 0.0
    for at in placement.holders:
        ranks = [(s, r) for s in at for r in range(data)]
        for a, b in itertools.permutations(ranks, 2):  # each sends each its share, of gradients and then of weights
            size = EACH.row * (4 + 2) / len(ranks)
            total += size
            across += size if a[0] != b[0] else 0
    assert (found.sync_across, found.sync_across + found.sync_within) == pytest.approx((across, total))
    assert found.across == 0 and found.local_tokens == 1
