"""The `hybrid` placement: one home for every expert, and copies where they save most traffic per byte of memory.

Copies go in the home's column to stages that reach an expert, in the order of the rows that a copy keeps on its stage.
A copy costs its weights and gradients; the optimizer's state is only spread wider, so all copies cost the same in total
and this order is the one of bytes saved per byte held. A cell takes copies as long as its own bytes stay within the
budget. A home on a stage that does not reach its expert moves to the first stage that buys it.

Every distinct set of holders needs a communicator, so where stages could form more than MAX_SETS sets, all copies of an
expert are bought together, in the order of their mean. A budget that never binds gives the holders of `replicate`.
"""

from __future__ import annotations

import numpy as np

from moue_dist.parallel.placement.costs import ExpertBytes, Floats, Ints, cell_bytes
from moue_dist.parallel.placement.placement import Placement

MAX_SETS = 64  # of stages that hold the same expert

Offer = tuple[int, tuple[int, ...]]  # an expert, and the stages that would get a copy


class BudgetError(ValueError):
    """The budget is smaller than what one home for every expert takes. `needed` is that, in bytes a GPU."""

    def __init__(self, needed: int, budget: int) -> None:
        super().__init__(
            f"parallel.pool_budget_gib={budget / 2**30:g} is too small: one home for each expert already takes "
            f"{needed / 2**30:.3f} GiB a GPU (weights, gradients, optimizer state); raise it to at least that, or use "
            f"parallel.placement=home on more GPUs"
        )
        self.needed = needed


def buy_copies(
    home: Placement, everywhere: Placement, use: Floats, each: ExpertBytes, budget: int, expert_data: int
) -> Placement:
    """`home` with the copies that keep most rows on their stage, within `budget` bytes in every cell.

    `everywhere` has the holders that an endless budget would buy; `use` [S, P] as from `stage_use`.
    Raises BudgetError.
    """
    if (needed := int(_total(home, each, expert_data).max())) > budget:
        raise BudgetError(needed, budget)
    most = Placement(home.pipeline, home.expert_parallel, everywhere.holders, home.columns)
    if _total(most, each, expert_data).max() <= budget:
        return most
    waiting = _offers(home, everywhere, use)
    a_copy, state = each.row * (each.weight + each.gradient), each.row * each.optimizer / expert_data
    held = [set(at) for at in home.holders]
    stray = [not set(at) <= set(reach) for at, reach in zip(home.holders, everywhere.holders, strict=True)]
    bought: list[Offer] = []
    while waiting:
        # Within a pass nobody is credited for state that a later copy takes over: cells are counted too full, never
        # too empty. The next pass counts anew.
        left = _left(held, home, a_copy, state, budget)
        before, skipped = len(bought), []
        for e, stages in waiting:
            column, alone = left[home.columns[e]], stray[e] and len(held[e]) == 1
            cost = a_copy + state / (len(held[e]) - alone + len(stages))
            if any(column[s] < cost for s in stages):
                skipped.append((e, stages))
                continue
            for s in stages:
                column[s] -= cost
            if alone:  # the home serves nobody of its own stage: it moves
                column[held[e].pop()] += a_copy + state
                stray[e] = False
            held[e].update(stages)
            bought.append((e, stages))
        waiting = skipped if len(bought) > before else []
    return _repaid(home, held, bought, each, budget, expert_data)


def _offers(home: Placement, everywhere: Placement, use: Floats) -> list[Offer]:
    """Copies that can be bought, the best first."""
    missing = [(e, tuple(s for s in at if (s,) != home.holders[e])) for e, at in enumerate(everywhere.holders)]
    if 2**home.pipeline - 1 <= MAX_SETS:
        missing = [(e, (s,)) for e, stages in missing for s in stages]
    offers = [offer for offer in missing if offer[1]]
    worth = [-float(use[list(stages), e].mean()) for e, stages in offers]
    return [offers[i] for i in sorted(range(len(offers)), key=lambda i: (worth[i], offers[i]))]


def _left(held: list[set[int]], home: Placement, a_copy: int, state: float, budget: int) -> list[list[float]]:
    """What each cell has left of the budget, [EP][S], with the optimizer's state spread evenly over replicas."""
    left = [[float(budget)] * home.pipeline for _ in range(home.expert_parallel)]
    for e, at in enumerate(held):
        column, cost = left[home.columns[e]], a_copy + state / len(at)
        for s in at:
            column[s] -= cost
    return left


def _repaid(
    home: Placement,
    held: list[set[int]],
    bought: list[Offer],
    each: ExpertBytes,
    budget: int,
    expert_data: int,
) -> Placement:
    """The placement without the last copies where whole pieces of the optimizer's shares overrun the budget."""
    a_copy = each.row * (each.weight + each.gradient)
    while True:
        placement = Placement(
            home.pipeline, home.expert_parallel, tuple(tuple(sorted(at)) for at in held), home.columns
        )
        over = _total(placement, each, expert_data) - budget
        if over.max() <= 0:
            return placement
        debts = {(int(s), int(c)): -(-int(over[s, c]) // a_copy) for s, c in np.argwhere(over > 0)}
        kept: list[Offer] = []
        for e, stages in reversed(bought):
            debtors = [(s, home.columns[e]) for s in stages if debts.get((s, home.columns[e]), 0) > 0]
            if not debtors:
                kept.append((e, stages))
                continue
            for cell in debtors:
                debts[cell] -= 1
            _sell(held[e], stages, home.holders[e])
        if len(kept) == len(bought):  # a cell of homes alone, whose partners sold: the latest copy of all goes
            e, stages = kept.pop(0)
            _sell(held[e], stages, home.holders[e])
        bought = kept[::-1]


def _sell(held: set[int], stages: tuple[int, ...], home: tuple[int, ...]) -> None:
    held.difference_update(stages)
    if not held:
        held.update(home)


def _total(placement: Placement, each: ExpertBytes, expert_data: int) -> Ints:
    parts = cell_bytes(placement, each, expert_data)
    return parts["weights"] + parts["gradients"] + parts["optimizer"]
