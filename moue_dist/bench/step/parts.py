"""The parts of a benchmark, each measured in this process: our training step, and megatron-core's own."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moue_dist.bench.record.numbers import numbers
from moue_dist.bench.step.placements import pool_facts
from moue_dist.bench.step.profile import profile_step
from moue_dist.bench.step.setting import Setting, of_part
from moue_dist.bench.timing.steps import time_steps
from moue_dist.config import ConfigError
from moue_dist.config.devices import Device
from moue_dist.parallel.device import free_unused
from moue_dist.parallel.mesh import build_mesh
from moue_dist.planning.memory.sizes import GIB
from moue_dist.planning.plan import build_plan


def guarded(name: str, setting: Setting, answers: Any) -> dict[str, Any]:
    """A part's entry, or {"error": ...} if it failed on any rank; whatever it held is given back.

    `answers` is a group in which the ranks tell each other how it ended; None where there is but one.
    """
    entry, error = {}, None
    try:
        entry = measure_baseline(setting) if name == "baseline" else measure_ours(of_part(setting, name))
    except ConfigError:
        raise
    except Exception as raised:  # out of memory, a kernel that is not built, a defect: the other part still runs
        error = _one_line(raised)
        print(f"moue: bench: {name} failed on rank {setting.place.rank}: {error}", file=sys.stderr, flush=True)
    _give_back((setting.world, answers))
    if answers is None:
        return {"error": error, "failed_ranks": [setting.place.rank]} if error else entry
    errors: list[str | None] = [None] * setting.place.world_size
    try:
        dist.all_gather_object(errors, error, group=answers)
    except RuntimeError:  # this rank failed alone, and the others hang in a collective that it left
        raise SystemExit(1) from None
    failed = {rank: e for rank, e in enumerate(errors) if e}
    return {"error": next(iter(failed.values())), "failed_ranks": list(failed)} if failed else entry


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {text}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def _give_back(keep: Sequence[Any]) -> None:
    """Forget megatron-core's groups and return every cached block to the device."""
    from moue_dist.parallel.megatron import adapter as megatron

    if fp8 := sys.modules.get("transformer_engine.pytorch.fp8"):
        fp8.FP8GlobalStateManager.reset()  # the next part's FP8 statistics are its own
    megatron.shut_down(keep)
    gc.collect()
    free_unused()


def measure_ours(setting: Setting) -> dict[str, Any]:
    """The entry of moue-dist's own training step."""
    from moue_dist.model.balance import load_summary
    from moue_dist.model.build import build_system
    from moue_dist.training.step import StepResult, train_step

    config, place = setting.config, setting.place
    system = build_system(config, place.rank, place.world_size, setting.resolved)
    if setting.rehearsed:
        from moue_dist.bench.alone.echoes import answer_for_others

        answer_for_others(system)
    results: list[StepResult] = []
    timing = _time(lambda i: results.append(train_step(system, setting.batches[i], i)), setting)
    last = len(setting.batches) - 1
    profile = _profile(lambda: train_step(system, setting.batches[last], last), setting)
    load = load_summary(results[-1].counts_lp, system.context.topology)
    device = setting.device or Device("CPU", (0, 0), 0.0)
    plan = build_plan(config, place.world_size, device)
    planned = (plan.stages[system.coord.pp] if setting.rehearsed else plan.worst).total_bytes / GIB
    pool = pool_facts(
        system,
        lambda timeline: train_step(system, setting.batches[last], last, timeline),
        setting.world,
        alone=setting.rehearsed,
    )
    more: dict[str, Any] = {
        "planned_gib": planned,
        "losses": [r.loss for r in results],
        "load": load,
        "gradients": "fp32",
        **pool,
        **profile,
    }
    return numbers(config, place.world_size, setting.device_name, **timing, **more)


def measure_baseline(setting: Setting) -> dict[str, Any]:
    """The entry of megatron-core's own MoE; its load is that of one more step, which is not timed."""
    from moue_dist.bench.baseline import model as baseline
    from moue_dist.model.balance import load_summary
    from moue_dist.parallel.megatron import adapter as megatron

    config, place, grads = baseline.plain_form(setting.config), setting.place, setting.options.baseline_grads
    mesh = build_mesh(place.world_size, config.parallel)
    megatron.initialise(mesh, config.train.seed, config.train.timeout_seconds / 60)
    stock = baseline.Baseline(config, mesh, mesh.coords(place.rank).pp, setting.resolved, grads)
    losses: list[torch.Tensor] = []
    timing = _time(lambda i: losses.append(stock.step(setting.batches[i], i)), setting)
    last = len(setting.batches) - 1
    profile = _profile(lambda: stock.step(setting.batches[last], last), setting)
    counts_lp = stock.counts_of(lambda: stock.step(setting.batches[last], last), setting.world)
    more: dict[str, Any] = {
        "planned_gib": None,
        "losses": baseline.mean_losses(losses, setting.world),
        "load": load_summary(counts_lp, config.topology()),
        **baseline.describe(setting.config, stock.tconfig, grads),
        **profile,
    }
    return numbers(config, place.world_size, setting.device_name, **timing, **more)


def _time(step: Callable[[int], Any], setting: Setting) -> dict[str, Any]:
    return time_steps(step, setting.options.warmup, setting.options.steps, setting.world)


def _profile(step: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """{"profile": ...} of one more step, where that is asked for."""
    if not setting.options.profile:
        return {}
    return {"profile": profile_step(step, None if setting.rehearsed else setting.world)}
