"""More layers over the same pool: at first the model that it was, then one that trains all its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moue_dist.checkpoint.description import find
from moue_dist.config import Config, ConfigError, ParallelConfig
from moue_dist.config.load import dump_config, load_config
from moue_dist.interchange.incoming.convert import convert
from moue_dist.interchange.incoming.deepen import GAIN, deepen
from moue_dist.interchange.incoming.forms import Form
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool
from tests.ranks.test_convert import logits_of, made, trained_here

__all__ = ["made"]
SAME = 1e-5  # of logits of about 1: a new layer adds GAIN ** 2 of what experts give


def runs(config: Config, folder: Path) -> Path:
    """A run's folder for what is saved."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def first_losses(config: Config, path: Path, ranks: Callable[[int], RankPool], world: int = 1) -> parity.Trained:
    return ranks(world).run(parity.train, config, 7, stop=2, begin=path)[0]


@pytest.mark.parametrize(
    "model", ["moue", "recurrent", "plain", "mixtral", "deepseek", "unipool", "tied head", "five layers", "qwen"]
)
def test_a_deeper_model_begins_as_it_was(model: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = Case("", model).config
    run = runs(config, tmp_path / "run")
    ranks(1).run(parity.train, config, 0, stop=2, save=run / "checkpoints")
    deeper = deepen(run, tmp_path / "deeper", 3)
    written = load_config(tmp_path / "deeper" / "config.yaml")
    assert (written.model, written.moe, written.optim) == (deeper.model, deeper.moe, deeper.optim)
    assert deeper.model.layers == config.model.layers + 3 and deeper.moe.pool == config.moe.pool
    windows = config.topology().windows
    assert deeper.topology().windows[: len(windows)] == windows
    new = replace(deeper, balance=replace(deeper.balance, uelb=0, pool=0, layer=0, z_loss=0))
    old = replace(config, balance=new.balance)
    was, now = (first_losses(c, find(f), ranks) for c, f in ((old, run), (new, tmp_path / "deeper")))
    assert now.losses[0] == pytest.approx(was.losses[0], rel=SAME)
    moved = {n: w for n, w, _ in now.final}
    for n, w, _ in now.initial:
        assert not torch.equal(w, moved[n]) or n.startswith("pool."), f"{n} of the deeper model does not learn"


def test_a_deeper_model_in_a_layout(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = Case("", "moue").config
    run = runs(config, tmp_path / "run")
    ranks(1).run(parity.train, config, 0, stop=1, save=run / "checkpoints")
    deeper = deepen(run, tmp_path / "deeper", 2)
    one = first_losses(deeper, find(tmp_path / "deeper"), ranks)
    spread = replace(deeper, parallel=ParallelConfig(pipeline_parallel=2, expert_parallel=2, placement="home"))
    many = first_losses(spread, find(tmp_path / "deeper"), ranks, 4)
    assert many.losses == pytest.approx(one.losses, rel=1e-5)


def test_a_converted_model_gets_deeper(made: Path, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Its mask stays with the old layers."""
    convert(made / "olmoe", tmp_path / "a", Form("full"))
    deepen(tmp_path / "a", tmp_path / "b", 2)
    (ours,) = ranks(1).run(logits_of, trained_here(tmp_path / "b"))
    assert float((ours - torch.load(made / "olmoe.pt")).abs().max()) < SAME
    assert GAIN == 1e-3


def test_a_mask_on_its_way_is_refused(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = Case("", "converted").config
    run = runs(config, tmp_path / "run")
    ranks(1).run(parity.train, config, 0, stop=2, save=run / "checkpoints")
    with pytest.raises(ConfigError, match=r"mask is not gone yet \(step 2 of moe\.mask_steps=4\)"):
        deepen(run, tmp_path / "deeper", 1)
    assert not (tmp_path / "deeper").exists()
