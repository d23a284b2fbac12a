"""megatron-core's own MoE in the shape of a configuration: what our training step is measured against.

Everything is stock: TransformerLayer, MoELayer, TopKRouter, the all-to-all dispatcher, Transformer Engine's grouped
GEMMs and every fusion it has where it is installed, DistributedDataParallel with overlapped gradient reduction,
DistributedOptimizer. Widths, numbers, parallel degrees, batches and learning rates are the configuration's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moue_dist.config import Config, ConfigError
from moue_dist.parallel.device import this_device
from moue_dist.parallel.megatron import adapter as megatron
from moue_dist.parallel.megatron import layers as megatron_layers
from moue_dist.parallel.mesh import Mesh
from moue_dist.refusals.machine import Resolved
from moue_dist.training.schedules import learning_rate

Batch = Mapping[str, Tensor]  # tokens, labels, position_ids, each [b, s] int64


def plain_form(config: Config) -> Config:
    """The plain MoE of the same size that megatron-core can train: pool / MoE layers experts a layer, stock router.

    Raises ConfigError where that is no whole number, or does not go with top_k and expert parallelism.
    """
    e, m = config.moe, config.model
    if m.qk_norm == "all" or m.clip_qkv:
        raise ConfigError(
            "megatron-core's attention knows no norm over all heads and no clipping: set model.qk_norm=head and "
            "model.clip_qkv=0, or leave --baseline out"
        )
    router: Literal["sigmoid", "softmax"] = "sigmoid" if e.router == "sigmoid" else "softmax"
    moe = replace(e, topology="private", window=0, stride=0, group=1, router=router)
    plain = replace(config, moe=moe, parallel=replace(config.parallel, placement="replicate"))
    window, ep = plain.topology().window, config.parallel.expert_parallel
    if window < e.top_k or window % ep:
        raise ConfigError(
            f"the baseline has {window} experts a layer (moe.pool={e.pool} / {config.moe_layers} MoE layers), which "
            f"moe.top_k={e.top_k} and parallel.expert_parallel={ep} do not fit; change one, or leave --baseline out"
        )
    return plain


def describe(config: Config, tconfig: TransformerConfig, grads: str) -> dict[str, Any]:
    """What the baseline is, for the result: its form, and every setting that is not megatron-core's default."""
    e, te = config.moe, tconfig.moe_grouped_gemm
    form = f"{tconfig.num_moe_experts} experts a layer, {tconfig.moe_router_score_function} router, top-{e.top_k}"
    if e.topology != "private" or e.router not in ("softmax", "sigmoid"):
        form += f"; the plain form of moe.topology={e.topology} with moe.router={e.router}, same pool and top_k"
    if not te:
        form += "; without Transformer Engine: unfused, a loop over experts, so no measure of megatron-core's speed"
    defaults = {field.name: field.default for field in dataclasses.fields(tconfig)}
    simple = (bool, int, float, str, list, type(None))
    changed = {k: v for k, v in vars(tconfig).items() if k in defaults and isinstance(v, simple) and v != defaults[k]}
    gradients = grads if tconfig.bf16 else "fp32"  # never narrower than the weights
    return {"form": form, "gradients": gradients, "settings": changed}


def transformer_config(config: Config, mesh: Mesh, resolved: Resolved) -> TransformerConfig:
    """Our configuration of attention and pipeline with megatron-core's MoE in it; `config` is a plain form."""
    e, b, te = config.moe, config.balance, resolved.transformer_engine
    base = megatron.transformer_config(config, mesh, fp8_recipe=resolved.fp8_recipe, fused=te)
    options: dict[str, Any] = {}
    if config.parallel.recompute == "selective" and te:
        options["recompute_modules"] = [*(base.recompute_modules or []), "moe_act"]  # ours discards it, too
    # UELB is the mean of the layers' Switch losses in a plain MoE; megatron-core adds layers up, we take their mean.
    balance = (b.layer + b.uelb) / config.moe_layers
    return dataclasses.replace(
        base,
        num_moe_experts=config.topology().window,
        moe_layer_freq=[0] * config.model.dense_layers + [1] * config.moe_layers,
        moe_ffn_hidden_size=e.expert_width,
        moe_shared_expert_intermediate_size=e.shared_expert_width or None,
        moe_router_topk=e.top_k,
        moe_router_score_function=e.router,
        moe_router_pre_softmax=e.router == "softmax" and e.score == "softmax_topk" and not e.renormalise,
        moe_router_topk_scaling_factor=None if e.route_scale == 1.0 else e.route_scale,
        moe_router_enable_expert_bias=e.router == "sigmoid" and b.bias > 0,
        moe_router_bias_update_rate=b.bias,
        moe_router_load_balancing_type="aux_loss" if balance else "none",
        moe_aux_loss_coeff=balance,
        moe_z_loss_coeff=b.z_loss / config.moe_layers if b.z_loss else None,
        moe_router_force_load_balancing=e.force_balance,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=te,
        moe_permute_fusion=te,
        moe_router_fusion=te,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=1,
        # Set by the base's own defaults: made again for this model's standard deviation.
        init_method_std=config.model.init_std,
        init_method=None,
        output_layer_init_method=None,
        embedding_init_method=None,
        embedding_init_method_std=None,
        **options,
    )


