"""What the terminal shows while a run trains: a live bar, or a line now and then where output goes to a file."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class ProgressBar:
    """Rank 0's progress; `enabled=False` makes every call do nothing.

    On a terminal: a tqdm bar with loss, tokens/s/GPU and the time left; other lines scroll above it. Elsewhere (a Slurm
    log, a pipe): the first step, the last, and one line per `seconds_between_lines`. `per`: what one rank is called.
    Use it in a `with` block: the bar is closed on an exception, too, and the traceback starts on a line of its own.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        enabled: bool = True,
        per: str = "GPU",
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self.total, self.start, self.done = total_steps, start_step, start_step
        self._enabled, self._per = enabled, per
        self._stream = stream or sys.stderr
        self._between = seconds_between_lines
        self._last_line: float | None = None
        self._first_step_end: tuple[float, int] | None = None
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            known = os.get_terminal_size(self._stream.fileno()).columns > 0  # 0 in some containers: no bar at all
            width = {"dynamic_ncols": True} if known else {"ncols": 100}
            self._bar = tqdm(
                total=total_steps, initial=start_step, unit="step", file=self._stream, smoothing=0.1, **width
            )

    def step(self, step: int, *, loss: float, tokens_per_s_per_gpu: float, step_seconds: float) -> None:
        """Step `step` (1-based) is done. loss: nats per token."""
        if not self._enabled:
            return
        advance, self.done = step - self.done, step
        rate = f"{tokens_per_s_per_gpu:,.0f} tokens/s/{self._per}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate}", refresh=False)
            self._bar.update(advance)
            return
        now = time.monotonic()
        # The first step compiles and connects: it would spoil the estimate.
        first_end, first = self._first_step_end = self._first_step_end or (now, step)
        seconds = (now - first_end) / (step - first) if step > first else step_seconds
        if self._last_line is None or now - self._last_line >= self._between or step >= self.total:
            self._last_line = now
            left = f", {_clock(seconds * (self.total - step))} left" if step < self.total else ""
            self._print(f"step {step}/{self.total}  loss {loss:.4f}  {rate}  {step_seconds:.3f} s/step{left}")

    def valid(self, step: int, loss: float) -> None:
        """A validation's loss: a line that stays."""
        self.note(f"step {step}/{self.total}  validation loss {loss:.4f}")

    def note(self, text: str) -> None:
        """A line that stays: a checkpoint written, a warning."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._enabled = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    """4000 -> '1:06:40', 75 -> '1:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class AmountBar:
    """Bytes of work done: a bar on a terminal, elsewhere a line now and then; `enabled=False` shows nothing."""

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self.total, self.done = total, done
        self._what, self._stream, self._between = what, stream or sys.stderr, seconds_between_lines
        self._began, self._at_first, self._last_line = time.monotonic(), done, time.monotonic()
        self._bar: tqdm | None = None
        self._lines = enabled and not self._stream.isatty()
        if enabled and not self._lines:
            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=what, file=self._stream)

    def add(self, amount: int) -> None:
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
        now = time.monotonic()
        if self._lines and now - self._last_line >= self._between:
            self._last_line = now
            rate = max(1e-9, (self.done - self._at_first) / (now - self._began))
            print(
                f"{self._what}: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{_clock((self.total - self.done) / rate)} left",
                file=self._stream,
                flush=True,
            )

    def __enter__(self) -> AmountBar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
