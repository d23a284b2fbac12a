"""Every option of a run: frozen dataclasses, validated in one place, free of torch.

`load.py` reads them from strict YAML and the command line; `validate.py` refuses what cannot work, and each message
names the option and the way out. Names are the field's; comments give units and defaults' reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moue_dist.config.errors import ConfigError
from moue_dist.config.topology import Topology, build_topology


@dataclass(frozen=True)
class ModelConfig:
    """The transformer around the pool: a GPT with RoPE, RMSNorm, grouped-query attention and SwiGLU."""

    layers: int = 4
    hidden_size: int = 128
    heads: int = 4  # attention heads
    kv_heads: int = 0  # grouped-query attention: key-value heads; 0 means as many as heads
    head_dim: int = 0  # width of an attention head; 0 means hidden_size / heads
    vocab_size: int = 256  # 256: bytes
    sequence_length: int = 128  # tokens
    ffn_hidden_size: int = 0  # width of leading dense layers; 0 means 4 * hidden_size
    dense_layers: int = 0  # leading layers with a dense FFN instead of the pool
    qk_norm: Literal["none", "head", "all"] = "head"  # RMSNorm of queries and keys: none, each head, all heads at once
    clip_qkv: float = 0.0  # queries, keys and values are clamped to +- this, after their norms; 0 means not at all
    tied_head: bool = False  # embedding and output head share weights
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    @property
    def head_width(self) -> int:
        """`head_dim`, or what it picks."""
        return self.head_dim or self.hidden_size // self.heads

    @property
    def groups(self) -> int:
        """`kv_heads`, or what it picks."""
        return self.kv_heads or self.heads


@dataclass(frozen=True)
class MoEConfig:
    """The pool, the topology that shows it to the layers, and the router."""

    pool: int = 32  # experts in all
    top_k: int = 2  # experts per token and layer
    expert_width: int = 64  # an expert is a SwiGLU FFN hidden -> expert_width -> hidden
    topology: Literal["private", "block", "full", "rotational"] = "private"
    window: int = 0  # rotational: experts that a layer sees
    stride: int = 0  # rotational: how far the window moves
    group: int = 1  # block, rotational: adjacent layers that share a window
    router: Literal["softmax", "sigmoid", "norm", "universal", "recurrent"] = "softmax"
    score: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"  # softmax over the window first, or the chosen last
    renormalise: bool = False  # weights of the chosen experts sum to 1
    route_scale: float = 1.0  # multiplies the weights of the chosen experts
    state_width: int = 32  # universal, recurrent: width of the trajectory state and of the query
    state_decay: float = 0.9  # universal: lambda in s <- RMSNorm(lambda * s + sum p_e k_e)
    mask_start: float = 0.0  # added at first to the logits of the experts that train.start_from hides from a layer
    mask_steps: int = 0  # steps in which mask_start goes to 0, in a line; 0 means no mask
    shared_expert_width: int = 0  # an always-on expert beside the routed ones; 0 means none
    force_balance: bool = False  # benchmarks only: random routing
    experts: Literal["auto", "loop", "torch", "fp8", "te"] = "auto"  # how expert GEMMs are computed
    dispatch: Literal["auto", "all_to_all", "gathered"] = "auto"  # replicate: rows one by one, or tokens once a rank
    headroom: float = 1.5  # gathered: room for rows at first, over an even share; a step that needs more runs again
    merge_wgrad: int = 0  # layers whose expert weight gradients are added in one pass; 1: each alone, 0: picked


@dataclass(frozen=True)
class BalanceConfig:
    """Coefficients of the balance terms; they add up, and all zero means none."""

    uelb: float = 0.0  # Universal Expert Load Balance: sum_e F_e * P_e / pi_e
    pool: float = 0.0  # pool-level loss (UniPool): P * sum_e F_e * P_e
    layer: float = 0.0  # Switch loss per layer, averaged over layers
    bias: float = 0.0  # loss-free bias: step of b_e += bias * sign(pi_e - F_e)
    z_loss: float = 0.0  # mean squared logsumexp of the router logits


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work. Data parallelism is what remains: world / (pipeline * tensor)."""

    pipeline_parallel: int = 1
    virtual_stages: int = 1  # interleaved schedule: model chunks per pipeline rank
    expert_parallel: int = 1
    tensor_parallel: int = 1  # with sequence parallelism whenever it is above 1
    stage_layers: tuple[int, ...] = ()  # layers of each (virtual) stage in order; empty means even
    placement: Literal["replicate", "home", "hybrid"] = "replicate"  # where an expert lives that several stages reach
    pool_budget_gib: float = 0.0  # hybrid: bytes a GPU for its part of the pool (weights, gradients, optimizer state)
    measured_use: str = ""  # home, hybrid: folder of a run whose use of the experts decides where they start
    replace_interval: int = 0  # home, hybrid: steps between re-placements by measured use; 0 means never
    lag: int = -1  # home, hybrid: slots by which backward trails; 1: a slot's two directions overlap; -1 picks
    pool_optimizer: Literal["device", "host"] = "device"  # where its Adam state lives; host: DeepSpeed's CPU Adam
    host_state: Literal["fp32", "bf16"] = "fp32"  # type of the moments in host memory
    overlap_grad_reduce: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    distributed_optimizer: bool = True

    @property
    def slots_behind(self) -> int:
        """`lag`, or what it picks: 1 in lock step, so that two directions overlap, unless with tensor parallelism."""
        return self.lag if self.lag >= 0 else int(self.placement != "replicate" and self.tensor_parallel == 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Steps are optimizer steps."""

    lr: float = 1e-3
    min_lr: float = 0.0
    schedule: Literal["cosine", "wsd", "power"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the final decay; 0 means a tenth of the run
    power: float = 0.5  # power: lr * (step / warmup) ** -power after warm-up
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0  # 0 means no clipping


@dataclass(frozen=True)
class TrainConfig:
    """The run: length, batch, precision, intervals."""

    start_from: str = ""  # folder of a converted model or of a run whose weights a new run starts with
    steps: int = 100
    global_batch_size: int = 16  # sequences per step, over all ranks
    micro_batch_size: int = 2  # sequences per rank and microbatch
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_recipe: Literal["auto", "tensorwise", "delayed", "blockwise", "mxfp8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    transformer_engine: Literal["auto", "on", "off"] = "auto"
    seed: int = 1234
    eval_interval: int = 50  # steps; 0 means only at the end
    eval_batches: int = 4  # global batches per validation
    save_interval: int = 0  # steps; 0 means only at the end
    keep_checkpoints: int = 2
    log_interval: int = 1
    record_slots: bool = False  # keep the times of pipeline slots for the report's picture of time
    check_replicas_interval: int = 50  # steps between bit-equality checks of pool replicas; 0 means never
    timeout_seconds: float = 600.0  # a collective that takes longer ends the job


@dataclass(frozen=True)
class DataConfig:
    """Text. `stdlib` is the running Python's own library sources, as bytes; a path is a file or folder of text."""

    source: str = "stdlib"  # read as bytes, where there is no blend
    max_megabytes: float = 32.0  # of source
    blend: tuple[str, ...] = ()  # tokenized files instead of source: WEIGHT PREFIX ..., or one PREFIX; .bin and .idx
    tokenizer: str = ""  # blend: bytes or a tokenizer.json; empty means what `moue data prepare` noted beside the files
    split: tuple[float, ...] = ()  # shares of training, validation and, kept aside, test; empty means by valid_percent
    valid_percent: float = 5.0
    document_mask: bool = False  # attention stays within a document
    eod_mask_loss: bool = False  # no loss where the next token begins another document
    cache: str = ""  # folder of the tokenized copy and of indices; empty means inside the run folder

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of training, validation and test; they need not sum to 100."""
        if not self.split:
            return 100 - self.valid_percent, self.valid_percent, 0.0
        train, valid, test = (*self.split, 0.0, 0.0)[:3]
        return train, valid, test


@dataclass(frozen=True)
class Config:
    """A whole run. `name` is the folder under `output`."""

    name: str = "run"
    output: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def moe_layers(self) -> int:
        return self.model.layers - self.model.dense_layers

    def topology(self) -> Topology:
        """The windows of this model's MoE layers; raises ConfigError where they do not fit."""
        m = self.moe
        try:
            return build_topology(m.topology, self.moe_layers, m.pool, window=m.window, stride=m.stride, group=m.group)
        except ValueError as error:
            raise ConfigError(str(error)) from None
