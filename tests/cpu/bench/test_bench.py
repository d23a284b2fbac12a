"""`moue bench`: the command in two gloo ranks, and what it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moue_dist.bench.apart import measure_apart
from moue_dist.bench.options import BenchOptions
from moue_dist.bench.record.file import earlier_runs, write
from moue_dist.bench.record.numbers import numbers as numbers_of
from moue_dist.cli import main
from moue_dist.config import Config, ConfigError, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moue_dist.planning.flops import flops_per_token

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
name: small
output: {folder}/runs
model: {{layers: 2, hidden_size: 32, heads: 2, sequence_length: 16}}
moe: {{pool: 8, top_k: 2, expert_width: 16, topology: rotational, window: 6, stride: 4, router: universal}}
balance: {{uelb: 0.01}}
parallel: {{expert_parallel: 2}}
optim: {{lr: 0.01}}
train: {{steps: 100000, global_batch_size: 8, micro_batch_size: 2, device: cpu, timeout_seconds: 60}}
data: {{source: {folder}/text.txt}}
"""
PLAIN = ("--moe.topology", "private", "--moe.window", "0", "--moe.stride", "0", "--moe.router", "softmax")


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`moue bench step` on the small configuration, in a process of its own that starts two ranks."""
    (folder / "text.txt").write_text("\n".join(f"the {i}th line of a text" for i in range(2000)))
    (folder / "small.yaml").write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "-m", "moue_dist", "bench", "step", str(folder / "small.yaml"), "--nproc", "2", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run of both parts, and one appended whose baseline megatron-core refuses: top-1 by softmax over the chosen."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "results" / "small.json"
    words = ("--steps", "2", "--warmup", "1", "--output", str(path))
    first = bench(folder, *words, "--baseline", "--note", "as it is", "--profile")
    refused = ("--moe.top-k", "1", "--moe.score", "topk_softmax")
    second = bench(folder, *words, "--baseline", "--append", *PLAIN, *refused)
    return path, [first, second]


def test_both_parts_are_measured_in_one_run(outcome: tuple[Path, list[Any]]) -> None:
    path, (done, _) = outcome
    assert done.returncode == 0, done.stderr
    run = json.loads(path.read_text())["runs"][0]
    assert (run["world"], run["note"], run["config"]["moe"]["window"]) == (2, "as it is", 6)
    assert "bench step" in run["command"] and run["versions"]["megatron-core"] and run["machine"]["cpu"]
    ours, baseline = run["parts"]["ours"], run["parts"]["baseline"]
    for part in (ours, baseline):
        assert len(part["step_ms_all"]) == 2 and min(part["step_ms_all"]) > 0
        assert len(part["losses"]) == 3
        assert part["losses"][0] == pytest.approx(math.log(256), abs=0.2)
        assert part["losses"][2] < part["losses"][0]
        assert 1 <= part["load"]["layer_max_over_mean"] <= 6
        assert part["tokens_per_s_per_gpu"] == pytest.approx(8 * 16 / 2 / (part["step_ms"] / 1e3))
    assert run["ratio"] == pytest.approx(baseline["step_ms"] / ours["step_ms"])
    assert ours["planned_gib"] > 0
    assert "4 experts a layer, softmax router, top-2; the plain form of moe.topology=rotational" in baseline["form"]
    assert baseline["settings"]["moe_aux_loss_coeff"] == pytest.approx(0.01 / 2)
    assert "baseline" in done.stdout and "ours / baseline" in done.stdout
    assert "per rank; GiB" in done.stdout and "in tokens/s/rank" in done.stdout and "GPU" not in done.stdout
    for part in (ours, baseline):
        profile = part["profile"]
        assert profile["of"] == "CPU operators" and len(profile["busy_ms_by_rank"]) == 2
        assert sum(row["count"] for row in profile["ranks"][0]["table"]) > 100
    assert "baseline: one more step, profiled, on rank 0; CPU operators" in done.stdout


def test_a_part_that_fails_leaves_the_others_numbers(outcome: tuple[Path, list[Any]]) -> None:
    path, (_, done) = outcome
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 2, "--append keeps the first run"
    parts = runs[1]["parts"]
    assert done.returncode == 1
    assert "when topk is 1" in parts["baseline"]["error"] and parts["baseline"]["failed_ranks"] == [0, 1]
    assert parts["ours"]["step_ms"] > 0
    assert runs[1]["ratio"] is None
    assert "baseline failed on rank 0" in done.stderr and "Traceback" not in done.stderr


def test_placements_stand_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "placed.json"
    words = ("--steps", "1", "--warmup", "1", "--output", str(path), "--placements", "replicate,home")
    words += ("--moe.force-balance", "true", "--balance.uelb", "0")
    done = bench(tmp_path, *words, "--parallel.pipeline-parallel", "2", "--parallel.expert-parallel", "1")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(path.read_text())["runs"]
    copies, home = run["parts"]["replicate"], run["parts"]["home"]
    assert (copies["lag"], home["lag"], copies["sent_gib"]) == (0, 1, None)
    assert copies["pool_gib"] > home["pool_gib"]
    assert 0 < home["sent_gib"]["across"] == pytest.approx(home["sent_gib_expected"]["across"], rel=0.3)
    assert 0 < home["bubble"] < 1 and home["bubble_ideal"] == pytest.approx(1 / 5)
    assert "time against the" in done.stdout
    assert done.stdout.count("ms/step") == 1 and "replicate: " in done.stdout, "one table, after the parts"
    assert run["command"].endswith("--parallel.expert-parallel 1") and "--part" not in run["command"]
    assert done.stderr == ""


def test_one_rank_of_many_is_measured_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank.json"
    (tmp_path / "small.yaml").write_text(CONFIG.format(folder=tmp_path))
    layout = ["--parallel.pipeline-parallel", "4", "--parallel.expert-parallel", "2", "--model.layers", "4"]
    words = ["--world", "8", "--rank", "5", "--steps", "1", "--warmup", "1", "--placements", "replicate,home"]
    command = [sys.executable, "-m", "moue_dist", "bench", "rank", str(tmp_path / "small.yaml"), *words, *layout]
    done = subprocess.run([*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["rank"], run["world"], run["link"]["latency"]) == (5, 8, pytest.approx(70e-6))
    home = run["parts"]["home"]
    # What this rank sends is about what one of eight sends: its own rows, and those of others on their way back.
    assert home["sent_gib"]["across"] == pytest.approx(home["sent_gib_expected"]["across"], rel=0.5)
    assert home["bubble"] is None and home["step_ms"] > 0
    assert "rank 5 of 8, alone" in done.stdout
    assert main(["bench", "rank", str(tmp_path / "small.yaml"), "--world", "8", "--rank", "8"]) == 2
    assert "--rank 8" in capsys.readouterr().err
    assert main(["bench", "rank", str(tmp_path / "small.yaml"), "--world", "2", "--placements", "hom"]) == 2
    assert "'hom' is none of" in capsys.readouterr().err


def test_the_rates_are_those_of_the_median_step() -> None:
    config = Config(train=TrainConfig(global_batch_size=4, precision="bf16"))
    got = numbers_of(config, 2, "NVIDIA H200", [10.0, 90.0, 20.0], losses=[1.0])
    assert (got["step_ms"], got["step_ms_all"], got["losses"]) == (20.0, [10.0, 90.0, 20.0], [1.0])
    assert got["tokens_per_s_per_gpu"] == pytest.approx(4 * 128 / 0.020 / 2)
    tflops = got["tokens_per_s_per_gpu"] * flops_per_token(config).total / 1e12
    assert got["tflops_per_gpu"] == pytest.approx(tflops)
    assert got["mfu"] == pytest.approx(tflops / 989.4)


def test_options_survive_the_way_to_the_ranks() -> None:
    options = BenchOptions(steps=2, warmup=0, baseline=True, output="a b.json", note="--not an option")
    from moue_dist.cli.main import _parser

    known, rest = _parser().parse_known_args(["bench", "step", "c.yaml", *options.as_words(), "--train.seed", "1"])
    assert {name: getattr(known, name) for name in vars(options)} == vars(options)
    assert rest == ["--train.seed", "1"]


def test_parts_join_the_run_that_they_belong_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first part ends without a word, as a rank that is killed does: the second begins the run."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": ["an older run"]}))
    asked = []

    def start(part: BenchOptions) -> int:
        asked.append((part.part, part.append, part.join))
        if part.part == "home":
            path.write_text(json.dumps({"runs": [run]}))
        return int(part.part == "replicate")

    numbers = numbers_of(Config(), 1, "CPU", [5.0], losses=[1.0], load={"layer_max_over_mean": 1.0})
    numbers |= {"memory_gib": None, "planned_gib": None, "sent_gib": None, "sent_gib_expected": {"across": 0.0}}
    numbers |= {"pool_gib": 1.0, "copies_gib_expected": {"across": 0.0}, "bubble": None, "bubble_ideal": 0.5}
    run = {"parts": {"home": numbers}, "world": 1, "config": {"name": "x"}, "machine": {}, "ratio": None}
    options = BenchOptions(output=str(path), placements="replicate,home,hybrid")
    assert measure_apart(options, "moue bench step", start) == 1
    assert asked == [("replicate", False, False), ("home", False, False), ("hybrid", False, True)]
    assert "home" in capsys.readouterr().out
    asked.clear()
    assert measure_apart(options, "moue bench step", lambda part: 1) == 1
    assert capsys.readouterr().out == "", "an older run of the file is not shown as if it were this one"


def test_a_file_of_other_things_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(path, [{"loss": float("nan")}])
    assert earlier_runs(path, append=True) == [{"loss": "nan"}]
    assert earlier_runs(path, append=False) == []
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="is no file of benchmark runs"):
        earlier_runs(path, append=True)
    with pytest.raises(ConfigError, match="choose a file"):
        earlier_runs(tmp_path, append=False)


def test_a_shape_that_megatron_core_cannot_take_is_refused() -> None:
    from moue_dist.bench.baseline.model import plain_form

    config = Config(
        model=ModelConfig(layers=4), moe=MoEConfig(pool=8, top_k=4, topology="full"), parallel=ParallelConfig()
    )
    with pytest.raises(ConfigError, match=r"2 experts a layer .* moe.top_k=4"):
        plain_form(config)
    with pytest.raises(ConfigError, match=r"parallel\.expert_parallel=4"):
        plain_form(replace(config, moe=replace(config.moe, top_k=1), parallel=ParallelConfig(expert_parallel=4)))


@pytest.mark.parametrize("words", [["--steps", "0"], ["--warmup", "-1"], ["--baseline-grads", "fp16"]])
def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "step", "configs/tiny.yaml", *words])
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err
