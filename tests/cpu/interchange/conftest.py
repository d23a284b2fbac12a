"""Exported folders of small trained checkpoints, and what transformers says to them: made once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moue_dist.interchange.outgoing.export import Exported, export
from tests.cpu.interchange import trained
from tests.cpu.interchange.trained import BFLOAT, MOUE, PLAIN, Folders
from tests.ranks.spawn import RankPool


@pytest.fixture(scope="session")
def folders(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    home = tmp_path_factory.mktemp("out")
    made = {name: trained.make(name, ranks(1), home / name / "run") for name in dict.fromkeys((*MOUE, *PLAIN, BFLOAT))}
    exported: dict[tuple[str, str], Exported] = {}
    for form, names in (("moue", (*MOUE, BFLOAT)), ("plain", PLAIN)):
        for name in names:
            done = export(made[name].run, home / name / form, form, "fp32", show_progress=False)  # type: ignore[arg-type]
            exported[name, form] = done
    small = export(made["moue"].run, home / "sharded", "moue", shard_gb=3e-5, show_progress=False)
    return Folders(made, {**exported, ("moue", "sharded"): small})


@pytest.fixture(scope="session")
def answers(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    asked = {
        f"{name}, {form}": (done.folder, trained.tokens_bs(folders.made[name].config))
        for (name, form), done in folders.exported.items()
    }
    return trained.in_transformers(asked, tmp_path_factory.mktemp("answers"))
