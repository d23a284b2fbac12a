"""After which steps something is done."""

from __future__ import annotations

import pytest

from moue_dist.training.intervals import Every


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (Every(3), [3, 6]),
        (Every(4), [4]),
        (Every(3, last="always"), [3, 6, 7]),
        (Every(7, last="always"), [7]),
        (Every(7, last="never"), []),
        (Every(3, last="never"), [3, 6]),
        (Every(1, last="never"), [1, 2, 3, 4, 5, 6]),
        (Every(7), [7]),
        (Every(0), []),
        (Every(0, last="always"), [7]),
        (Every(0, last="never"), []),
    ],
)
def test_of_seven_steps(when: Every, steps: list[int]) -> None:
    assert [n for n in range(1, 8) if when.due(n, 7)] == steps
