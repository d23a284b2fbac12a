"""The plan's bytes against peaks that were measured on a GPU: the records under benchmarks/results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moue_dist.bench.step.placements import variant
from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.config.load import load_config
from moue_dist.parallel.mesh import build_mesh
from moue_dist.planning.memory import peak
from moue_dist.planning.memory.sizes import GIB
from moue_dist.planning.plan import build_plan
from tests.ranks.spawn import ROOT

H200 = Device("H200", (9, 0), 139.8)
# Every part of a rank that was measured alone. Other records are older than what they would test, and so are those of
# lock step: since they were taken an owner keeps less, and they must be measured again.
OLDER = ("home", "hybrid")
PARTS = [
    (path.name, name)
    for path in sorted((ROOT / "benchmarks" / "results").glob("*_rank_alone.json"))
    for name in json.loads(path.read_text())["runs"][-1]["parts"]
    if name not in OLDER
]


# What a router kept when the records were taken: fp32 score tables, and an fp32 copy of its input.
TABLES_THEN = {"softmax": 1, "norm": 4}


def router_kept_more(config: Config) -> int:
    """Bytes of a layer and microbatch that the records hold and the plan no longer has."""
    e = config.moe
    tokens = config.model.sequence_length * config.train.micro_batch_size // config.parallel.tensor_parallel
    tables = TABLES_THEN[e.router] + bool(config.balance.z_loss) - 1
    return tokens * (2 * config.model.hidden_size + 4 * config.topology().window * tables - 4)


def config_of(run: dict[str, Any], folder: Path) -> Config:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(run["config"]))
    return load_config(file)


def test_there_are_records() -> None:
    assert len(PARTS) >= 3


@pytest.mark.parametrize(("file", "name"), PARTS)
def test_a_measured_peak_is_the_planned_one(
    file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["runs"][-1]
    config = variant(config_of(run, tmp_path), name, run["world"])
    if name == "replicate":  # its only dispatch then
        config = replace(config, moe=replace(config.moe, dispatch="all_to_all"))
    now = peak.layer_activations
    monkeypatch.setattr(peak, "layer_activations", lambda config, *rest: now(config, *rest) + router_kept_more(config))
    at = build_mesh(run["world"], config.parallel).coords(run["rank"])
    planned = build_plan(config, run["world"], H200).stages[at.pp].total_bytes / GIB
    assert planned == pytest.approx(run["parts"][name]["memory_gib"], rel=0.005)
