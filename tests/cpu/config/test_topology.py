"""Topologies: who sees what, for every kind, and what is refused."""

from __future__ import annotations

import pytest

from moue_dist.config.topology import Topology, build_topology


def test_private_is_a_partition() -> None:
    assert build_topology("private", 3, 6).windows == ((0, 1), (2, 3), (4, 5))


def test_block_shares_within_groups_only() -> None:
    assert build_topology("block", 4, 8, group=2).windows == ((0, 1, 2, 3),) * 2 + ((4, 5, 6, 7),) * 2


def test_full_sees_everything() -> None:
    assert build_topology("full", 2, 3).windows == ((0, 1, 2),) * 2


def test_rotation_overlaps_neighbours_and_wraps() -> None:
    topology = build_topology("rotational", 4, 8, window=4, stride=2)
    assert topology.windows == ((0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (0, 1, 6, 7))
    assert topology.exposure == (2,) * 8


def test_rotation_in_groups_moves_every_second_layer() -> None:
    windows = build_topology("rotational", 4, 8, window=4, stride=4, group=2).windows
    assert windows[0] == windows[1] != windows[2] == windows[3]


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (build_topology("private", 4, 8), build_topology("rotational", 4, 8, window=2, stride=2)),
        (build_topology("block", 4, 8, group=2), build_topology("rotational", 4, 8, window=4, stride=4, group=2)),
        (build_topology("full", 4, 8), build_topology("rotational", 4, 8, window=8, stride=3)),
    ],
)
def test_every_kind_is_a_rotation(special: Topology, general: Topology) -> None:
    assert special == general


def test_target_share_sums_to_one_and_follows_exposure() -> None:
    topology = build_topology("rotational", 3, 8, window=4, stride=2)  # experts 2..5 are seen twice
    assert sum(topology.target_share) == pytest.approx(1.0)
    assert topology.target_share[2] == pytest.approx(2 * topology.target_share[0])
    assert topology.exposure == (1, 1, 2, 2, 2, 2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("private", 3, 8), "moe.pool=8"),
        (("block", 3, 9, {"group": 2}), "moe.group=2"),
        (("rotational", 2, 8, {"window": 9, "stride": 1}), "moe.window=9 is larger than moe.pool=8"),
        (("rotational", 2, 8, {"stride": 1}), "moe.window"),
        (("rotational", 2, 8, {"window": 4}), "moe.stride"),
        (("ring", 2, 8), "moe.topology='ring'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple, names: str) -> None:
    options = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(ValueError, match=names.replace(".", r"\.")):
        build_topology(*arguments[:3], **options)
