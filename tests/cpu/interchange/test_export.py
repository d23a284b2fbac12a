"""Exported folders in transformers: the model that was trained, with and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cpu.interchange import trained
from tests.cpu.interchange.trained import MOUE, PLAIN, Folders, needs_transformers

BOUND = 2e-6
FORMS = [(name, "moue") for name in MOUE] + [(name, "plain") for name in PLAIN]


@needs_transformers
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_transformers_says_what_the_trainer_and_the_reference_say(
    name: str, form: str, folders: Folders, answers: dict[str, dict[str, Any]]
) -> None:
    made, said = folders.made[name], answers[f"{name}, {form}"]
    assert made.logits_bsv is not None and made.logits_bsv.abs().max() > 0.1
    for ours in (made.logits_bsv, trained.reference_logits(made)):
        assert float((said["logits"] - ours).abs().max()) < BOUND
        assert float((said["padded"] - ours).abs().max()) < 2 * BOUND
        assert float((said["off"] - ours).abs().max()) > 20 * BOUND  # one expert x 1.01
    tokens = trained.tokens_bs(made.config)
    loss = torch.nn.functional.cross_entropy(made.logits_bsv[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert said["loss"] == pytest.approx(float(loss), abs=BOUND)


@needs_transformers
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_generation_needs_no_more_than_the_cache(name: str, form: str, answers: dict[str, dict[str, Any]]) -> None:
    said = answers[f"{name}, {form}"]
    assert said["cached"].shape[1] == 5 + 9
    assert torch.equal(said["cached"], said["not cached"])


@needs_transformers
def test_a_folder_of_many_files_is_the_same_model(answers: dict[str, dict[str, Any]]) -> None:
    assert float((answers["moue, sharded"]["logits"] - answers["moue, moue"]["logits"]).abs().max()) < BOUND
