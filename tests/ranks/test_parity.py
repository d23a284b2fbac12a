"""Every layout trains the model that one process trains: losses, gradient norms, counts and all weights of five steps.

The measure is the plain reference in `tests/reference.py`, in fp32 from the same weights on the same tokens. A case is
a layout and a model of `cases.py`; two cases of one world size share their processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import parity
from tests.ranks.cases import MODELS, Case
from tests.ranks.spawn import RankPool

TOLERANCE = 1e-5  # norm of the difference over the norm, of every tensor

CASES = [
    # What is most likely to break.
    ("pp2 1-3", "moue"),
    ("pp2 3-1 selective", "recurrent"),
    ("pp2 v2 overlap", "tied head"),
    ("pp2 v2 1-2-1-1", "five layers"),
    ("ep2 dp2", "dead"),
    ("dp2 overlap", "moue"),
    ("tp2", "moue"),
    ("pp2 dp2", "skipping ring"),
    ("pp2 ep2 dp2", "skipping ring"),
    ("pp2 ep2 dp2 merge3", "moue"),
    ("pp2 ep2 dp2 full overlap", "moue"),
    ("pp2 ep2 dp2 selective overlap mb2 merge2", "moue, full"),
    ("pp2 ep2 dp2", "unipool"),
    ("pp2 ep2 dp2 overlap", "dead"),
    ("pp2 ep2 dp2 overlap", "tied head"),
    ("pp2 ep2 dp2 plain", "recurrent"),
    ("pp2 ep2 dp2 2-3 full", "five layers"),
    ("pp2 ep2 dp2 v2 merge4", "recurrent"),
    ("pp2 ep2 tp2", "qwen"),
    ("pp2 ep2 tp2 selective merge2", "moue"),
    ("", "olmoe"),
    ("pp2 ep2 tp2", "olmoe"),
    ("tp2 full plain", "olmoe"),
    ("pp2 ep2 tp2", "qwen3"),
    ("", "converted"),
    ("pp2 ep2 dp2 full overlap", "converted"),
    ("pp2 ep2 tp2 rows selective merge2", "converted, sigmoid"),
    ("pp2 v2 1-1-1-1", "converted, sigmoid"),
    ("pp2 ep2 dp2 full overlap", "dense first"),
    ("pp4 overlap", "dense first"),
    ("pp2 tp2 overlap", "tied head"),
    ("pp4 1-2-1-1", "five layers"),
    ("pp2 ep2 dp2 tp2 overlap", "moue"),
    ("pp4 ep2 dp2 full", "recurrent"),
    ("pp2 ep4 dp4", "moue"),
    # Rows one by one, and tokens once a rank where that is not picked, or finds too little room.
    ("rows mb4", "moue"),
    ("ep2 dp2 rows", "dead"),
    ("pp2 ep2 dp2 rows full overlap", "recurrent"),
    ("pp2 ep2 tp2 rows selective merge2", "moue"),
    ("pp2 ep2 dp2 tokens tight", "dead"),
    ("ep4 dp4 tokens", "skipping ring"),
    ("pp2 ep4 dp4 tokens tight full", "moue"),
    # What completes the pairs (`test_the_table_covers_every_pair`).
    ("", "moue"),
    ("full mb4", "deepseek"),
    ("full overlap mb2 merge4", "qwen"),
    ("full overlap mb4", "unipool"),
    ("full overlap mb4", "mixtral"),
    ("overlap mb2", "moue, full"),
    ("overlap mb4", "plain"),
    ("overlap mb4", "dead"),
    ("overlap plain", "switch"),
    ("selective mb2", "recurrent"),
    ("selective mb4", "all of the window"),
    ("selective mb4", "tied head"),
    ("selective mb4", "five layers"),
    ("ep2 dp2", "deepseek"),
    ("pp2 v2 full mb2", "unipool"),
    ("pp2 v2 full overlap mb2", "plain"),
    ("pp2 v2 selective overlap mb2", "deepseek"),
    ("ep4 dp2 tp2 full overlap", "switch"),
    ("ep4 dp2 tp2 mb2", "deepseek"),
    ("ep4 dp2 tp2 selective overlap mb2", "unipool"),
    ("ep4 dp4 selective", "tied head"),
    ("pp2 ep2 tp2 v2 selective overlap mb2", "all of the window"),
    ("pp4 overlap", "unipool"),
    ("pp4 selective mb4", "deepseek"),
    ("pp4 selective overlap mb2", "switch"),
    ("pp4 selective overlap mb4", "mixtral"),
    # Routers on topologies that the named models do not pair.
    ("pp2 mb4", "norm on block"),
    ("ep2 dp2 mb2", "norm on private"),
    ("dp2 mb2", "norm on rotational"),
    ("pp2 mb4", "recurrent on full"),
    ("ep2 dp2 mb2", "recurrent on private"),
    ("dp2 mb2", "sigmoid on full"),
    ("pp2 mb4", "sigmoid on private"),
    ("ep2 dp2 mb2", "sigmoid on rotational"),
    ("pp2 overlap", "softmax on full"),
    ("dp2 mb2", "softmax on full"),
    ("pp2 mb4", "universal on block"),
    ("ep2 dp2 mb2", "universal on private"),
]


def pairs_of(case: Case) -> Iterator[tuple[str, str]]:
    """All pairs of values of this case's axes."""
    c = case.config
    p = c.parallel
    axes = {
        "pipeline": p.pipeline_parallel,
        "expert": p.expert_parallel,
        "data": min(case.degree("dp"), 2),
        "tensor": p.tensor_parallel,
        "recompute": p.recompute,
        "overlap": p.overlap_grad_reduce,
        "accumulation": c.train.global_batch_size > c.train.micro_batch_size * case.degree("dp"),
        "virtual": p.virtual_stages,
        "router": c.moe.router,
        "topology": c.moe.topology,
    }
    yield from itertools.combinations([f"{k}={v}" for k, v in axes.items()], 2)