class Baseline:
    """One rank's part of the stock model, and its training step. Groups are initialised for `mesh`."""

    def __init__(self, config: Config, mesh: Mesh, pp: int, resolved: Resolved, grads: str) -> None:
        self.config, self.mesh = config, mesh
        self.tconfig = transformer_config(config, mesh, resolved)
        self.chunks, self.optimizer = _wrap(
            config, self.tconfig, self._chunks(pp, resolved.transformer_engine), grads == "fp32"
        )

    def step(self, microbatches: Sequence[Batch], step: int) -> Tensor:
        """One optimizer step; this rank's share of the mean loss, fp64 [1] on the device, not reduced."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        iterators = [iter(microbatches) for _ in self.chunks]
        results = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(microbatches),
            seq_length=self.config.model.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=False,
        )
        o = self.config.optim
        for group in self.optimizer.param_groups:  # as megatron-core's scheduler would set them
            group["lr"] = learning_rate(o, step, self.config.train.steps) * group.get("lr_mult", 1.0)
            group["weight_decay"] = o.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.step()
        loss = torch.zeros(1, dtype=torch.float64, device=this_device())
        if results:
            loss += torch.stack([r["loss"] for r in results]).double().mean() / (self.mesh.data * self.mesh.tensor)
        return loss

    def counts_of(self, run: Callable[[], Any], group: Any) -> Tensor:
        """Assignments [L, P] of what `run` routes, over all ranks, on the host; for a step that is not timed."""
        topology, dense = self.config.topology(), self.config.model.dense_layers
        counts_lw = torch.zeros(topology.layers, topology.window, dtype=torch.float64, device=this_device())
        routers = [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]

        def tally(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
            counts_lw[router.layer_number - 1 - dense] += output[1].sum(0)  # the routing map, bool [T, W]

        hooks = [router.register_forward_hook(tally) for router in routers]
        run()
        for hook in hooks:
            hook.remove()
        dist.all_reduce(counts_lw, group=group)
        counts_lp = torch.zeros(topology.layers, topology.pool, dtype=torch.float64)
        for counts_p, counts_w, window in zip(counts_lp, counts_lw.cpu(), topology.windows, strict=True):
            counts_p[list(window)] = counts_w
        return counts_lp

    def _chunks(self, pp: int, te: bool) -> list[GPTModel]:
        m, mesh = self.config.model, self.mesh
        chunks = []
        for v in range(mesh.virtual):
            vp_stage = v if mesh.virtual > 1 else None
            spec = get_gpt_decoder_block_spec(self.tconfig, te, normalization="RMSNorm", vp_stage=vp_stage)
            if not te:
                spec.layer_norm = megatron_layers.LocalRMSNorm
                for layer in spec.layer_specs:
                    megatron_layers.use_local_norms(layer, m.qk_norm != "none")
            chunk = GPTModel(
                self.tconfig,
                spec,
                vocab_size=m.vocab_size,
                max_sequence_length=m.sequence_length,
                pre_process=pp == 0 and v == 0,
                post_process=pp == mesh.pipeline - 1 and v == mesh.virtual - 1,
                share_embeddings_and_output_weights=m.tied_head,
                position_embedding_type="rope",
                rotary_base=int(m.rope_base),
                vp_stage=vp_stage,
            )
            chunks.append(chunk.to(device=this_device(), dtype=self.tconfig.params_dtype))
        return chunks


def _forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_of(token_losses_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = token_losses_bs.float().mean()
        return loss, {"loss": loss.detach().clone()}  # clone: the schedule divides the loss in place

    return output, loss_of


def _wrap(
    config: Config, tconfig: TransformerConfig, chunks: list[GPTModel], fp32_grads: bool
) -> tuple[list[DistributedDataParallel], Any]:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32_grads,
        overlap_grad_reduce=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    ddps = [DistributedDataParallel(tconfig, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    options = megatron.optimizer_config(config, tconfig)
    overrides = get_standard_config_overrides(options)
    optimizer = get_megatron_optimizer(options, ddps, config_overrides=overrides, use_gloo_process_groups=False)
    no_sync = [d.no_sync for d in ddps]
    tconfig.no_sync_func = no_sync if len(ddps) > 1 else no_sync[0]
    tconfig.finalize_model_grads_func = finalize_model_grads
    return ddps, optimizer


def mean_losses(losses: Sequence[Tensor], group: Any) -> list[float]:
    """The steps' mean losses from every rank's shares; equal on all ranks."""
    total = torch.cat(list(losses))
    dist.all_reduce(total, group=group)
    return [float(x) for x in total]
