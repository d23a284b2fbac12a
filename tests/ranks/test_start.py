"""`train.start_from`: a run's weights in any layout, a fresh optimizer, step 0; another model is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moue_dist.checkpoint import description
from moue_dist.config import Config, ConfigError
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool
from tests.ranks.test_resume import described

SEED, STEPS = 0, 2
# From, to, model.
STARTS = [
    ("pp2 ep2 dp2", "", "moue"),
    ("", "pp2 ep2 dp2", "moue"),
    ("", "pp2 ep2 tp2", "olmoe"),
    ("tp2 plain", "pp2 v2", "tied head"),
    ("pp2 2-3", "pp2 ep2 dp2 3-2 plain", "five layers"),
    ("", "pp2 ep2 dp2", "qwen"),
    ("ep2 dp2", "pp2 ep2 dp2", "converted"),
]


@pytest.mark.parametrize(("first", "second", "model"), STARTS)
def test_a_run_starts_with_the_weights_of_another(
    first: str, second: str, model: str, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """In the second layout as in one process: the weights are the first run's last ones to the bit, and Adam is new."""
    old = ranks(Case(first, model).world).run(parity.train, Case(first, model).config, SEED, stop=STEPS, save=tmp_path)
    case, alone = Case(second, model), parity.one_process(Case(second, model).config)
    new = ranks(case.world).run(parity.train, case.config, SEED + 1, stop=STEPS, begin=tmp_path)
    one = ranks(1).run(parity.train, alone, SEED + 1, stop=STEPS, begin=tmp_path)
    last = parity.merge(old, "final")
    for begun in (new, one):
        initial = parity.merge(begun, "initial")
        assert initial.keys() == last.keys()
        assert [n for n, w in initial.items() if not torch.equal(w, last[n])] == []
    assert new[0].losses == pytest.approx(one[0].losses, rel=1e-5)
    assert new[0].norms == pytest.approx(one[0].norms, rel=1e-5)
    afresh = ranks(1).run(parity.train, alone, SEED + 1, stop=STEPS)
    assert abs(new[0].losses[0] - afresh[0].losses[0]) > 1e-4 * afresh[0].losses[0], "the weights make no difference"


def started(config: Config, folder: Path) -> Config:
    return replace(config, train=replace(config.train, start_from=str(folder)))


def test_where_a_run_starts(tmp_path: Path) -> None:
    config = Case("", "moue").config
    checkpoints = tmp_path / "old" / "checkpoints"
    checkpoints.mkdir(parents=True)
    path, _ = described(checkpoints, config)
    (checkpoints / "latest").write_text(path.name)
    for name in (tmp_path / "old", checkpoints, path):
        assert description.start_of(started(config, name), tmp_path / "new") == path
    assert description.start_of(config, tmp_path / "new") is None
    assert description.start_of(started(config, tmp_path / "gone"), tmp_path / "old") is None, "it goes on"
    with pytest.raises(ConfigError, match=r"train\.start_from: no checkpoint in .*gone"):
        description.start_of(started(config, tmp_path / "gone"), tmp_path / "new")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "layers", 5),
        ("model", "qk_norm", "all"),
        ("model", "head_dim", 16),
        ("model", "clip_qkv", 3.0),
        ("model", "rope_base", 5e5),
        ("moe", "router", "recurrent"),
        ("moe", "stride", 6),
        ("moe", "top_k", 3),
        ("moe", "topology", "full"),
    ],
)
def test_another_model_is_refused_by_its_option(section: str, name: str, value: Any, tmp_path: Path) -> None:
    config = Case("", "moue").config
    path, _ = described(tmp_path, config)
    other = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    with pytest.raises(ConfigError, match=rf"{section}\.{name}=.*this run has {value}"):
        description.start_of(started(other, path), tmp_path / "new")


def test_an_older_description_is_read(tmp_path: Path) -> None:
    """From before there were a head width and a choice of norms."""
    config = Case("", "moue").config
    path, about = described(tmp_path, config)
    del about["weights_alone"], about["function"], about["model"]["model.head_dim"], about["model"]["model.clip_qkv"]
    about["model"]["model.qk_norm"] = True
    (path / "moue.json").write_text(json.dumps(about))
    assert description.check(config, path) == description.Position(3, 96)
    assert description.start_of(started(config, path), tmp_path / "new") == path
    about["model"]["model.qk_norm"] = False
    (path / "moue.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"model\.qk_norm=none"):
        description.check(config, path)


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    config = Case("", "moue").config
    path, about = described(tmp_path, config)
    (path / "moue.json").write_text(json.dumps(about | {"weights_alone": True}))
    with pytest.raises(ConfigError, match=r"weights alone.*train\.start_from"):
        description.check(config, path)
    assert description.start_of(started(config, path), tmp_path / "new") == path
