"""A run that stops and resumes is the run that did not stop: exactly on the same layout, on another to rounding."""

from __future__ import annotations

import json
import subprocess
import sys
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
from tests.ranks.spawn import ROOT, RankPool

HALF, WHOLE, SEED = 3, 6, 0

SAME = [
    ("pp2 ep2 dp2", "moue"),
    ("pp2 ep2 dp2 full overlap", "recurrent"),
    ("pp2 v2", "moue"),
    ("pp2 v2 overlap", "tied head"),
    ("pp2 dp2", "tied head"),
    ("dp2 overlap plain", "qwen"),
    ("ep2 tp2 dp2", "moue"),
    ("", "deepseek"),
    ("pp2 ep2 dp2", "converted"),
    ("pp2 ep2 tp2", "olmoe"),
]
# From, to, model.
MOVED = [
    ("pp2 ep2 dp2", "ep2 dp2", "moue"),
    ("pp2 ep2 dp2", "", "moue"),
    ("pp2 ep2 dp2", "pp4", "moue"),
    ("", "pp2 ep2 dp2 overlap", "unipool"),
    ("pp2 v2", "pp2", "moue"),
    ("pp2 ep2 dp2", "pp2 v2", "moue"),
    ("pp2 ep2 dp2", "dp2", "deepseek"),
    ("pp2", "", "tied head"),
    ("", "pp2", "tied head"),
    ("pp2 dp2", "pp2 v2", "tied head"),
    ("pp2 plain", "plain", "moue"),
    ("tp2", "dp2", "moue"),
    ("pp2 2-3", "pp2 ep2 dp2 3-2", "five layers"),
    ("tp2", "pp2 dp2", "olmoe"),
    ("pp2", "ep2 dp2", "converted, sigmoid"),
]


def config_of(layout: str, model: str) -> Config:
    config = Case(layout, model).config
    return replace(config, train=replace(config.train, steps=WHOLE))


def halves(
    first: str, second: str, model: str, ranks: Callable[[int], RankPool], folder: Path
) -> tuple[list[parity.Trained], list[parity.Trained]]:
    """The run of `first` without a stop, and the second half resumed on `second`."""
    start, end = Case(first, model).world, Case(second, model).world
    whole = ranks(start).run(parity.train, config_of(first, model), SEED, stop=WHOLE)
    ranks(start).run(parity.train, config_of(first, model), SEED, stop=HALF, save=folder)
    resumed = ranks(end).run(parity.train, config_of(second, model), SEED, start=HALF, stop=WHOLE, load=folder)
    return whole, resumed