def test_the_table_covers_every_pair() -> None:
    values = {
        "pipeline": (1, 2, 4),
        "expert": (1, 2, 4),
        "data": (1, 2),
        "tensor": (1, 2),
        "recompute": ("none", "selective", "full"),
        "overlap": (False, True),
        "accumulation": (False, True),
        "virtual": (1, 2),
        "router": ("softmax", "sigmoid", "norm", "universal", "recurrent"),
        "topology": ("private", "block", "full", "rotational"),
    }
    all_pairs = {
        (f"{a}={x}", f"{b}={y}")
        for (a, of_a), (b, of_b) in itertools.combinations(values.items(), 2)
        for x in of_a
        for y in of_b
    }
    covered = set().union(*(pairs_of(Case(layout, model)) for layout, model in CASES))
    assert all_pairs - covered == {
        ("pipeline=1", "virtual=2"),  # nothing to interleave
        ("accumulation=False", "virtual=2"),  # interleaving needs as many microbatches as stages
        ("expert=4", "data=1"),  # four expert ranks of one stage are at least two data ranks here
        ("pipeline=4", "virtual=2"),  # needs eight layers
        ("pipeline=4", "expert=4"),  # needs 16 ranks
        ("pipeline=4", "tensor=2"),  # 8 ranks each: three of that size are enough
        ("expert=4", "virtual=2"),
    }
    assert {model for _, model in CASES} == MODELS.keys()
    used = [Case(*case).config for case in CASES]
    assert {c.parallel.distributed_optimizer for c in used} == {True, False}
    assert {c.moe.experts for c in used} == {"auto", "torch"}
    assert any(sorted(c.parallel.stage_layers) != list(c.parallel.stage_layers) for c in used)


@pytest.fixture(scope="module")
def yardstick(ranks: Callable[[int], RankPool]) -> Callable[[Case], parity.Yardstick]:
    """The reference's run of a case's model; it starts from the weights that one rank draws."""
    known: dict[str, parity.Yardstick] = {}

    def get(case: Case) -> parity.Yardstick:
        if case.model not in known:
            config = parity.one_process(case.config)
            initial = parity.merge(ranks(1).run(parity.initial_weights, config), "initial")
            known[case.model] = parity.run_reference(config, initial, case.kill)
        return known[case.model]

    return get


@pytest.mark.parametrize(
    ("layout", "model"),
    sorted(CASES, key=lambda case: Case(*case).world),
    ids=lambda word: word.replace(" ", "_") or "one_rank",
)
def test_a_layout_trains_what_one_process_trains(
    layout: str, model: str, ranks: Callable[[int], RankPool], yardstick: Callable[[Case], parity.Yardstick]
) -> None:
    case = Case(layout, model)
    truth = yardstick(case)
    parts = ranks(case.world).run(parity.train, case.config, truth.seed, kill=case.kill)

    for name, weight in parity.merge(parts, "initial").items():
        assert torch.equal(weight, truth.initial[name]), f"{name} starts otherwise than on one rank"
    for part in parts:
        assert part.losses == pytest.approx(truth.losses, rel=TOLERANCE)
        assert part.norms == pytest.approx([r["grad_norm"] for r in truth.record], rel=TOLERANCE)
        for step, (counts, aux) in enumerate(zip(part.counts, part.aux, strict=True)):
            assert torch.equal(counts.long(), truth.record[step]["counts_lp"]), f"counts of step {step}"
            assert aux == pytest.approx({n: truth.record[step]["terms"][n] for n in aux}, rel=TOLERANCE)
        assert torch.equal(part.bias, truth.bias)
    final = parity.merge(parts, "final")
    assert final.keys() == truth.final.keys()
    errors = {n: float((w - truth.final[n]).norm() / truth.final[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < TOLERANCE} == {}
    if case.kill:
        assert all(r["counts_lp"][:, list(case.kill)].sum() == 0 for r in truth.record)
