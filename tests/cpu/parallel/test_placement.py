"""Who holds which rows: cells, segments that all holders agree on, servers, spans."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moue_dist.parallel.placement.placement import Placement, Segment, common_pieces, replicate, spans

RELAXED = settings(max_examples=150, deadline=None)  # shared CI machines stall


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any holders in any columns, with nothing regular about them."""
    pipeline, ep, pool = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    sets = [s for n in range(1, pipeline + 1) for s in itertools.combinations(range(pipeline), n)]
    holders = draw(st.lists(st.sampled_from(sets), min_size=pool, max_size=pool))
    columns = draw(st.lists(st.integers(0, ep - 1), min_size=pool, max_size=pool))
    return Placement(pipeline, ep, tuple(holders), tuple(columns))


def cells(placement: Placement) -> list[tuple[int, int]]:
    return list(itertools.product(range(placement.pipeline), range(placement.expert_parallel)))


@RELAXED
@given(placements())
def test_rows_are_the_copies(placement: Placement) -> None:
    found = [(e, s) for s, ep in cells(placement) for e in placement.rows(s, ep) if placement.columns[e] == ep]
    assert sorted(found) == [(e, s) for e, at in enumerate(placement.holders) for s in at]
    assert all(list(placement.rows(*cell)) == sorted(placement.rows(*cell)) for cell in cells(placement))


@RELAXED
@given(placements())
def test_all_holders_find_the_same_segments(placement: Placement) -> None:
    for ep in range(placement.expert_parallel):
        ids: dict[tuple[int, ...], dict[int, list[tuple[int, ...]]]] = {}
        for stage in range(placement.pipeline):
            rows, end = placement.rows(stage, ep), 0
            for segment in placement.segments(stage, ep):
                assert segment.start == end < segment.stop, "segments tile the cell"
                end = segment.stop
                assert stage in segment.stages
                experts = rows[segment.start : segment.stop]
                assert all(placement.holders[e] == segment.stages for e in experts)
                ids.setdefault(segment.stages, {}).setdefault(stage, []).append(experts)
            assert end == len(rows)
        for stages, by_stage in ids.items():
            assert set(by_stage) == set(stages), "every holder has them"
            assert len({tuple(lists) for lists in by_stage.values()}) == 1, "and in the same order"


@RELAXED
@given(placements())
def test_column_runs_name_each_segment_once(placement: Placement) -> None:
    for ep in range(placement.expert_parallel):
        counted = [(s.stop - s.start, s.stages) for p in range(placement.pipeline) for s in placement.segments(p, ep)]
        named = [run for run in placement.column_runs(ep) for _ in run[1]]
        assert sorted(counted) == sorted(named)


def test_segments_of_a_column_by_hand() -> None:
    one = Placement(2, 1, ((0,), (0, 1), (1,), (0, 1)), (0, 0, 0, 0))
    assert one.segments(1, 0) == (Segment(0, 1, (0, 1)), Segment(1, 2, (1,)), Segment(2, 3, (0, 1)))
    assert one.segments(0, 0) == (Segment(0, 1, (0,)), Segment(1, 2, (0, 1)), Segment(2, 3, (0, 1)))
    apart = Placement(2, 1, ((0,), (1,), (0,)), (0, 0, 0))
    assert apart.segments(0, 0) == (Segment(0, 2, (0,)),), "another stage's row in between does not cut"
    assert apart.stage_sets() == ((0,), (1,))


@RELAXED
@given(placements())
def test_the_server_holds_the_expert_and_is_the_nearest(placement: Placement) -> None:
    for e, stage in itertools.product(range(placement.pool), range(placement.pipeline)):
        server = placement.server(e, stage)
        assert server in placement.holders[e]
        assert all(abs(server - stage) <= abs(other - stage) for other in placement.holders[e])
        assert server == stage or stage not in placement.holders[e]


def test_replicate_holds_what_layers_see() -> None:
    placement = replicate([(0, 1, 2), (2, 3)], [0, 1], pool=4, pipeline=2, expert_parallel=2)
    assert placement.holders == ((0,), (0,), (0, 1), (1,))
    assert placement.columns == (0, 1, 0, 1)
    assert placement.rows(1, 0) == (2,) and placement.rows(1, 1) == (3,)
    with pytest.raises(ValueError, match="seen by no layer"):
        replicate([(0, 1)], [0], pool=4, pipeline=1, expert_parallel=1)
    with pytest.raises(ValueError, match="expert_parallel"):
        replicate([(0, 1, 2)], [0], pool=3, pipeline=1, expert_parallel=2)


def test_spans() -> None:
    assert spans((0, 2, 4, 6), (0, 4, 6)) == ((0, 1), (2, 4))
    assert spans((1, 3), ()) == ()


@RELAXED
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5), st.sampled_from([1, 3, 8, 24, 64]))
def test_pieces_are_those_of_the_gradient_buffers(runs: list[tuple[int, int]], row: int) -> None:
    assert row % common_pieces(runs, row) == 0
