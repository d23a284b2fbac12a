"""Adapter to megatron-core 0.16.1: its globals, its configuration, its optimizer, its schedules.

A newer megatron-core is the work of the adapter: this file, megatron_layers.py (the model) and megatron_saving.py
(checkpoints). What it must do for a shared pool, and why, is in docs/architecture.md; the traps named in comments were
all seen. Line numbers of megatron-core files are those of 0.16.1.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from moue_dist.config import Config
from moue_dist.parallel.device import has_cuda, this_device
from moue_dist.parallel.lockstep.exchange import LockstepExchange
from moue_dist.parallel.lockstep.pipeline import ForwardStep, LockstepPipeline
from moue_dist.parallel.megatron import state_packing
from moue_dist.parallel.megatron.layers import carried_width
from moue_dist.parallel.megatron.saving import spread_buckets
from moue_dist.parallel.megatron.schedule_spans import recorded
from moue_dist.parallel.mesh import Mesh
from moue_dist.parallel.recording.timeline import OFF, Timeline


def initialise(mesh: Mesh, seed: int, timeout_minutes: float) -> None:
    """megatron-core's process groups for this grid, and its RNG tracker. After torch.distributed is initialised."""
    for noisy in ("megatron", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual if mesh.virtual > 1 else None,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,
    )
    # The usual tracker switches a global random state to and fro, which two threads cannot do at once. Nothing needs
    # it: there is no dropout, and weights are drawn by name (moue_dist/model/init.py). This one does nothing.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def shut_down(keep: Sequence[Any] = ()) -> None:
    """Forget the grid, so that another can be built in this process. Collective. Groups in `keep` stay.

    megatron-core only drops its names of the groups; each gloo group keeps threads that poll, so a process that builds
    grid after grid would drown in them.
    """
    parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    world = torch.distributed.distributed_c10d._world
    for group in list(world.pg_map):
        if group is not torch.distributed.group.WORLD and all(group is not other for other in keep):
            torch.distributed.destroy_process_group(group)


def expert_group() -> Any:
    """The all-to-all's group of this rank, or None for one owner."""
    group = parallel_state.get_expert_model_parallel_group()
    return group if group.size() > 1 else None


def transformer_config(config: Config, mesh: Mesh, *, fp8_recipe: str | None, fused: bool) -> TransformerConfig:
    """megatron-core's configuration of our model. `fused`: Transformer Engine is in use."""
    m, p = config.model, config.parallel
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    options: dict[str, Any] = {}
    if p.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif p.recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if fp8_recipe:
        options |= {"fp8": "hybrid", "fp8_recipe": fp8_recipe}
    if fused:
        options |= {"apply_rope_fusion": True, "bias_activation_fusion": True}
        options |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
    if mesh.pipeline > 1:
        options["pipeline_model_parallel_layout"] = _layout(config, mesh)
    return TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.heads,
        num_query_groups=m.groups,
        kv_channels=m.head_width,
        ffn_hidden_size=m.ffn_hidden_size or 4 * m.hidden_size,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        # It then adds up those norms' gradients over tensor-parallel ranks (finalize_model_grads.py:354): not where
        # each rank has the norm of its own heads.
        qk_layernorm=m.qk_norm == "head",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=not has_cuda(),
        tensor_model_parallel_size=mesh.tensor,
        sequence_parallel=mesh.tensor > 1,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual if mesh.virtual > 1 else None,
        batch_p2p_comm=has_cuda(),  # gloo has no batched sends
        batch_p2p_sync=False,  # a wait of the host for the device after every exchange, for PyTorch before 1.13
        **options,
    )


