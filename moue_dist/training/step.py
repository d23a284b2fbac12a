"""The training step, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from moue_dist.model.balance import balance_terms
from moue_dist.model.context import Tallies
from moue_dist.model.system import System
from moue_dist.parallel.recording.timeline import OFF, Timeline
from moue_dist.training.schedules import learning_rate

# tokens, labels, position_ids, each [b, s] int64; perhaps attention_mask [b, 1, s, s] and loss_mask [b, s], bool
Batch = Mapping[str, Tensor]


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and from where to take it up again."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on all ranks. `counts_lp` are the assignments of the global batch, on the host."""

    loss: float
    aux: dict[str, float]
    grad_norm: float
    lr: float
    counts_lp: Tensor


def train_step(system: System, microbatches: Sequence[Batch], step: int, timeline: Timeline = OFF) -> StepResult:
    """One optimizer step (0-based `step`) over this rank's microbatches of the global batch."""
    context, shared = system.context, system.shared
    context.mask.at_step(step)
    losses = _gradients(system, microbatches, timeline)
    with timeline.span("optimizer"):
        context.pool.sums.flush()
        shared.reduce()
        norm = _grad_norm(system)
        if not math.isfinite(norm):
            at = f"gradient norm is {norm} at step {step + 1}"
            raise TrainingError(f"{at}: lower optim.lr, or look at the last losses")
        lr = _update(system, norm, step)

    loss, tallies = _reduce_statistics(system, losses)
    terms = _auxiliary(system, tallies, len(microbatches) * system.mesh.data)
    context.balance.update(tallies.counts_lp, system.config.balance.bias)
    # All that the host learns of the step in one copy: each would wait for the device.
    told = torch.cat([loss, *(term.double().view(1) for term in terms.values()), tallies.counts_lp.flatten()]).cpu()
    aux = dict(zip(terms, told[1:].tolist(), strict=False))
    return StepResult(float(told[0]), aux, norm, lr, told[1 + len(terms) :].view(tallies.counts_lp.shape))


def _gradients(system: System, microbatches: Sequence[Batch], timeline: Timeline) -> list[Tensor]:
    """Forward and backward of all microbatches into empty gradients; this rank's losses on the last stage.

    The schedule reduces dense gradients at its end. It runs again where experts had more rows than room.
    """
    context = system.context
    while True:
        context.begin_step(len(microbatches))
        context.pool.sums.drop()  # what a step that broke off may have left
        context.exchange.begin_step(timeline)
        system.dense.zero_grad()
        system.shared.zero_grad()
        context.pool.ready()
        losses = _run(system, microbatches, forward_only=False, timeline=timeline)
        if not context.exchange.make_room(system.groups.world):
            return losses


@torch.no_grad()
def evaluate(system: System, batches: Sequence[Sequence[Batch]]) -> float:
    """Mean loss in nats per token over global batches, equal on all ranks."""
    system.shared.finish()
    system.context.pool.ready()
    for chunk in system.dense.chunks:
        chunk.eval()
    means = []
    for microbatches in batches:
        losses = _run(system, microbatches, forward_only=True)
        while system.context.exchange.make_room(system.groups.world):
            losses = _run(system, microbatches, forward_only=True)
        means.append(_reduce_loss(system, losses))
    for chunk in system.dense.chunks:
        chunk.train()
    return sum(means) / len(means)


def _run(
    system: System, microbatches: Sequence[Batch], *, forward_only: bool, timeline: Timeline = OFF
) -> list[Tensor]:
    """The pipeline schedule; this rank's losses, one a microbatch, on the last stage."""
    microbatches = _weigh(system, microbatches)
    results = system.dense.run_schedule(
        _forward_step,
        microbatches,
        sequence_length=system.config.model.sequence_length,
        micro_batch_size=system.config.train.micro_batch_size,
        forward_only=forward_only,
        timeline=timeline,
    )
    return [r["loss"] for r in results]


