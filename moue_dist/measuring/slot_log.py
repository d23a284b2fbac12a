"""Which steps of a run have their slots recorded, and the file that keeps them: `timeline.json` in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.recording.spans import FILE, Span
from moue_dist.parallel.recording.timeline import Timeline, clock_of

EARLY = (3, 4, 5)  # steps after the start of the process: warm, and there for a short look at a new layout
ALL_RANKS = 16  # jobs up to this size record every rank, larger ones the first rank of each stage
MOST_STEPS, MOST_SPANS = 6, 60_000  # what the file holds at most; the newest step always


class SlotLog:
    """Records the steps worth recording. Every rank has one; the first writes the file."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        mesh: Mesh,
        rank: int,
        group: Any,
        *,
        microbatches: int,
        device: torch.device,
        first_step: int,
    ) -> None:
        """`group` has all ranks; `microbatches` are a rank's in a step; `first_step` is the 0-based step that this
        process starts with."""
        self._config, self._mesh, self._group = config, mesh, group
        self._microbatches, self._path, self._first = microbatches, run_dir / FILE, first_step
        self._timeline = Timeline(config.train.record_slots, clock_of(device))
        self._tells = mesh.world <= ALL_RANKS or rank in _first_ranks(mesh)

    def wants(self, step: int) -> bool:
        """Whether the 0-based `step` is recorded: the early ones, those before a validation, the last."""
        t, done = self._config.train, step + 1
        return t.record_slots and (
            done - self._first in EARLY or done == t.steps or bool(t.eval_interval and done % t.eval_interval == 0)
        )

    @contextmanager
    def step(self, step: int) -> Iterator[Timeline]:
        """The timeline to hand to the training step; collective where the step is recorded."""
        if not self.wants(step):
            yield self._timeline
            return
        self._timeline.begin_step(self._group)
        yield self._timeline
        self._timeline.finish_step(step + 1)
        everyone = self._timeline.gather(self._group, tell=self._tells)
        if everyone is not None:
            self._write(self._line(step + 1, everyone))

    def _line(self, step: int, everyone: list[list[Span]]) -> dict[str, Any]:
        mesh, parallel = self._mesh, self._config.parallel
        lockstep = parallel.placement != "replicate"
        ranks = [
            {"rank": rank, "stage": mesh.coords(rank).pp, "spans": [_short(span) for span in spans]}
            for rank, spans in enumerate(everyone)
            if spans
        ]
        return {
            "step": step,
            "pipeline": mesh.pipeline,
            "virtual": mesh.virtual,
            "microbatches": self._microbatches,
            "schedule": "lock-step 1F1B" if lockstep else "interleaved 1F1B" if mesh.virtual > 1 else "1F1B",
            "lag": parallel.slots_behind,
            "ranks": ranks,
        }

    def _write(self, line: dict[str, Any]) -> None:
        """Add the line and drop what is too much: old steps, and those that a resumed run repeats."""
        lines = [old for old in _read(self._path) if old["step"] < line["step"]] + [line]
        kept: list[dict[str, Any]] = []
        for newest in reversed(lines):
            if kept and (len(kept) == MOST_STEPS or sum(map(_size, [*kept, newest])) > MOST_SPANS):
                break
            kept.insert(0, newest)
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(kept_line, separators=(",", ":")) + "\n" for kept_line in kept))
        draft.replace(self._path)


def _first_ranks(mesh: Mesh) -> list[int]:
    return [mesh.ranks_of_stage(stage)[0] for stage in range(mesh.pipeline)]


def _short(span: Span) -> list[Any]:
    """A span to the microsecond."""
    return [span.kind, round(span.start, 6), round(span.end, 6), span.microbatch, span.layer]


def _size(line: dict[str, Any]) -> int:
    return sum(len(rank["spans"]) for rank in line["ranks"])


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines that an earlier process of this run left; nothing where they cannot be read."""
    try:
        lines = [json.loads(row) for row in path.read_text().splitlines() if row.strip()]
        return [line for line in lines if isinstance(line["step"], int) and _size(line) >= 0]
    except (OSError, ValueError, TypeError, KeyError):
        return []
