"""A run's numbers: metrics.jsonl and TensorBoard, and the rates of a step.

One JSON object per line, by `kind`: train, valid, usage, event. Losses are nats per token, times seconds, memory GiB,
power watts. A number that is not finite is written as null and named in the line's "nonfinite" list, so that every line
is plain JSON and a NaN is not lost: loss=nan -> {"kind": "valid", "step": 5, "loss": null, "nonfinite": ["loss"]}.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moue_dist.config.devices import find_device


@dataclass(frozen=True)
class Rates:
    """How fast one step was. MFU is TFLOP/s over the device's dense peak: FP8's for fp8, bf16's for bf16."""

    step_seconds: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    mfu_note: str | None  # why there is no MFU


class StepMeter:
    """Times steps. The caller synchronises the device before `start` and before `stop`.

    flops_per_token: model FLOPs of forward and backward per token, recomputation not counted.
    tokens_per_step: of the global batch. gpus: ranks that share it.
    """

    def __init__(
        self, *, flops_per_token: float, tokens_per_step: int, gpus: int, device_name: str, precision: str
    ) -> None:
        self.flops_per_token, self.tokens_per_step, self.gpus = flops_per_token, tokens_per_step, gpus
        self.peak_tflops, self.note = peak_rate(device_name, precision)
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> Rates:
        if self._started is None:
            raise RuntimeError("StepMeter.stop() without start()")
        seconds, self._started = time.perf_counter() - self._started, None
        return self.rates(seconds)

    def rates(self, step_seconds: float) -> Rates:
        """The rates of a step that took `step_seconds`."""
        tokens_per_s = self.tokens_per_step / step_seconds / self.gpus
        tflops = self.flops_per_token * tokens_per_s / 1e12
        mfu = None if self.peak_tflops is None else tflops / self.peak_tflops
        return Rates(step_seconds, tokens_per_s, tflops, mfu, self.note)


def peak_rate(device_name: str, precision: str) -> tuple[float | None, str | None]:
    """Dense peak TFLOP/s of a device (its name as torch gives it), or None and the reason."""
    device = find_device(device_name)
    if device is None:
        return None, f"unknown device {device_name!r}: no peak rate"
    if precision == "fp32":
        return None, "fp32: MFU is defined against the bf16 or FP8 peak"
    peak = device.peak_tflops(precision)
    return (peak, None) if peak else (None, f"{device_name} has no {precision} peak rate")


class MetricsLog:
    """Appends to `<run_dir>/metrics.jsonl` and `<run_dir>/tensorboard`, enabled=False on all ranks but one.

    Lines later than `resume_step` (and a last line cut short by a kill) are dropped first, so a resumed run has one
    line per step. A run from the start (resume_step=0) keeps an older file as metrics.previous.jsonl.
    """

    def __init__(self, run_dir: str | Path, enabled: bool = True, resume_step: int = 0) -> None:
        self._stream = self._board = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        if resume_step:
            _rewrite(path, resume_step)
        elif path.exists():
            os.replace(path, run_dir / "metrics.previous.jsonl")
        self._stream = path.open("a", buffering=1, encoding="utf-8")
        # Imported here: it takes a second, and only the writing process needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1, flush_secs=10)

    def train(
        self,
        step: int,
        *,
        tokens: int,
        loss: float,
        aux: Mapping[str, float],
        grad_norm: float,
        lr: float,
        rates: Rates,
        data_wait: float | None = None,
        memory_gib: float | None = None,
        power_watts: float | None = None,
        joules_per_token: float | None = None,
        load: Mapping[str, float] | None = None,
    ) -> None:
        """A finished optimizer step. tokens: seen since the run's start; load: of the pool and its worst layer.

        data_wait: share of the time since the last line for which the worst rank waited for data, 0 to 1.
        """
        line = {"tokens": tokens, "loss": loss, "aux": dict(aux), "grad_norm": grad_norm, "lr": lr, **asdict(rates)}
        line |= {
            "data_wait": data_wait,
            "memory_gib": memory_gib,
            "power_watts": power_watts,
            "joules_per_token": joules_per_token,
        }
        self._write("train", step, line | {"load": None if load is None else dict(load)})

    def valid(self, step: int, loss: float) -> None:
        self._write("valid", step, {"loss": loss})

    def usage(self, step: int, layers: Sequence[int], counts: Sequence[Sequence[int]]) -> None:
        """Tokens that each pool expert got since the last such line: counts [len(layers)][P], layers 1-based."""
        self._write("usage", step, {"layers": layers, "counts": counts})

    def event(self, step: int, what: str) -> None:
        self._write("event", step, {"what": what})

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()
        self._stream = self._board = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        if self._stream is None or self._board is None:
            return
        bad: list[str] = []
        line = {"kind": kind, "step": int(step), **_plain(fields, "", bad)}
        if bad:
            line["nonfinite"] = bad
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        if kind == "event":
            self._board.add_text("event", line["what"], step)
        elif kind == "usage":
            for layer, row in zip(line["layers"], line["counts"], strict=True):
                self._board.add_scalar(f"usage/layer_{layer:03d}_busiest_share", max(row) / max(sum(row), 1), step)
        else:
            for name, value in _scalars(line, kind):
                self._board.add_scalar(name, value, step)


def _plain(value: Any, name: str, bad: list[str]) -> Any:
    """JSON's own types; tensors and numpy values through tolist(). Names of non-finite numbers go to `bad`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}" if name else str(key), bad) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]", bad) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), name, bad)
    number = float(value)
    if math.isfinite(number):
        return number
    bad.append(name)
    return None


def _scalars(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """TensorBoard's tags: {'loss': 1, 'aux': {'uelb': 2}} under 'train' -> train/loss, aux/uelb."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, name)
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}/{name}", value


def _rewrite(path: Path, last_step: int) -> None:
    """Keeps the whole lines up to `last_step`; the old file stands until the new one is on disk."""
    if not path.exists():
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with path.open(encoding="utf-8", errors="replace") as old, temporary.open("w", encoding="utf-8") as new:
        for text in old:
            try:
                keep = text.endswith("\n") and json.loads(text)["step"] <= last_step
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep:
                new.write(text)
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)
