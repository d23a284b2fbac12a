"""Runs inside the ranks: build a layout, train it on random tokens, hand back what one process can check.

Ranks answer with their own view (`Trained`); `merge` puts the parts of all ranks together under global names, which
are those of `tests/reference.py`. `Yardstick` is the other side: the reference trained on the same tokens.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import Config, ParallelConfig
from moue_dist.data.documents import attention_mask
from moue_dist.parallel.megatron import cpu_host
from moue_dist.refusals.machine import Resolved
from moue_dist.refusals.validate import validate
from moue_dist.training.schedules import learning_rate
from tests.reference import Reference, Routing
from tests.reference import train as train_reference

ON_CPU = Resolved("cpu", False, "loop", None)
CLOSEST = 1e-5  # how near, relative to the scores, two experts may come where one of them is chosen

Part = tuple[str, Tensor, int | None]  # global name, this rank's tensor, tensor-parallel axis or None


@dataclass
class Trained:
    """One rank's view of a run; the lists have an entry per step."""

    losses: list[float]
    norms: list[float]
    aux: list[dict[str, float]]
    counts: list[Tensor]
    bias: Tensor
    initial: list[Part]
    final: list[Part]
    tp: int


# Data.


def tokens_of(config: Config, steps: int, seed: int) -> Tensor:
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
        batch = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "position_ids": position}
        documents = documents_of(rows)
        if config.data.document_mask:
            batch["attention_mask"] = attention_mask(documents[:, :-1])
        if config.data.eod_mask_loss:
            batch["loss_mask"] = documents[:, :-1] == documents[:, 1:]
        out.append(batch)
    return out


def documents_of(rows: Tensor) -> Tensor:
    """The number of each token's document, [b, s + 1], where a quarter of all tokens are end marks."""
    return torch.cat([torch.zeros_like(rows[:, :1]), (rows[:, :-1] % 4 == 0).cumsum(1)], 1)


