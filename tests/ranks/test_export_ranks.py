"""Whatever the layout that saved a checkpoint, what is exported is the whole model, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moue_dist.interchange.outgoing.export import export
from tests.cpu.interchange import trained
from tests.cpu.interchange.test_exported_files import differing, read_back, tensors_of
from tests.ranks.spawn import RankPool


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("pp2 ep2 dp2", "moue"),
        ("pp2 v2", "tied head"),
        ("ep2 tp2 dp2", "qwen"),
        ("tp2", "olmoe"),
        ("dp2 plain", "moue"),
    ],
)
def test_any_layout_is_exported(layout: str, name: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    world = trained.Case(layout, name).world
    made = trained.make(name, ranks(world), tmp_path / "run", layout)
    done = export(made.run, tmp_path / "out", show_progress=False)
    assert differing(read_back(tensors_of(done.folder), made.config, "moue"), made.weights) == []


@pytest.mark.parametrize("layout", ["pp2", "dp2 plain"])
def test_masters_of_16_bit_weights_are_found(layout: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    made = trained.make(trained.BFLOAT, ranks(2), tmp_path / "run", layout)
    done = export(made.run, tmp_path / "out", dtype="fp32", show_progress=False)
    exact = read_back(tensors_of(done.folder), made.config, "moue")
    assert differing({n: t.to(made.weights[n].dtype) for n, t in exact.items()}, made.weights) == []
    assert not torch.equal(exact["output_layer.weight"], made.weights["output_layer.weight"].float())