def _layout(config: Config, mesh: Mesh) -> list[list[str]]:
    """Layers of each virtual stage as megatron-core spells them: [["embedding", "decoder"], ["decoder", "loss"]]."""
    stages = mesh.pipeline * mesh.virtual
    counts = config.parallel.stage_layers or (config.model.layers // stages,) * stages
    layout = [["decoder"] * n for n in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


@dataclass(frozen=True)
class DenseSide:
    """megatron-core's half of a training step: wrapped chunks, their optimizer, their schedule.

    `lockstep` replaces megatron-core's schedules where experts live at home.
    """

    chunks: list[DistributedDataParallel]
    optimizer: Any
    config: TransformerConfig
    lockstep: LockstepPipeline | None = None

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def run_schedule(
        self,
        forward_step: ForwardStep,
        microbatches: Sequence[Any],
        *,
        sequence_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
        timeline: Timeline = OFF,
    ) -> list[Any]:
        """Forward (and backward) of all microbatches; what the loss function returned, on the last stage.

        `forward_step(microbatch, model)` gives (output, loss function). Dense gradients are reduced at the end.
        """
        if self.lockstep is not None:
            results = self.lockstep.run(forward_step, microbatches, forward_only=forward_only, timeline=timeline)
            if not forward_only:
                with timeline.span("optimizer"):
                    finalize_model_grads(self.chunks)
            return results
        iterators = [iter(microbatches) for _ in self.chunks]
        with recorded(timeline, self.config):
            result: list[Any] = get_forward_backward_func()(
                forward_step_func=lambda iterator, model: forward_step(next(iterator), model),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(microbatches),
                seq_length=sequence_length,
                micro_batch_size=micro_batch_size,
                forward_only=forward_only,
            )
        return result

    def set_rates(self, lr: float, weight_decay: float) -> None:
        """megatron-core leaves weight decay to its scheduler (optimizer_param_scheduler.py:294): do as it does."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def wrap(
    config: Config, tconfig: TransformerConfig, chunks: list[GPTModel], mesh: Mesh, lockstep: LockstepExchange | None
) -> DenseSide:
    """DistributedDataParallel and optimizer around the chunks; gradients in fp32. `lockstep`: experts at home."""
    state_width = carried_width(config)
    # Schedules take the shape of what stages exchange from the DDP's configuration (utils.py:604): a copy whose
    # hidden size has room for the state makes every schedule carry it.
    wide = copy.copy(tconfig)
    wide.hidden_size += state_packing.lanes(state_width, tconfig.params_dtype) if state_width else 0
    p = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        use_distributed_optimizer=p.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    ddps = [DistributedDataParallel(wide, ddp_config, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    options = optimizer_config(config, tconfig)
    optimizer = get_megatron_optimizer(
        options, ddps, config_overrides=get_standard_config_overrides(options), use_gloo_process_groups=False
    )
    spread_buckets(optimizer)
    wide.finalize_model_grads_func = finalize_model_grads
    wide.grad_scale_func = None
    if p.overlap_grad_reduce:
        no_sync = [d.no_sync for d in ddps]
        wide.no_sync_func = no_sync if len(ddps) > 1 else no_sync[0]
    pipeline = None if lockstep is None else _lockstep(config, tconfig, mesh, lockstep, ddps[0], wide)
    return DenseSide(ddps, optimizer, wide, pipeline)


def optimizer_config(config: Config, tconfig: TransformerConfig) -> OptimizerConfig:
    """AdamW of a run in megatron-core's words."""
    o = config.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=tconfig.bf16,
        params_dtype=tconfig.params_dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )


def _lockstep(
    config: Config,
    tconfig: TransformerConfig,
    mesh: Mesh,
    exchange: LockstepExchange,
    model: DistributedDataParallel,
    wide: TransformerConfig,
) -> LockstepPipeline:
    """The schedule of experts at home; `wide` is the configuration whose hidden size has room for the state."""
    # Two threads must not share the tensor-parallel group: it would take their calls in the order they come.
    side_by_side = config.parallel.slots_behind % 2 == 1 and mesh.tensor == 1
    if side_by_side and tconfig.apply_rope_fusion:
        _workspace_for_each_stream()
    return LockstepPipeline(
        model=model,
        exchange=exchange,
        stage=exchange.clock.stage,
        stages=mesh.pipeline,
        lag=config.parallel.slots_behind,
        group=parallel_state.get_pipeline_model_parallel_group(),
        shape=(config.model.sequence_length // mesh.tensor, config.train.micro_batch_size, wide.hidden_size),
        dtype=tconfig.params_dtype,
        device=this_device(),
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        side_by_side=side_by_side,
    )


def _workspace_for_each_stream() -> None:
    """Transformer Engine gives cuBLAS one workspace a device: products on two streams would write into one.

    (pytorch/cpp_extensions/gemm.py of 2.11; the first call decides, so this comes before it.)
    """
    from transformer_engine.pytorch.cpp_extensions import gemm

    make = getattr(gemm.get_cublas_workspace, "__wrapped__", None)
    if make is None:  # replaced already
        return

    @functools.cache
    def kept(device: int, ub: bool, grouped: bool, stream: int) -> Any:
        return make(device, ub, grouped)

    def workspace(device: int, ub: bool, grouped_gemm: bool) -> Any:
        return kept(device, ub, grouped_gemm, torch.cuda.current_stream(device).cuda_stream)

    gemm.get_cublas_workspace = workspace
