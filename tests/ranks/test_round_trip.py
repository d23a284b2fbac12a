"""Out and in again: `moue export`, then `moue convert`, gives the run's weights back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moue_dist.checkpoint.description import find
from moue_dist.config import ConfigError
from moue_dist.config.load import load_config
from moue_dist.interchange.incoming.convert import convert
from moue_dist.interchange.incoming.forms import Form
from tests.ranks import parity
from tests.ranks.cases import MODELS, Case
from tests.ranks.spawn import RankPool
from tests.ranks.test_deepen import runs

exporting: Any = pytest.importorskip("moue_dist.interchange.outgoing.export", reason="there is no export to come from")
HIDDEN = {"converted", "converted, sigmoid"}  # exported before their mask is gone, they do not come back


@pytest.mark.parametrize("model", sorted(MODELS.keys() - HIDDEN))
def test_a_moue_folder_comes_back(model: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = Case("", model).config
    run = runs(config, tmp_path / "run")
    old = ranks(1).run(parity.train, config, 0, stop=2, save=run / "checkpoints")
    exporting.export(run, tmp_path / "out", "moue", "fp32", show_progress=False)
    convert(tmp_path / "out", tmp_path / "back", Form())
    back = load_config(tmp_path / "back" / "config.yaml")
    assert back.model == config.model
    assert back.topology() == config.topology()
    same = {"topology": back.moe.topology, "window": back.moe.window, "stride": back.moe.stride}
    same |= {"group": back.moe.group, "experts": "auto"}
    state = {} if config.moe.router in ("universal", "recurrent") else {"state_width": back.moe.state_width}
    plain = {"merge_wgrad": 0, "dispatch": "auto", "headroom": back.moe.headroom}
    assert back.moe == replace(config.moe, **same, **state, **plain)
    again = replace(back, train=config.train, optim=config.optim, balance=config.balance)
    new = ranks(1).run(parity.train, again, 1, stop=1, begin=find(tmp_path / "back"))
    last, first = parity.merge(old, "final"), parity.merge(new, "initial")
    assert first.keys() == last.keys()
    assert [n for n, w in first.items() if not torch.equal(w, last[n])] == []
    if config.balance.bias:
        assert old[0].bias.any()


@pytest.mark.parametrize("model", ["plain", "switch", "softmax on full"])
def test_a_plain_folder_comes_back(model: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Its loss is the run's; where the run's topology is private its weights are, too."""
    config = Case("", model).config
    run = runs(config, tmp_path / "run")
    old = ranks(1).run(parity.train, config, 0, stop=2, save=run / "checkpoints")
    exporting.export(run, tmp_path / "out", "plain", "fp32", show_progress=False)
    convert(tmp_path / "out", tmp_path / "back", Form())
    back = load_config(tmp_path / "back" / "config.yaml")
    again = replace(back, train=config.train, optim=config.optim, balance=config.balance)
    new = ranks(1).run(parity.train, again, 1, stop=1, begin=find(tmp_path / "back"))
    same = ranks(1).run(parity.train, config, 1, stop=1, begin=find(run))
    assert new[0].losses == pytest.approx(same[0].losses, rel=1e-6)
    if config.moe.topology == "private":
        last, first = parity.merge(old, "final"), parity.merge(new, "initial")
        assert [n for n, w in first.items() if not torch.equal(w, last[n])] == []


def test_what_does_not_come_back(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """A model whose mask is not gone, and one that is to become another pool."""
    config = Case("", "converted").config
    run = runs(config, tmp_path / "run")
    ranks(1).run(parity.train, config, 0, stop=2, save=run / "checkpoints")
    exporting.export(run, tmp_path / "out", "moue", "fp32", show_progress=False)
    with pytest.raises(ConfigError, match=r"before its mask had become 0.*train\.start_from"):
        convert(tmp_path / "out", tmp_path / "back", Form())
    with pytest.raises(ConfigError, match="keeps its pool"):
        convert(tmp_path / "out", tmp_path / "back", Form("full"))
    assert not (tmp_path / "back").exists()
