"""Runs inside the ranks: train a small model in some layout and hand back what the one-process reference can check."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import Config
from moue_dist.parallel import cpu_host
from moue_dist.validate import Resolved

ON_CPU = Resolved("cpu", False, "loop", None)


@dataclass
class Trained:
    """One rank's view of a run. Weights are (global name, tensor, tensor-parallel axis or None)."""

    losses: list[float]
    norms: list[float]
    aux: list[dict[str, float]]
    counts: list[Tensor]
    initial: list[tuple[str, Tensor, int | None]]
    final: list[tuple[str, Tensor, int | None]]
    tp: int


def tokens_of(config: Config, steps: int, seed: int = 7) -> Tensor:
    """[steps, G, s + 1] random tokens: inputs and labels are its two shifts."""
    g = torch.Generator().manual_seed(seed)
    shape = (steps, config.train.global_batch_size, config.model.sequence_length + 1)
    return torch.randint(config.model.vocab_size, shape, generator=g)


def microbatches(config: Config, step_tokens: Tensor, dp: int, data: int) -> list[dict[str, Tensor]]:
    """This data rank's microbatches: row i of microbatch m is sequence (m * data + dp) * b + i of the global batch."""
    b, s = config.train.micro_batch_size, config.model.sequence_length
    position = torch.arange(s).expand(b, s)
    out = []
    for m in range(config.train.global_batch_size // (b * data)):
        rows = step_tokens[(m * data + dp) * b : (m * data + dp) * b + b]
        out.append({"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "position_ids": position})
    return out


def train(config: Config, steps: int = 5, kill_experts: tuple[int, ...] = ()) -> Trained:
    """Build the layout, train `steps` steps on random tokens, return losses and weights."""
    cpu_host.install()
    from moue_dist.build import build_system
    from moue_dist.parallel import megatron
    from moue_dist.parallel.pool_sync import check_replicas
    from moue_dist.step import train_step

    system = build_system(config, dist.get_rank(), dist.get_world_size(), ON_CPU)
    try:
        if kill_experts:
            system.context.balance.bias[list(kill_experts)] = -1e9
        initial = collect(system)
        tokens = tokens_of(config, steps)
        results = [
            train_step(system, microbatches(config, tokens[i], system.coord.dp, system.mesh.data), i)
            for i in range(steps)
        ]
        check_replicas(system.shared.buffers)
        return Trained(
            [r.loss for r in results],
            [r.grad_norm for r in results],
            [r.aux for r in results],
            [r.counts_lp for r in results],
            initial,
            collect(system),
            system.coord.tp,
        )
    finally:
        megatron.shut_down()


def collect(system) -> list[tuple[str, Tensor, int | None]]:  # type: ignore[no-untyped-def]
    """This rank's weights by global name; pool rows as pool.<expert>."""
    from moue_dist.model.init import global_names

    out: list[tuple[str, Tensor, int | None]] = []
    for stage, chunk in zip(system.my_stages, system.chunk_modules(), strict=True):
        for name, p in global_names(chunk, system.layout[stage]):
            axis = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
            out.append((name, p.detach().clone(), axis))
    for e, row in zip(system.context.pool.ids, system.context.pool.buffer.weight, strict=True):
        out.append((f"pool.{e}", row.clone(), None))
    for name, p in system.context.shared_router.named_parameters():
        out.append((f"shared_router.{name}", p.detach().clone(), None))
    return out


def merge(parts: list[Trained], which: str) -> dict[str, Tensor]:
    """Full weights from all ranks; asserts that copies are equal."""
    pieces: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    for part in parts:
        for name, tensor, axis in getattr(part, which):
            axes[name] = axis
            slot = pieces.setdefault(name, {})
            key = part.tp if axis is not None else 0
            assert key not in slot or torch.allclose(slot[key], tensor, rtol=1e-6, atol=1e-8), f"copies of {name} differ"
            slot[key] = tensor
    full = {}
    for name, slot in pieces.items():
        shards = [slot[i] for i in sorted(slot)]
        axis = axes[name]
        if axis is None or len(shards) == 1:
            full[name] = shards[0]
        elif name.endswith("linear_fc1.weight"):
            halves = [s.chunk(2, axis) for s in shards]
            full[name] = torch.cat([torch.cat([h[i] for h in halves], axis) for i in range(2)], axis)
        else:
            full[name] = torch.cat(shards, axis)
    rows = sorted((n for n in full if n.startswith("pool.")), key=lambda n: int(n[5:]))
    if rows:
        full["pool.weight"] = torch.stack([full.pop(n) for n in rows])
    return full
