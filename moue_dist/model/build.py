"""Builds one rank's part of a run: groups, pool, chunks, optimizers, initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from moue_dist.config import Config
from moue_dist.measuring.measured_use import measured_use
from moue_dist.model.balance import BalanceState
from moue_dist.model.context import MoEContext
from moue_dist.model.init import expert_stds, initialise_dense, initialise_shared_router
from moue_dist.model.moe import MoELayer
from moue_dist.model.router import SharedRouter
from moue_dist.model.system import System
from moue_dist.parallel.device import this_device
from moue_dist.parallel.dispatch.all_to_all import AllToAllDispatcher
from moue_dist.parallel.dispatch.exchange import ExpertExchange
from moue_dist.parallel.dispatch.gathered import GatheredExchange
from moue_dist.parallel.dispatch.stage import StageExchange
from moue_dist.parallel.groups import Groups, build_groups
from moue_dist.parallel.lockstep.exchange import LockstepExchange
from moue_dist.parallel.megatron import adapter as megatron
from moue_dist.parallel.megatron import layers as megatron_layers
from moue_dist.parallel.mesh import Coord, Mesh, build_mesh, stage_layout
from moue_dist.parallel.placement.costs import Floats
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.parallel.placement.placement import common_pieces
from moue_dist.parallel.pool.pool import ExpertPool
from moue_dist.parallel.pool.synced import SharedOptimizer, SyncedBuffer, check_replicas
from moue_dist.refusals.machine import Resolved


def build_system(config: Config, rank: int, world: int, resolved: Resolved) -> System:
    """Collective: every rank builds its part. torch.distributed is initialised, megatron-core not yet.

    `resolved` is what `validate` made of the configuration's `auto` options on this machine.
    """
    mesh = build_mesh(world, config.parallel)
    coord = mesh.coords(rank)
    device = this_device()
    timeout = timedelta(seconds=config.train.timeout_seconds)
    megatron.initialise(mesh, config.train.seed, config.train.timeout_seconds / 60)
    layout = stage_layout(config.model.layers, mesh.pipeline, mesh.virtual, config.parallel.stage_layers)
    topology, placement = config.topology(), place_pool(config, mesh, _one_use(config, device))
    lockstep = config.parallel.placement != "replicate"
    groups = build_groups(mesh, rank, placement.stage_sets(), timeout, lockstep=lockstep)

    tconfig = megatron.transformer_config(
        config, mesh, fp8_recipe=resolved.fp8_recipe, fused=resolved.transformer_engine
    )
    pool = ExpertPool(
        placement,
        mesh,
        rank,
        groups,
        hidden=config.model.hidden_size,
        width=config.moe.expert_width,
        dtype=tconfig.params_dtype,
        device=device,
        merge_wgrad=resolved.merge_wgrad,
        fp8=resolved.experts == "fp8",
    )
    pool.initialise(config.train.seed, *expert_stds(config))
    shared_router = SharedRouter(config.moe, device)
    initialise_shared_router(config, shared_router)
    exchange = build_exchange(config, mesh, coord, pool, groups, resolved, device)
    context = MoEContext(
        config=config,
        topology=topology,
        pool=pool,
        exchange=exchange,
        shared_router=shared_router,
        balance=BalanceState.initial(topology, device),
        token_shards=mesh.tensor,
        device=device,
        first_layer=sum(len(layers) for layers in _moe_layers(config, layout)[: coord.pp]),
    )

    chunks = megatron_layers.build_chunks(config, tconfig, mesh, layout, coord.pp, MoELayer)
    for v, chunk in enumerate(chunks):
        layers = layout[v * mesh.pipeline + coord.pp]
        assert [layer.layer_number - 1 for layer in chunk.decoder.layers] == list(layers)
        for layer in chunk.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                layer.mlp.bind(context)
        initialise_dense(config, chunk, layers, coord.tp, mesh.tensor)
    dense = megatron.wrap(config, tconfig, chunks, mesh, exchange if isinstance(exchange, LockstepExchange) else None)

    buffers = [pool.buffer]
    if (router_buffer := _flatten(shared_router, groups, mesh, device)) is not None:
        buffers.append(router_buffer)
    shared = shared_optimizer(config, buffers)
    check_replicas(buffers, groups.world)
    return System(config, resolved, mesh, coord, rank, layout, groups, dense, context, shared, device)


def build_exchange(
    config: Config,
    mesh: Mesh,
    coord: Coord,
    pool: ExpertPool,
    groups: Groups,
    resolved: Resolved,
    device: torch.device,
) -> ExpertExchange:
    """This rank's way to the pool's experts."""
    if (resolved.dispatch == "lockstep") != (config.parallel.placement != "replicate"):
        raise ValueError(f"dispatch {resolved.dispatch} does not go with placement {config.parallel.placement}")
    backend, recompute = resolved.experts, config.parallel.recompute == "selective"
    if resolved.dispatch == "all_to_all":
        dispatcher = AllToAllDispatcher(megatron.expert_group())
        return StageExchange(pool, dispatcher, backend=backend, recompute=recompute, device=device)
    if resolved.dispatch == "gathered":
        group = megatron.expert_group()
        return GatheredExchange(pool, group, backend=backend, recompute=recompute, headroom=config.moe.headroom)
    layout = stage_layout(config.model.layers, mesh.pipeline, mesh.virtual, config.parallel.stage_layers)
    return LockstepExchange(
        pool,
        coord.pp,
        tuple(len(layers) for layers in _moe_layers(config, layout)),
        groups.grid,
        backend=backend,
        recompute=config.parallel.recompute == "full",
        device=device,
    )


def _moe_layers(config: Config, layout: Sequence[Sequence[int]]) -> list[list[int]]:
    """The MoE layers of each stage."""
    return [[x for x in stage if x >= config.model.dense_layers] for stage in layout]


def _one_use(config: Config, device: torch.device) -> Floats | None:
    """The measured use as the first rank reads it: the run that counts may be going on (collective)."""
    use = measured_use(config)
    if use is None:
        return None
    counts = torch.tensor(use, device=device)
    dist.broadcast(counts, 0)  # over all ranks; megatron-core's messages between stages have not begun
    return counts.cpu().numpy()


def shared_optimizer(config: Config, buffers: Sequence[SyncedBuffer]) -> SharedOptimizer:
    """The optimizer of the pool and of the routers' shared weights."""
    o, p, moments = config.optim, config.parallel, {"fp32": torch.float32, "bf16": torch.bfloat16}
    return SharedOptimizer(
        buffers,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        on_host={"pool": moments[p.host_state]} if p.pool_optimizer == "host" else {},
    )


def _flatten(shared: SharedRouter, groups: Groups, mesh: Mesh, device: torch.device) -> SyncedBuffer | None:
    """Move the shared router's weights into one synced row; its parameters and their gradients become views."""
    parameters = list(shared.parameters())
    total = sum(p.numel() for p in parameters)
    if not total:
        return None
    buffer = SyncedBuffer(
        "shared_router",
        (0,),
        1,
        total,
        [(0, 1, groups.everyone)],
        pieces=common_pieces([(1, mesh.world)], total),
        dtype=torch.float32,
        device=device,
        grad_scale=1.0 / mesh.data,
    )
    at = 0
    for p in parameters:
        weight, grad = (t[0, at : at + p.numel()].view_as(p) for t in (buffer.weight, buffer.grad))
        weight.copy_(p.detach())
        p.data, p.grad = weight, grad  # autograd adds into an existing gradient in place
        at += p.numel()
    return buffer