@pytest.mark.parametrize(("layout", "model"), SAME)
def test_resumed_on_the_same_layout(layout: str, model: str, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    whole, resumed = halves(layout, layout, model, ranks, tmp_path)
    assert resumed[0].losses == whole[0].losses[HALF:]
    assert resumed[0].norms == whole[0].norms[HALF:]
    assert torch.equal(resumed[0].bias, whole[0].bias)
    final, expected = parity.merge(resumed, "final"), parity.merge(whole, "final")
    assert final.keys() == expected.keys()
    assert [n for n, w in final.items() if not torch.equal(w, expected[n])] == []


@pytest.mark.parametrize(("first", "second", "model"), MOVED)
def test_resumed_on_another_layout(
    first: str, second: str, model: str, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    whole, resumed = halves(first, second, model, ranks, tmp_path)
    assert resumed[0].losses == pytest.approx(whole[0].losses[HALF:], rel=1e-5)
    assert resumed[0].norms == pytest.approx(whole[0].norms[HALF:], rel=1e-5)
    final, expected = parity.merge(resumed, "final"), parity.merge(whole, "final")
    assert final.keys() == expected.keys()
    errors = {n: float((w - expected[n]).norm() / expected[n].norm()) for n, w in final.items()}
    assert {n: e for n, e in errors.items() if not e < 1e-5} == {}


def refusal(config: Config, folder: Path) -> str | None:
    """Inside a rank: why the checkpoint in `folder` does not load."""
    from moue_dist.checkpoint import store
    from moue_dist.parallel.megatron import adapter as megatron

    system, path = parity.build(config), description.newest(folder)
    try:
        assert path is not None
        store.load(system, path)
    except ConfigError as error:
        return str(error)
    finally:
        megatron.shut_down()
    return None


@pytest.mark.parametrize(
    ("layout", "model", "option"),
    [
        ("plain", "moue", "parallel.distributed_optimizer=true"),
        ("", "recurrent", "moe.router=universal"),
        ("", "five layers", "model.layers=4"),
    ],
)
def test_another_model_or_optimizer_is_refused_by_name(
    layout: str, model: str, option: str, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    ranks(1).run(parity.train, config_of("", "moue"), SEED, stop=1, save=tmp_path)
    (message,) = ranks(1).run(refusal, config_of(layout, model), tmp_path)
    assert message is not None
    assert option in message


def described(folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """A checkpoint folder with nothing but the moue.json that `config` would write, and what is in it."""
    from moue_dist.parallel.mesh import build_mesh

    path = folder / "step_00000003"
    path.mkdir()
    about = description.describe(config, build_mesh(1, config.parallel), description.Position(3, 96))
    (path / "moue.json").write_text(json.dumps(about))
    return path, about


def test_a_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = config_of("", "moue")
    path, about = described(tmp_path, config)
    assert about["format"] == description.FORMAT
    assert description.check(config, path) == description.Position(3, 96)


GONE = "(left out)"  # a text: workers of one test run must agree on the names of cases


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format": 1, "distributed_optimizer": GONE}, "has format 1;"),  # as they were written before format 2
        ({"format": 3, "model": "elsewhere"}, "has format 3;"),
        ({"format": "two"}, "has format two;"),
        ({"format": GONE}, "names no format;"),
        ({"step": GONE}, "no entry 'step'"),
        ({"tokens": "96"}, "entry 'tokens' is '96'"),
        ({"step": True}, "entry 'step' is True"),
        ({"distributed_optimizer": GONE}, "no entry 'distributed_optimizer'"),
        ({"distributed_optimizer": None}, "entry 'distributed_optimizer' is None"),
        ({"model": GONE}, "no entry 'model'"),
        ({"model": []}, "entry 'model' is []"),
        ({"model": {"model.layers": 4}}, "lacks model."),
    ],
    ids=str,
)
def test_another_format_or_a_broken_entry_is_refused_by_name(
    changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    config = config_of("", "moue")
    path, about = described(tmp_path, config)
    about = {name: value for name, value in (about | changes).items() if value != GONE}
    (path / "moue.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError) as refused:
        description.check(config, path)
    for part in (str(path), found, f"reads format {description.FORMAT}:", str(tmp_path / "latest"), "name="):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b'{"format": 2, "st', "is no JSON"), (b"", "is no JSON"), (b"\xff\x00", "is no JSON"), (b"[]", "no format")],
)
def test_a_garbled_description_is_refused_by_name(content: bytes, found: str, tmp_path: Path) -> None:
    config = config_of("", "moue")
    path, _ = described(tmp_path, config)
    (path / "moue.json").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        description.check(config, path)
    for part in (str(path), found, f"reads format {description.FORMAT}:", "name="):
        assert part in str(refused.value)


def test_the_command_line_resumes(tmp_path: Path) -> None:
    """`moue train` twice: the second run goes on from `latest`, and the log has every step once, in order."""

    def train(steps: int) -> str:
        overrides = {
            "output": tmp_path,
            "name": "r",
            "train.steps": steps,
            "train.global_batch_size": 4,
            "train.micro_batch_size": 2,
            "train.eval_interval": 0,
            "train.eval_batches": 1,
            "train.save_interval": 2,
            "model.sequence_length": 32,
            "data.max_megabytes": 0.3,
            "parallel.expert_parallel": 1,
        }
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "moue_dist", "train", "configs/tiny.yaml", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def lines(kind: str) -> list[dict]:
        text = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, text) if line["kind"] == kind]

    assert "resuming" not in train(3)
    before = lines("train")
    assert [line["step"] for line in before] == [1, 2, 3]
    assert "3 steps" in train(6)
    after = lines("train")
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert after[:3] == before
    assert [line["tokens"] for line in after] == [128 * n for n in range(1, 7)]
    assert (tmp_path / "r" / "checkpoints" / "latest").read_text().strip() == "step_00000006"
