"""The rows that meet at an owner: where each stands, against a walk over rows that carry their names."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moue_dist.kernels.rows.pair import gather_pair, gather_sum_pair
from moue_dist.parallel.lockstep.meeting import Counts, Meeting


def counts_of(table: list[list[int]]) -> Counts:
    return Counts(torch.tensor(table), torch.tensor(table))


def test_docstring_examples() -> None:
    meeting = Meeting.of(counts_of([[1, 1], [1, 0]]), 2, 0)
    assert (meeting.own, meeting.theirs) == (2, [1])
    assert meeting.from_source_q.tolist() == [0, 2, 1]
    assert meeting.counts_n.tolist() == meeting.counts_host == [2, 1]
    assert meeting.tokens(torch.tensor([4, 4]), 5).tolist() == [4, 5, 4]
    assert meeting.results(torch.tensor([[1], [0], [2]]), 3).tolist() == [[2], [0], [3]]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_row_reaches_its_expert_and_its_token(
    cells: int, held: int, tokens: int, k: int, draw: random.Random
) -> None:
    """A token's number is its row; experts here answer 100 e + row, those elsewhere -1 for each row."""
    me = draw.randrange(cells)
    mine = sorted((draw.randrange(cells * held), t, i) for t in range(tokens) for i in range(k))  # (bin, token, choice)
    position = torch.empty(tokens, k, dtype=torch.int64)
    for row, (_, t, i) in enumerate(mine):
        position[t, i] = row
    own = [[sum(b == e for b, _, _ in mine) for e in range(held)] + [0]]
    theirs = [[draw.randrange(3) for _ in range(held)] + [0] for _ in range(cells - 1)]
    meeting = Meeting.of(counts_of(own + theirs), held, me)
    x = torch.arange(1.0, tokens + 1)[:, None]
    sent = torch.tensor([[1000.0 + i] for i in range(sum(map(sum, theirs)))]).view(-1, 1)

    rows = gather_pair(x, sent, meeting.tokens(torch.tensor([t for _, t, _ in mine], dtype=torch.int64), tokens))
    named = [(e, me, t + 1.0) for e, t, _ in mine if e < held]
    at = iter(sent.flatten().tolist())
    for other, row in enumerate(theirs):
        named += [(e, other + (other >= me), next(at)) for e in range(held) for _ in range(row[e])]
    named.sort(key=lambda name: name[:2])  # stable: a source's rows stay in their order
    assert rows.flatten().tolist() == [name for _, _, name in named]
    assert meeting.counts_host == [sum(e == name[0] for name in named) for e in range(held)]

    out = rows + 100 * torch.tensor([[e] for e, _, _ in named], dtype=torch.float32).view(-1, 1)
    returned = torch.full((tokens * k - meeting.own, 1), -1.0)
    got = gather_sum_pair(out, returned, meeting.results(position, len(out)))
    for t in range(tokens):
        answers = [100 * e + t + 1 if e < held else -1 for e, token, _ in mine if token == t]
        assert got[t, 0] == pytest.approx(sum(answers))