def _weigh(system: System, microbatches: Sequence[Batch]) -> Sequence[Batch]:
    """With loss masks: each token's weight in the loss, so that the mean over microbatches and data ranks is the mean
    over the tokens of the global batch that count, whatever the layout.
    """
    if not microbatches or "loss_mask" not in microbatches[0]:
        return microbatches
    masks = torch.stack([batch["loss_mask"] for batch in microbatches])
    counts = torch.stack([masks.sum(), torch.tensor(masks.numel(), device=masks.device)]).double()
    dist.all_reduce(counts, group=system.groups.world)
    scale = counts[1] / counts[0].clamp(min=1)
    return [{**batch, "loss_weights": batch["loss_mask"] * scale.float()} for batch in microbatches]


def _forward_step(batch: Batch, model: Any) -> tuple[Tensor, Any]:
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])

    def loss_of(token_losses_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        token_losses_bs = token_losses_bs.float()
        if (weights_bs := batch.get("loss_weights")) is not None:
            token_losses_bs = token_losses_bs * weights_bs
        loss = token_losses_bs.mean()
        return loss, {"loss": loss.detach().clone()}  # clone: the schedule divides the loss in place

    return output, loss_of


def _grad_norm(system: System) -> float:
    """Norm over every distinct parameter once: dense weights, the pool, the shared router."""
    system.dense.optimizer.prepare_grads()
    dense = float(system.dense.optimizer.get_grad_norm())
    squared = system.shared.squared_norm().to(system.device)
    dist.all_reduce(squared, group=system.groups.world)
    return math.sqrt(dense**2 + float(squared))


def _update(system: System, norm: float, step: int) -> float:
    """Clip by the common norm and take the optimizers' step; returns the learning rate."""
    o, optimizer = system.config.optim, system.dense.optimizer
    clip = None
    if 0 < o.clip_grad < norm + 1e-6:
        clip = o.clip_grad / (norm + 1e-6)
        if parameters := optimizer.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, o.clip_grad, norm)
    lr = learning_rate(o, step, system.config.train.steps)
    system.dense.set_rates(lr, o.weight_decay)
    system.shared.step(lr, clip)  # first: in host memory it goes on beside the dense step
    if not optimizer.step_with_ready_grads():
        raise TrainingError(f"megatron-core's optimizer refused step {step + 1}")
    return lr


def _reduce_loss(system: System, losses: Sequence[Tensor]) -> float:
    total = torch.zeros(1, dtype=torch.float64, device=system.device)
    _add_loss(system, total, losses)
    dist.all_reduce(total, group=system.groups.world)
    return float(total)


def _add_loss(system: System, total: Tensor, losses: Sequence[Tensor]) -> None:
    if losses:
        total += torch.stack(list(losses)).double().mean() / (system.mesh.data * system.mesh.tensor)


def _reduce_statistics(system: System, losses: Sequence[Tensor]) -> tuple[Tensor, Tallies]:
    """Loss [1] and tallies of the global batch, on the device: one sum over all ranks."""
    tallies = system.context.tallies
    loss = torch.zeros(1, dtype=torch.float64, device=system.device)
    _add_loss(system, loss, losses)
    flat = torch.cat([loss, tallies.flat()])
    dist.all_reduce(flat, group=system.groups.world)
    topology = system.context.topology
    return flat[:1], Tallies.from_flat(flat[1:], topology.layers, topology.pool)


def _auxiliary(system: System, tallies: Tallies, microbatches: int) -> dict[str, Tensor]:
    """The auxiliary terms that have a coefficient, without it: 1 means balanced. Scalars on the device."""
    context, b = system.context, system.config.balance
    terms = balance_terms(context.topology, context.balance, (tallies.scores_lp / microbatches).float())
    aux = {name: value for name, value in terms.items() if getattr(b, name)}
    if b.z_loss:
        aux["z_loss"] = tallies.z_l.mean() / microbatches
    return aux
