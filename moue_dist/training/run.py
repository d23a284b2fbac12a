"""A run from a configuration to its end: start, resume, loop, evaluate, save."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moue_dist.config import Config, ConfigError
from moue_dist.config.devices import Device, describe_device
from moue_dist.config.load import dump_config
from moue_dist.kernels.backend import has_transformer_engine
from moue_dist.measuring.provenance import commit, versions
from moue_dist.parallel.device import has_cuda, this_device
from moue_dist.parallel.megatron import cpu_host
from moue_dist.planning.flops import flops_per_token, parameters
from moue_dist.refusals.machine import Resolved
from moue_dist.refusals.validate import validate


class Place(Protocol):
    """One rank's place in the job, as the launchers know it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...


def run(config: Config, place: Place, *, after: Callable[[Path], None] | None = None) -> int:
    """Train `config` in this process, one of `place.world_size`; resumes from `latest`. Returns the exit code.

    The first rank calls `after` with the run's folder when all is trained, while the others wait. Raises ConfigError
    for what the user can mend. torch.distributed's variables (MASTER_ADDR ...) are set.
    """
    resolved, device = resolve_here(config, place)
    cpu_host.install()
    with process_group(config, place):
        from moue_dist.model.build import build_system
        from moue_dist.training.loop import train_loop
        from moue_dist.training.step import TrainingError

        run_dir = _run_folder(config, place)
        try:
            system = build_system(config, place.rank, place.world_size, resolved)
            if place.rank == 0:
                _describe(config, place, resolved, device, run_dir)
            train_loop(system, run_dir, device_name=device.name if device else platform.processor() or "CPU")
            if after is not None and place.rank == 0:
                after(run_dir)
            dist.barrier(group=system.groups.world)
        except TrainingError as error:
            if place.rank == 0:
                print(f"moue: {error}", file=sys.stderr)
            return 1
    return 0


def resolve_here(config: Config, place: Place) -> tuple[Resolved, Device | None]:
    """Validate against this machine and pick its GPU."""
    cuda = config.train.device != "cpu" and has_cuda()
    device = None
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {place.rank} is number {place.local_rank} on its node, which shows "
                f"{torch.cuda.device_count()} GPUs: start one rank a GPU, or set train.device=cpu"
            )
        torch.cuda.set_device(place.local_rank)
        facts = torch.cuda.get_device_properties(place.local_rank)
        device = describe_device(facts.name, (facts.major, facts.minor), facts.total_memory / 2**30)
    elif config.train.device == "cpu" and has_cuda():
        raise ConfigError("train.device=cpu on a machine with GPUs: hide them first with CUDA_VISIBLE_DEVICES=''")
    resolved = validate(
        config, place.world_size, cuda=cuda, device=device, transformer_engine=cuda and has_transformer_engine()
    )
    return resolved, device


@contextmanager
def process_group(config: Config, place: Place) -> Iterator[None]:
    """The default group: NCCL (with gloo for host tensors) on GPUs, gloo elsewhere; left in good order."""
    timeout = timedelta(seconds=config.train.timeout_seconds)
    where: dict[str, Any] = {"backend": "gloo"}
    if has_cuda():
        where = {"backend": "cpu:gloo,cuda:nccl", "device_id": this_device()}
    else:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    dist.init_process_group(rank=place.rank, world_size=place.world_size, timeout=timeout, **where)
    try:
        yield
    finally:
        if sys.exc_info()[0] is None:  # after an error the other ranks may never come to the barrier inside
            dist.destroy_process_group()


def _run_folder(config: Config, place: Place) -> Path:
    run_dir = Path(config.output).expanduser() / config.name
    if place.rank == 0:
        try:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write the run folder {run_dir}: {error.strerror}; set output=") from None
    dist.barrier()
    return run_dir


def _describe(config: Config, place: Place, resolved: Resolved, device: Device | None, run_dir: Path) -> None:
    """config.yaml and run.json: what ran, on what, made of what."""
    counts, p = parameters(config), config.parallel
    about = {
        "versions": versions(),
        "device": device.name if device else "CPU",
        "machine": platform.machine(),
        "world_size": place.world_size,
        "grid": {
            "pipeline": p.pipeline_parallel,
            "virtual_stages": p.virtual_stages,
            "expert": p.expert_parallel,
            "tensor": p.tensor_parallel,
            "data": place.world_size // (p.pipeline_parallel * p.tensor_parallel),
            "placement": p.placement,
        },
        "resolved": resolved._asdict(),
        "parameters": {"total": counts.total, "activated": counts.activated},
        "flops_per_token": flops_per_token(config).total,
        "commit": commit(),
    }
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "run.json").write_text(json.dumps(about, indent=2) + "\n")
