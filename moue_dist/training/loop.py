"""The loop around the training step: data, numbers, validation, checkpoints."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.checkpoint import store
from moue_dist.checkpoint.description import Position, newest, start_of
from moue_dist.checkpoint.start import start
from moue_dist.config.devices import rank_word
from moue_dist.data.batches import Batches
from moue_dist.data.corpus import data_folder, prepare_corpus
from moue_dist.data.datasets import build_datasets, describe
from moue_dist.measuring.metrics import MetricsLog, Rates, StepMeter
from moue_dist.measuring.power import PowerMeter
from moue_dist.measuring.progress import ProgressBar
from moue_dist.measuring.slot_log import SlotLog
from moue_dist.model.balance import load_summary
from moue_dist.model.system import System
from moue_dist.parallel.device import peak_bytes
from moue_dist.parallel.pool.synced import UnequalReplicas, check_replicas
from moue_dist.planning.flops import flops_per_token
from moue_dist.training.intervals import Every
from moue_dist.training.move_pool import move_by_use
from moue_dist.training.step import StepResult, TrainingError, evaluate, train_step

GIB = 2**30
GARBAGE_STEPS = 50  # between two collections


def train_loop(system: System, run_dir: Path, *, device_name: str) -> None:
    """Train from the newest checkpoint (or the start) to `train.steps`."""
    config, t = system.config, system.config.train
    batches = _open_data(system, run_dir)
    done = _resume(system, run_dir)
    leader = system.rank == 0
    meter = StepMeter(
        flops_per_token=flops_per_token(config).total,
        tokens_per_step=t.global_batch_size * config.model.sequence_length,
        gpus=system.mesh.world,
        device_name=device_name,
        precision=t.precision,
    )
    with (
        ProgressBar(t.steps, done.step, enabled=leader, per=rank_word(system.device.type)) as bar,
        MetricsLog(run_dir, enabled=leader, resume_step=done.step) as log,
    ):
        _Loop(system, run_dir, batches, meter, bar, log, done).run()
    batches.close()


@dataclass(frozen=True)
class _Finished:
    """A finished step: how many there are with it, what it gave on this rank, how fast it was."""

    number: int
    result: StepResult
    rates: Rates


class _Loop:
    """One run of the loop; its members are what the steps have in common."""

    def __init__(
        self,
        system: System,
        run_dir: Path,
        batches: Batches,
        meter: StepMeter,
        bar: ProgressBar,
        log: MetricsLog,
        done: Position,
    ) -> None:
        self.system, self.run_dir, self.batches, self.meter = system, run_dir, batches, meter
        self.bar, self.log, self.done = bar, log, done
        self.power = PowerMeter(system.device.index if system.device.type == "cuda" else None)
        self.counts_lp: Tensor | None = None  # assignments since the last usage line
        self.use_lp: Tensor | None = None  # the same since the last re-placement
        self.elapsed = self.waited = 0.0  # seconds of steps, and of them for data on this rank, since the last line
        self.slots = SlotLog(
            run_dir,
            system.config,
            system.mesh,
            system.rank,
            system.groups.world,
            microbatches=system.microbatches,
            device=system.device,
            first_step=done.step,
        )

    def run(self) -> None:
        total = self.system.config.train.steps
        if self.done.step >= total:
            self.bar.note(f"already trained: step {self.done.step} of train.steps={total}")
            return
        after_steps = self._after_steps()
        with _own_garbage_days():
            for step in range(self.done.step, total):
                finished = self._train(step)
                for when, what in after_steps:
                    if when.due(finished.number, total):
                        what(finished)

    def _after_steps(self) -> list[tuple[Every, Callable[[_Finished], None]]]:
        """What is done after steps, in this order, and when."""
        t, p = self.system.config.train, self.system.config.parallel
        return [
            (Every(t.log_interval, last="always"), self._log),
            (Every(t.check_replicas_interval), self._check_replicas),
            (Every(t.eval_interval, last="always"), self._validate),
            (Every(t.save_interval, last="always"), self._save),
            (Every(p.replace_interval, last="never"), self._move_pool),
            (Every(GARBAGE_STEPS), self._collect_garbage),
        ]

    def _train(self, step: int) -> _Finished:
        """The step after `step` finished ones."""
        system = self.system
        began, waited = time.perf_counter(), self.batches.seconds_waited
        microbatches = self.batches.microbatches(step, system.coord.dp, system.mesh.data)
        self.waited += self.batches.seconds_waited - waited
        with self.slots.step(step) as timeline:
            # A step ends when the host has read its numbers, which the device computes last: no waiting here.
            self.meter.start()
            result = train_step(system, microbatches, step, timeline)
            rates = self.meter.stop()
        self.elapsed += time.perf_counter() - began
        self.done = Position(step + 1, self.done.tokens + self.meter.tokens_per_step)
        self.counts_lp = result.counts_lp if self.counts_lp is None else self.counts_lp + result.counts_lp
        self.use_lp = result.counts_lp if self.use_lp is None else self.use_lp + result.counts_lp
        return _Finished(step + 1, result, rates)

    def _log(self, finished: _Finished) -> None:
        system, step, result, rates = self.system, finished.number, finished.result, finished.rates
        memory, watts, joules, data_wait = self._gather_machine()
        self.log.train(
            step,
            tokens=self.done.tokens,
            loss=result.loss,
            aux=result.aux,
            grad_norm=result.grad_norm,
            lr=result.lr,
            rates=rates,
            data_wait=data_wait,
            memory_gib=memory,
            power_watts=watts,
            joules_per_token=None if joules is None else joules / self._tokens_since_reading,
            load=load_summary(result.counts_lp, system.context.topology) if system.context.topology.layers else None,
        )
        self.bar.step(
            step, loss=result.loss, tokens_per_s_per_gpu=rates.tokens_per_s_per_gpu, step_seconds=rates.step_seconds
        )

    def _gather_machine(self) -> tuple[float | None, float | None, float | None, float]:
        """Peak memory of the worst rank (GiB), watts of all GPUs, joules of all GPUs since the last reading; the share
        of the time since the last line for which the rank that waits most waited for data.
        """
        system = self.system
        reading = self.power.read()
        self._tokens_since_reading = self.meter.tokens_per_step * system.config.train.log_interval
        on_cuda, unknown = system.device.type == "cuda", math.nan
        memory = peak_bytes() / GIB if on_cuda else _peak_host_memory()
        mine = [memory, *(x or unknown for x in (reading.watts, reading.joules)), self.waited / self.elapsed]
        self.elapsed = self.waited = 0.0
        everyone = torch.empty(system.mesh.world * 4, dtype=torch.float64, device=system.device)
        dist.all_gather_into_tensor(everyone, torch.tensor(mine).to(everyone), group=system.groups.world)
        peaks, watts, joules, waits = everyone.view(-1, 4).t().tolist()
        known = not any(map(math.isnan, (*watts, *joules)))
        return max(peaks), *((sum(watts), sum(joules)) if known else (None, None)), max(waits)

    def _check_replicas(self, finished: _Finished) -> None:
        try:
            check_replicas(self.system.shared.buffers, self.system.groups.world)
        except UnequalReplicas as error:
            raise TrainingError(f"after step {finished.number}: {error}") from None

    def _validate(self, finished: _Finished) -> None:
        system, t, step = self.system, self.system.config.train, finished.number
        if system.config.data.shares[1] > 0:
            indices = range(t.eval_batches)
            held_out = [self.batches.validation(i, system.coord.dp, system.mesh.data) for i in indices]
            loss = evaluate(system, held_out)
            self.log.valid(step, loss)
            self.bar.valid(step, loss)
        if self.counts_lp is not None and system.context.topology.layers:
            dense = system.config.model.dense_layers
            layers = list(range(dense + 1, system.config.model.layers + 1))
            self.log.usage(step, layers, self.counts_lp.long().tolist())
            self.counts_lp = None

    def _move_pool(self, finished: _Finished) -> None:
        """Move the pool to the placement that the use since the last move asks for."""
        assert self.use_lp is not None
        text = move_by_use(self.system, finished.number, self.use_lp)
        self.use_lp = None
        self.log.event(finished.number, text)
        self.bar.note(text)

    def _collect_garbage(self, finished: _Finished) -> None:
        gc.collect()

    def _save(self, finished: _Finished) -> None:
        began = time.perf_counter()
        path = store.save(
            self.system, self.run_dir / "checkpoints", self.done, self.system.config.train.keep_checkpoints
        )
        text = f"saved {path} in {time.perf_counter() - began:.1f} s"
        self.log.event(finished.number, text)
        self.bar.note(text)


@contextmanager
def _own_garbage_days() -> Iterator[None]:
    """Python collects garbage when asked, after the same steps on all ranks: at its own times, one rank after another
    would keep all others waiting. What stands when training begins is not looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _open_data(system: System, run_dir: Path) -> Batches:
    config, t = system.config, system.config.train
    folder = data_folder(config, run_dir)
    if system.rank == 0 and not config.data.blend:
        prepare_corpus(config.data, folder)
    dist.barrier(group=system.groups.world)
    train, valid = build_datasets(config, folder, t.steps * t.global_batch_size, t.eval_batches * t.global_batch_size)
    if system.rank == 0:
        print("\n".join(describe(config, folder, train)), file=sys.stderr, flush=True)
    return Batches(train, valid, config, system.device)


def _resume(system: System, run_dir: Path) -> Position:
    path = newest(run_dir / "checkpoints")
    if path is None:
        begun = start_of(system.config, run_dir)
        if begun is not None:
            start(system, begun)
            if system.rank == 0:
                print(f"starting from the weights of {begun}", flush=True)
        return Position(0, 0)
    done = store.load(system, path)
    if system.rank == 0:
        print(f"resuming from {path}: {done.step} steps, {done.tokens:,} tokens", flush=True)
    return done


def _peak_host_memory() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
