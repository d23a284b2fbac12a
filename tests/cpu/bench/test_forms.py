"""`moue bench dispatch`, `kernels` and `layer` as commands: what they write, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moue_dist.cli import main

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
name: small
output: {folder}/runs
model: {{layers: 4, hidden_size: 32, heads: 2, sequence_length: 16}}
moe: {{pool: 8, top_k: 2, expert_width: 16, topology: rotational, window: 4, stride: 2}}
parallel: {{pipeline_parallel: 2}}
train: {{global_batch_size: 8, micro_batch_size: 2, device: cpu, timeout_seconds: 60}}
"""


def bench(folder: Path, form: str, *words: str) -> tuple[dict[str, Any], str]:
    """The record and the output of `moue bench FORM` in a process of its own, which is the one rank."""
    (folder / "small.yaml").write_text(CONFIG.format(folder=folder))
    path = folder / f"{form}.json"
    command = [sys.executable, "-m", "moue_dist", "bench", form, str(folder / "small.yaml"), "--output", str(path)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(path.read_text())["runs"]
    assert run["what"] == form and run["commit"] and run["versions"]["torch"] and run["machine"]["cpu"]
    assert f"bench {form}" in run["command"] and run["config"]["name"] == "small"
    assert f"written: {path}" in done.stdout
    return run, " ".join(done.stdout.split())


def test_dispatch(tmp_path: Path) -> None:
    run, said = bench(tmp_path, "dispatch", "--samples", "3", "--nproc", "1", "--note", "one rank")
    part = run["parts"]["movement"]
    assert part["first"] == "gathered" and part["agree"] and part["tokens"] == 2 * 16
    assert [len(way["ms_all"]) for way in part["ways"].values()] == [3, 3]
    assert part["gb_out_of_a_gpu"] == {"gathered": 0.0, "all_to_all": 0.0}
    assert run["note"] == "one rank" and run["options"]["samples"] == 3
    assert "dispatch, small: 1 x CPU rank" in said and "movement" in said


def test_kernels(tmp_path: Path) -> None:
    run, said = bench(tmp_path, "kernels", "--samples", "2")
    parts = run["parts"]
    assert run["dtype"] == "float32" and run["impl"] == "torch" and run["sizes"]["hidden"] == 32
    assert {"w_in forward", "w_out wgrad, 2 layers", "order of rows", "AdamW, clipped"} <= set(parts)
    for part in parts.values():
        assert part["agree"] and part["first"] == "ours"
        (other,) = [way for name, way in part["ways"].items() if name != "ours"]
        assert len(other["ms_all"]) == 2 and other["ratio"] > 0 and other["difference"] <= part["tolerance"]
    assert "kernels, small: 1 x CPU rank" in said and "a CPU: the references, small sizes" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dispatch", "--baseline"], "--baseline is for moue bench step and rank; leave it out of dispatch"),
        (["step", "--samples", "3"], "--samples is for moue bench kernels and dispatch"),
        (["kernels", "--nproc", "2"], "moue bench kernels is one process"),
        (["kernels", "--steps", "2"], "--steps is for moue bench step and rank; leave it out of kernels"),
        (["step", "--gbps", "100"], "--gbps is for moue bench rank"),
        (["dispatch", "--nproc", "3", "--parallel.expert-parallel", "2"], "3 processes"),
    ],
)
def test_options_of_other_forms_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    form, *rest = words
    assert main(["bench", form, str(ROOT / "configs" / "tiny.yaml"), *rest]) == 2
    assert said in capsys.readouterr().err
