"""The numbers of a run: JSONL, TensorBoard, rates, power and progress."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moue_dist.config.devices import rank_word
from moue_dist.measuring import provenance
from moue_dist.measuring.metrics import MetricsLog, Rates, StepMeter, peak_rate
from moue_dist.measuring.power import PowerMeter, PowerReading
from moue_dist.measuring.progress import AmountBar, ProgressBar

RATES = Rates(0.5, 1000.0, 0.25, None, "unknown device 'cpu': no peak rate")


def train(log: MetricsLog, step: int, loss: float = 5.0) -> None:
    load = {"pool_max_over_mean": 1.4, "layer_max_over_mean": 2.0, "dead": 0, "entropy": 0.98}
    log.train(step, tokens=step * 64, loss=loss, aux={"uelb": 0.01}, grad_norm=1.2, lr=1e-3, rates=RATES, load=load)


def lines(run: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_the_contract(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        train(log, 1)
        log.valid(1, 4.9)
        log.usage(1, [2, 3], torch.tensor([[1, 2], [3, 0]]).tolist())
        log.event(1, "saved checkpoint step_00000001")
        assert len(lines(tmp_path)) == 4  # on disk before close: line-buffered
    first, valid, usage, event = lines(tmp_path)
    assert set(first) == {
        *("kind", "step", "tokens", "loss", "aux", "grad_norm", "lr", "step_seconds", "tokens_per_s_per_gpu"),
        *("tflops_per_gpu", "mfu", "mfu_note", "data_wait", "memory_gib", "power_watts"),
        *("joules_per_token", "load"),
    }
    assert (first["kind"], first["tokens"], first["mfu"], first["load"]["dead"]) == ("train", 64, None, 0)
    assert valid == {"kind": "valid", "step": 1, "loss": 4.9}
    assert usage == {"kind": "usage", "step": 1, "layers": [2, 3], "counts": [[1, 2], [3, 0]]}
    assert event == {"kind": "event", "step": 1, "what": "saved checkpoint step_00000001"}


def test_nonfinite_numbers_are_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.train(
            1,
            tokens=1,
            loss=math.nan,
            aux={"uelb": numpy.float32("inf")},
            grad_norm=torch.tensor(2.0),
            lr=1,
            rates=RATES,
        )
    (line,) = lines(tmp_path)
    assert (line["loss"], line["aux"]["uelb"], line["grad_norm"]) == (None, None, 2.0)
    assert line["nonfinite"] == ["loss", "aux.uelb"]


def test_resumed_run_has_one_line_per_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            train(log, step, loss=float(step))
        log.event(2, "saved checkpoint step_00000002")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 2, "lo')  # killed while writing
    with MetricsLog(tmp_path, resume_step=2) as log:
        for step in (3, 4, 5):
            train(log, step, loss=-float(step))
    losses = {line["step"]: line["loss"] for line in lines(tmp_path) if line["kind"] == "train"}
    assert losses == {1: 1.0, 2: 2.0, 3: -3.0, 4: -4.0, 5: -5.0}
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "train", "event", "train", "train", "train"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step: event.value for event in board.Scalars("train/loss")} == losses
    assert board.Scalars("load/entropy")[0].value == pytest.approx(0.98)


def test_run_from_the_start_keeps_the_old_file(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with MetricsLog(tmp_path) as log:
            train(log, 1, loss)
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]
    assert json.loads((tmp_path / "metrics.previous.jsonl").read_text())["loss"] == 1.0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, enabled=False) as log:
        train(log, 1)
        log.usage(1, [1], [[1]])
    assert not list(tmp_path.iterdir())


def test_rates_by_hand() -> None:
    meter = StepMeter(flops_per_token=1e9, tokens_per_step=8000, gpus=4, device_name="NVIDIA H200", precision="bf16")
    rates = meter.rates(0.5)
    # 8000 tokens / 0.5 s / 4 GPUs = 4000 tokens/s/GPU; x 1e9 FLOPs = 4 TFLOP/s; H200 dense bf16: 989.4 TFLOP/s
    assert (rates.tokens_per_s_per_gpu, rates.tflops_per_gpu) == (4000.0, 4.0)
    assert rates.mfu == pytest.approx(4 / 989.4)
    assert rates.mfu_note is None


def test_no_peak_no_mfu_and_a_word_why() -> None:
    assert peak_rate("NVIDIA H200", "fp8")[0] == pytest.approx(1978.9)
    for device, precision, word in (
        ("cpu", "bf16", "unknown device"),
        ("H200", "fp32", "fp32"),
        ("A100", "fp8", "no fp8"),
    ):
        peak, note = peak_rate(device, precision)
        assert peak is None
        assert note is not None and word in note


def test_meter_times_what_lies_between() -> None:
    meter = StepMeter(flops_per_token=1.0, tokens_per_step=1, gpus=1, device_name="cpu", precision="fp32")
    with pytest.raises(RuntimeError):
        meter.stop()
    meter.start()
    assert 0 < meter.stop().step_seconds < 1


def test_no_gpu_no_power() -> None:
    meter = PowerMeter(None)
    assert meter.read() == PowerReading(None, None)
    assert meter.note == "no GPU"
    meter.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a host without a GPU")
def test_index_without_gpu_is_no_error() -> None:
    assert PowerMeter(0).read() == PowerReading(None, None)


def run_steps(progress: ProgressBar, first: int, last: int) -> None:
    for step in range(first, last + 1):
        progress.step(step, loss=5.0 / step, tokens_per_s_per_gpu=1234.5, step_seconds=0.25)


def test_log_file_gets_first_last_and_validation_lines() -> None:
    stream = io.StringIO()
    with ProgressBar(100, 10, stream=stream) as progress:
        run_steps(progress, 11, 99)
        progress.valid(99, 4.5)
        run_steps(progress, 100, 100)
    out = stream.getvalue().splitlines()
    assert out[0] == "step 11/100  loss 0.4545  1,234 tokens/s/GPU  0.250 s/step, 0:22 left"
    assert out[1:] == [
        "step 99/100  validation loss 4.5000",
        "step 100/100  loss 0.0500  1,234 tokens/s/GPU  0.250 s/step",
    ]


def test_ranks_of_a_cpu_are_not_called_gpus() -> None:
    stream = io.StringIO()
    with ProgressBar(5, stream=stream, per=rank_word("cpu")) as progress:
        run_steps(progress, 1, 1)
    assert "1,234 tokens/s/rank" in stream.getvalue() and "GPU" not in stream.getvalue()
    assert rank_word("cuda") == "GPU"


def test_log_file_gets_a_line_per_interval() -> None:
    stream = io.StringIO()
    with ProgressBar(5, stream=stream, seconds_between_lines=0.0) as progress:
        run_steps(progress, 1, 5)
    assert len(stream.getvalue().splitlines()) == 5


def test_other_ranks_print_nothing() -> None:
    stream = io.StringIO()
    with ProgressBar(5, stream=stream, enabled=False) as progress:
        run_steps(progress, 1, 5)
        progress.note("x")
    assert stream.getvalue() == ""


def test_terminal_gets_a_bar_that_ends_on_an_exception() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        with pytest.raises(ValueError, match="boom"):
            with ProgressBar(10, 2, stream=stream) as progress:
                run_steps(progress, 3, 4)
                progress.valid(4, 4.5)
                raise ValueError("boom")
    shown = ""
    with contextlib.suppress(OSError):  # EIO: the other end is closed and all of it is read
        while part := os.read(ours, 65536).decode():
            shown += part
    os.close(ours)
    assert "4/10" in shown
    assert "loss 1.2500, 1,234 tokens/s/GPU" in shown
    assert "step 4/10  validation loss 4.5000" in shown
    assert shown.endswith("\n")


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may lie in the checkout of another project, whose commit is none of ours."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    git = ("git", "-C", str(tmp_path))
    installed = tmp_path / "env" / "provenance.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    for words in (("init", "--quiet"), (*who, "commit", "--quiet", "--allow-empty", "-m", "Another project")):
        subprocess.run([*git, *words], check=True)
    assert provenance.commit() is None
    subprocess.run([*git, "add", "env"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert provenance.commit() == head[:12] + "+"


def test_an_amount_is_told_by_lines_off_a_terminal() -> None:
    stream = io.StringIO()
    with AmountBar("tokenizing", 8_000_000, 2_000_000, stream=stream, seconds_between_lines=0) as bar:
        bar.add(2_000_000)
    assert stream.getvalue().startswith("tokenizing: 4 of 8 MB, ") and stream.getvalue().endswith(" left\n")
    with AmountBar("tokenizing", 8, stream=stream, seconds_between_lines=1000) as bar:
        bar.add(8)
    assert stream.getvalue().count("\n") == 1
