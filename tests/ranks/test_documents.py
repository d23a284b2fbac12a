"""Documents kept apart, by attention and by the loss: every layout trains what the plain reference trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moue_dist.config import Config, DataConfig
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool

TOLERANCE = 1e-5
BOTH = DataConfig(document_mask=True, eod_mask_loss=True)
CASES = [  # layout, model, what is masked
    ("mb4", "moue", BOTH),
    ("selective mb2", "moue", DataConfig(document_mask=True)),
    ("dp2 mb1", "moue", DataConfig(eod_mask_loss=True)),
    ("pp2 ep2 dp2", "moue", BOTH),
    ("pp2 ep2 tp2 full", "moue", BOTH),
    ("pp2 ep2 dp2 v2 overlap", "recurrent", BOTH),
    ("pp2 ep2 dp2 home", "moue", BOTH),
]


def config_of(layout: str, model: str, data: DataConfig) -> Config:
    config = replace(Case(layout, model).config, data=data)
    return replace(config, parallel=replace(config.parallel, placement="home")) if "home" in layout else config


@pytest.mark.parametrize(("layout", "model", "data"), CASES)
def test_a_layout_trains_what_one_process_trains(
    layout: str, model: str, data: DataConfig, ranks: Callable[[int], RankPool]
) -> None:
    config = config_of(layout, model, data)
    initial = parity.merge(ranks(1).run(parity.initial_weights, parity.one_process(config)), "initial")
    truth = parity.run_reference(config, initial)
    parts = ranks(Case(layout, model).world).run(parity.train, config, truth.seed)
    for part in parts:
        assert part.losses == pytest.approx(truth.losses, rel=TOLERANCE)
        assert part.norms == pytest.approx([r["grad_norm"] for r in truth.record], rel=TOLERANCE)
    final = parity.merge(parts, "final")
    errors = {n: float((w - truth.final[n]).norm() / truth.final[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < TOLERANCE} == {}
    # Both masks are at work: without them the losses are others.
    for other in (replace(data, document_mask=False), replace(data, eod_mask_loss=False)):
        if other != data:
            unmasked = parity.run_reference(replace(config, data=other), initial)
            assert abs(unmasked.losses[0] / truth.losses[0] - 1) > 1e-4


def logits(config: Config, tokens_bs: Tensor, documents_bs: Tensor) -> Tensor:
    """Of the trainer's own model on one rank."""
    from moue_dist.data.documents import attention_mask
    from moue_dist.parallel.megatron import adapter as megatron

    system = parity.build(config)
    try:
        (model,) = system.chunk_modules()
        system.context.begin_step(1)
        system.context.pool.ready()
        mask = attention_mask(documents_bs) if config.data.document_mask else None
        positions = torch.arange(tokens_bs.shape[1]).expand_as(tokens_bs)
        with torch.no_grad():
            found: Tensor = model(tokens_bs, positions, mask)
        return found.float()
    finally:
        megatron.shut_down()


def test_a_document_does_not_know_the_one_before(ranks: Callable[[int], RankPool]) -> None:
    """Another first document of the same length: the second's logits stay; unmasked they move."""
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, :7] = (tokens[:, :7] + 1) % 256
    documents = (torch.arange(16) >= 7).long()[None]
    for masked in (True, False):
        config = config_of("mb1", "moue", DataConfig(document_mask=masked))
        one, other = (ranks(1).run(logits, config, t, documents)[0] for t in (tokens, changed))
        assert one.shape == (1, 16, 256) and one.std() > 0.01
        moved = (one - other).abs().amax(-1)[0]
        assert (moved[:7] > 1e-4).all()
        # Not to the bit: experts multiply other rows beside theirs.
        assert (moved[7:] < 2e-6).all() if masked else (moved[7:] > 1e-4).all(), moved