def hidden(config: Config) -> Tensor:
    """[L, W]: what a converted model hides, all experts but a layer's own; zeros where there is no mask."""
    windows, own = config.topology().windows, config.moe.pool // max(config.moe_layers, 1)
    hides = [[float(e // own != layer) for e in window] for layer, window in enumerate(windows)]
    return torch.tensor(hides).view(len(windows), -1) * (config.moe.mask_steps > 0)


# Inside the ranks.


def build(config: Config, experts: str = "") -> Any:
    """This rank's system; `parallel.megatron.shut_down` ends it. `experts`: their backend, if not the chosen one."""
    cpu_host.install()
    from moue_dist.model.build import build_system

    world = dist.get_world_size()
    resolved = validate(config, world, cuda=False)
    if experts:
        resolved = resolved._replace(experts=experts)  # type: ignore[arg-type]
    system = build_system(config, dist.get_rank(), world, resolved)
    liven(system)
    return system


@torch.no_grad()
def liven(system: Any) -> None:
    """Norms and the state's transition start at 1 and 0, which hides errors: move them, by name, in every layout."""
    from moue_dist.model.init import draw, full_shape, global_names, take_shard

    tp, size = system.coord.tp, system.mesh.tensor
    for stage, chunk in zip(system.my_stages, system.chunk_modules(), strict=True):
        for name, p in global_names(chunk, system.layout[stage]):
            if p.dim() == 1:
                p.add_(take_shard(name, draw(name, full_shape(p, size), 0.2, 1, p.device), p, tp, size))
    system.context.mask.hide(hidden(system.config), 0)
    for name, p in system.context.shared_router.named_parameters():
        if name == "transition":
            p.add_(draw(name, tuple(p.shape), 0.3, 1, p.device))


def initial_weights(config: Config) -> Trained:
    """What a layout starts from."""
    from moue_dist.parallel.megatron import adapter as megatron

    system = build(config)
    try:
        return Trained([], [], [], [], system.context.balance.bias, collect(system), [], system.coord.tp)
    finally:
        megatron.shut_down()


def train(
    config: Config,
    seed: int,
    *,
    start: int = 0,
    stop: int = 5,
    kill: tuple[int, ...] = (),
    load: Path | None = None,
    begin: Path | None = None,
    save: Path | None = None,
    check_every: int = 0,
    experts: str = "",
) -> Trained:
    """Build the layout, train steps `start` to `stop` of a run of `train.steps` steps, return losses and weights.

    `load` and `save` are checkpoint folders, `begin` one whose weights alone are taken; `kill` are experts that the
    loss-free bias hides from the router; `check_every` is the interval in steps of the replicas' bit-equality check,
    which also ends the run; `experts` as in `build`.
    """
    from moue_dist.checkpoint import store
    from moue_dist.checkpoint.description import Position, find, newest
    from moue_dist.checkpoint.start import start as start_with
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.pool.synced import check_replicas
    from moue_dist.training.step import train_step

    system = build(config, experts)
    try:
        system.context.balance.bias[list(kill)] = -1e9
        if load is not None:
            path = newest(load)
            assert path is not None
            system.context.mask.hide(torch.zeros_like(system.context.mask.hidden_lw), 0)
            assert store.load(system, path).step == start
        if begin is not None:
            start_with(system, find(begin))
        initial, tokens, results = collect(system), tokens_of(config, config.train.steps, seed), []
        for i in range(start, stop):
            mine = microbatches(config, tokens[i], system.coord.dp, system.mesh.data)
            results.append(train_step(system, mine, i))
            if check_every and (i + 1) % check_every == 0:
                check_replicas(system.shared.buffers, system.groups.world)
        check_replicas(system.shared.buffers, system.groups.world)
        if save is not None:
            # megatron-core's writer forks, which multiprocessing forbids to daemons as the ranks here are.
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            store.save(system, save, Position(stop, 0), keep=9)
        return Trained(
            [r.loss for r in results],
            [r.grad_norm for r in results],
            [r.aux for r in results],
            [r.counts_lp for r in results],
            system.context.balance.bias.clone(),
            initial,
            collect(system),
            system.coord.tp,
        )
    finally:
        megatron.shut_down()


def collect(system: Any) -> list[Part]:
    """This rank's weights by global name; pool rows as pool.<expert>."""
    from moue_dist.model.init import global_names

    out: list[Part] = []
    for stage, chunk in zip(system.my_stages, system.chunk_modules(), strict=True):
        for name, p in global_names(chunk, system.layout[stage]):
            axis = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
            if name == "output_layer.weight" and system.config.model.tied_head:
                name = "embedding.word_embeddings.weight"  # the last stage's copy
            out.append((name, p.detach().clone(), axis))
    for e, row in zip(system.context.pool.ids, system.context.pool.buffer.weight, strict=True):
        out.append((f"pool.{e}", row.clone(), None))
    for name, p in system.context.shared_router.named_parameters():
        out.append((f"shared_router.{name}", p.detach().clone(), None))
    return out


# In the test process.


def merge(parts: Sequence[Trained], which: str) -> dict[str, Tensor]:
    """Full weights from all ranks, `which` is `initial` or `final`; asserts that copies are equal to the bit."""
    pieces: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    for part in parts:
        for name, tensor, axis in getattr(part, which):
            axes[name] = axis
            slot = pieces.setdefault(name, {})
            key = part.tp if axis is not None else 0
            assert key not in slot or torch.equal(slot[key], tensor), f"copies of {name} differ"
            slot[key] = tensor
    full = {}
    for name, slot in pieces.items():
        shards, axis = [slot[i] for i in sorted(slot)], axes[name]
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


class Watched(Reference):
    """Notes how close two experts came where one was chosen and the other was not, relative to the scores.

    Such a choice may go either way in another order of additions, and the runs part: no data to compare layouts with.
    """

    closest = math.inf

    def route(self, x_td: Tensor, layer: int, state_tr: Tensor) -> Routing:
        routing, moe = super().route(x_td, layer, state_tr), self.config.moe
        logits = routing.logits_tw.detach()
        basis = logits if moe.score == "topk_softmax" else logits.softmax(-1)
        if moe.router == "sigmoid":
            basis = logits.sigmoid()
        if moe.router == "norm":
            basis = logits / logits.norm(dim=-1, keepdim=True)
            self.closest = min(self.closest, float(basis.abs().min()))  # relu has its kink here
        if moe.top_k < basis.shape[1]:
            best = (basis + self.bias_p[list(self.topology.windows[layer])]).topk(moe.top_k + 1, dim=-1).values
            self.closest = min(self.closest, float(((best[:, -2] - best[:, -1]) / basis.abs().amax(-1)).min()))
        return routing


class NearTies(AssertionError):
    """No data was found on which every choice is clear."""


@dataclass
class Yardstick:
    """The reference's run of a configuration, the same for every layout."""

    seed: int
    initial: dict[str, Tensor]
    losses: list[float]
    record: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None


def one_process(config: Config) -> Config:
    """The configuration without its layout: one rank, the global batch in one piece."""
    whole = replace(config.train, micro_batch_size=config.train.global_batch_size)
    return replace(config, parallel=ParallelConfig(), train=whole)


def run_reference(config: Config, initial: dict[str, Tensor], kill: Iterable[int] = ()) -> Yardstick:
    """Train the reference `train.steps` steps, on the first random tokens on which no choice is a near tie."""
    torch.set_num_threads(1)  # tensors this small are slower on several
    steps = config.train.steps
    rates = [learning_rate(config.optim, i, steps) for i in range(steps)]
    alone = one_process(config)
    for seed in range(50):
        model, record = Watched(alone), []
        model.load(initial)
        model.bias_p[list(kill)] = -1e9
        model.hidden_lw = hidden(config)
        batches = [
            [[(b["tokens"], b["labels"], documents_of(tokens)) for b in microbatches(alone, tokens, 0, 1)]]
            for tokens in tokens_of(alone, steps, seed)
        ]
        losses = train_reference(model, batches, config.optim, rates, record)
        if model.closest > CLOSEST:
            final = {name: p.detach() for name, p in model.weights.items()}
            return Yardstick(seed, initial, losses, record, final, model.bias_p)
    raise NearTies("every seed has a near tie")
