"""MoUE in one process and plain PyTorch, written to be obviously right: the yardstick of the parity tests.

Nothing is fused, sharded or saved; a pool shared by several layers is simply one tensor that several layers use.
Formulas: docs/math.md. Shapes: b sequences, s tokens each, T = b * s, d hidden, P pool, W window, k chosen, r state.
Everything runs in the type of the parameters (fp32 against the trainer, fp64 for gradient checks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moue_dist.config import Config, ModelConfig, OptimizerConfig

# Tokens and labels, [b, s]; perhaps documents [b, s + 1], the number of every token's document and of the last label's.
Batch = tuple[Tensor, ...]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model by its global name."""
    m, e = config.model, config.moe
    d, r, hd, kv = m.hidden_size, e.state_width, m.head_dim or m.hidden_size // m.heads, m.kv_heads or m.heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (m.vocab_size, d)}
    window = config.topology().window
    routers: dict[str, dict[str, tuple[int, ...]]] = {
        "universal": {"query": (r, d)},
        "recurrent": {"input": (r, d), "gate": (window, r)},
        "norm": {"weight": (window, d), "scale": (1,)},
    }
    shared_routers: dict[str, dict[str, tuple[int, ...]]] = {
        "universal": {"keys": (e.pool, r), "transition": (r, r)},
        "recurrent": {"w_ih": (3 * r, r), "w_hh": (3 * r, r)},
    }
    for i in range(m.layers):
        layer = f"decoder.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (d,)
        shapes[layer + "self_attention.linear_qkv.weight"] = ((m.heads + 2 * kv) * hd, d)
        shapes[layer + "self_attention.linear_proj.weight"] = (d, m.heads * hd)
        if m.qk_norm != "none":
            every = m.qk_norm == "all"
            shapes[layer + "self_attention.q_layernorm.weight"] = (m.heads * hd if every else hd,)
            shapes[layer + "self_attention.k_layernorm.weight"] = (kv * hd if every else hd,)
        shapes[layer + "pre_mlp_layernorm.weight"] = (d,)
        ffn, prefix = (m.ffn_hidden_size or 4 * d, "mlp.") if i < m.dense_layers else (e.shared_expert_width, "")
        if i >= m.dense_layers:
            for name, shape in routers.get(e.router, {"weight": (window, d)}).items():
                shapes[f"{layer}mlp.router.{name}"] = shape
            prefix = "mlp.shared_expert."
        if ffn:
            shapes[f"{layer}{prefix}linear_fc1.weight"] = (2 * ffn, d)
            shapes[f"{layer}{prefix}linear_fc2.weight"] = (d, ffn)
    shapes["decoder.final_layernorm.weight"] = (d,)
    if not m.tied_head:
        shapes["output_layer.weight"] = (m.vocab_size, d)
    if config.moe_layers:
        shapes["pool.weight"] = (e.pool, 3 * e.expert_width * d)
        shapes |= {f"shared_router.{name}": shape for name, shape in shared_routers.get(e.router, {}).items()}
    return shapes


def rms_norm(x: Tensor, gain: Tensor | float, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """w_in [2f, d]: first half gate, second half up; w_out [d, f]."""
    gate, up = (x @ w_in.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w_out.T


def rope(x_bshd: Tensor, base: float) -> Tensor:
    """Rotary embedding: number j of the first half turns with number j of the second half."""
    s, half = x_bshd.shape[1], x_bshd.shape[3] // 2
    frequency = 1.0 / base ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(s, dtype=torch.float32), frequency)[None, :, None, :]
    cos, sin = angle.cos().to(x_bshd), angle.sin().to(x_bshd)
    a, b = x_bshd[..., :half], x_bshd[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(
    x_bsd: Tensor, w: Mapping[str, Tensor], name: str, m: ModelConfig, documents_bs: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention; linear_qkv holds, per key-value head, its query heads, then k, then v.

    With `documents_bs` a token sees none but its own document.
    """
    b, s, d = x_bsd.shape
    kv, hd = m.kv_heads or m.heads, m.head_dim or d // m.heads
    per_group = m.heads // kv
    qkv = (x_bsd @ w[name + "linear_qkv.weight"].T).view(b, s, kv, per_group + 2, hd)
    q = qkv[..., :per_group, :].reshape(b, s, m.heads, hd)
    k, v = qkv[..., per_group, :], qkv[..., per_group + 1, :]
    q_gain, k_gain = w.get(name + "q_layernorm.weight"), w.get(name + "k_layernorm.weight")
    if m.qk_norm == "head":
        q, k = rms_norm(q, q_gain, m.norm_eps), rms_norm(k, k_gain, m.norm_eps)
    if m.qk_norm == "all":
        q = rms_norm(q.flatten(2), q_gain, m.norm_eps).view_as(q)
        k = rms_norm(k.flatten(2), k_gain, m.norm_eps).view_as(k)
    if m.clip_qkv:
        q, k, v = (x.clamp(-m.clip_qkv, m.clip_qkv) for x in (q, k, v))
    q, k = rope(q, m.rope_base), rope(k, m.rope_base)
    k, v = k.repeat_interleave(per_group, dim=2), v.repeat_interleave(per_group, dim=2)
    score = torch.einsum("bqhc,bkhc->bhqk", q, k) / hd**0.5
    score = score.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
    if documents_bs is not None:
        other = documents_bs[:, None, :, None] != documents_bs[:, None, None, :]
        score = score.masked_fill(other, float("-inf"))
    out = torch.einsum("bhqk,bkhc->bqhc", score.softmax(-1), v)
    return out.reshape(b, s, m.heads * hd) @ w[name + "linear_proj.weight"].T


def norm_constant(window: int, k: int) -> float:
    """C of the norm router: 1 / E[sum of the k largest relu(g / |g|)], g normal in `window` dimensions."""
    g = torch.randn(4096, window, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 1.0 / (g / g.norm(dim=1, keepdim=True)).relu().topk(k, dim=1).values.sum(1).mean().item()


def gru(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """GRU cell without biases, gates in the order reset, update, new."""
    (xr, xz, xn), (hr, hz, hn) = (x @ w_ih.T).chunk(3, -1), (h @ w_hh.T).chunk(3, -1)
    reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return (1 - update) * torch.tanh(xn + reset * hn) + update * h


@dataclass
class Routing:
    """One layer's routing. Dense over the pool, zero where not chosen or not visible."""

    chosen_tp: Tensor  # bool [T, P]
    weight_tp: Tensor  # [T, P]
    score_tp: Tensor  # [T, P] normalised scores for the balance terms
    logits_tw: Tensor  # [T, W]
    state_tr: Tensor  # [T, r]


@dataclass
class Output:
    """One microbatch: `total` is what is differentiated, `terms` are the unweighted auxiliary terms."""

    lm_loss: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    counts_lp: Tensor  # int64 [L, P]


class Reference(nn.Module):
    """The whole model with its full parameters in `weights`, by global name; see `parameter_shapes`."""

    def __init__(self, config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert not config.moe.force_balance, "random routing has no reference"
        self.config, self.topology = config, config.topology()
        self.weights: dict[str, nn.Parameter] = {}
        random = torch.Generator().manual_seed(seed)
        for name, shape in parameter_shapes(config).items():
            value = torch.randn(shape, generator=random, dtype=torch.float64) * config.model.init_std
            value = torch.ones(shape) if len(shape) == 1 else value
            value = torch.zeros(shape) if name == "shared_router.transition" else value
            self.weights[name] = nn.Parameter(value.to(dtype))
            self.register_parameter(name.replace(".", "/"), self.weights[name])
        layers, pool, window = self.topology.layers, self.topology.pool, self.topology.window
        self.visible_lp = torch.tensor([[float(e in v) for e in range(pool)] for v in self.topology.windows])
        self.pi_p = torch.tensor(self.topology.target_share)
        self.F_p = self.pi_p.clone()  # share of all assignments, previous global batch
        self.f_lp = self.visible_lp / max(window, 1)  # share within each layer, previous global batch
        self.bias_p = torch.zeros(pool)
        self.hidden_lw, self.step = torch.zeros(layers, window), 0  # 1: the mask hides this expert; optimizer steps
        assert layers == 0 or self.visible_lp.sum(1).eq(window).all()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy full tensors in by name; every parameter must be there with its shape, and nothing else."""
        assert weights.keys() == self.weights.keys(), sorted(weights.keys() ^ self.weights.keys())
        with torch.no_grad():
            for name, value in weights.items():
                assert value.shape == self.weights[name].shape, (name, value.shape, self.weights[name].shape)
                self.weights[name].copy_(value)

    def route(self, x_td: Tensor, layer: int, state_tr: Tensor) -> Routing:
        """The router of MoE layer `layer` (0-based among MoE layers)."""
        moe, w, name = self.config.moe, self.weights, f"decoder.layers.{self.config.model.dense_layers + layer}."
        ids_w = torch.tensor(self.topology.windows[layer])
        bias_w, new_state_tr, keys_wr = self.bias_p[ids_w], state_tr, None
        if moe.router == "universal":
            query = x_td @ w[name + "mlp.router.query"].T + state_tr @ w["shared_router.transition"].T
            keys_wr = w["shared_router.keys"][ids_w]
            logits_tw = query @ keys_wr.T / moe.state_width**0.5
        elif moe.router == "recurrent":
            value_tr = x_td @ w[name + "mlp.router.input"].T
            new_state_tr = gru(value_tr, state_tr, w["shared_router.w_ih"], w["shared_router.w_hh"])
            logits_tw = new_state_tr @ w[name + "mlp.router.gate"].T
        else:
            logits_tw = x_td @ w[name + "mlp.router.weight"].T
        if self.step < moe.mask_steps:
            logits_tw = logits_tw + moe.mask_start * (1 - self.step / moe.mask_steps) * self.hidden_lw[layer]

        if moe.router == "norm":
            unit_tw = logits_tw / (logits_tw.norm(dim=-1, keepdim=True) + 1e-6)
            best_tk = (unit_tw + bias_w).topk(moe.top_k).indices
            constant = norm_constant(len(ids_w), moe.top_k)
            weight_tk = (unit_tw.relu() * w[name + "mlp.router.scale"] * constant).gather(1, best_tk)
            score_tw = unit_tw.relu() / (unit_tw.relu().sum(-1, keepdim=True) + 1e-6)
        elif moe.router == "sigmoid":
            gate_tw = logits_tw.sigmoid()
            best_tk = (gate_tw + bias_w).topk(moe.top_k).indices
            weight_tk = gate_tw.gather(1, best_tk)
            weight_tk = weight_tk / (weight_tk.sum(-1, keepdim=True) + 1e-20)
            score_tw = gate_tw / gate_tw.sum(-1, keepdim=True)
        else:
            score_tw = logits_tw.softmax(-1)
            if moe.score == "softmax_topk":
                best_tk = (score_tw + bias_w).topk(moe.top_k).indices
                weight_tk = score_tw.gather(1, best_tk)
                weight_tk = weight_tk / weight_tk.sum(-1, keepdim=True) if moe.renormalise else weight_tk
            else:
                best_tk = (logits_tw + bias_w).topk(moe.top_k).indices
                weight_tk = logits_tw.gather(1, best_tk).softmax(-1)
        if keys_wr is not None:
            seen_tr = (weight_tk[:, :, None] * keys_wr[best_tk]).sum(1)
            new_state_tr = rms_norm(moe.state_decay * state_tr + seen_tr, 1.0, 1e-6)

        zeros_tp, ids_tk = x_td.new_zeros(len(x_td), moe.pool), ids_w[best_tk]
        return Routing(
            zeros_tp.scatter(1, ids_tk, 1.0).bool(),
            zeros_tp.scatter(1, ids_tk, weight_tk * moe.route_scale),
            zeros_tp.index_copy(1, ids_w, score_tw),
            logits_tw,
            new_state_tr,
        )

    def experts(self, x_td: Tensor, weight_tp: Tensor) -> Tensor:
        """sum_e weight[t, e] * expert_e(x_t): every expert sees every token."""
        d, f, out_td = x_td.shape[1], self.config.moe.expert_width, torch.zeros_like(x_td)
        for row, weight_t in zip(self.weights["pool.weight"], weight_tp.T, strict=True):
            w_in, w_out = row[: 2 * f * d].view(2 * f, d), row[2 * f * d :].view(d, f)
            out_td = out_td + weight_t[:, None] * swiglu(x_td, w_in, w_out)
        return out_td

    def forward(self, tokens_bs: Tensor, documents_bs: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Logits [b, s, vocabulary] and the routing of each MoE layer."""
        m, w = self.config.model, self.weights
        x = w["embedding.word_embeddings.weight"][tokens_bs]
        state_tr, routings = x.new_zeros(tokens_bs.numel(), self.config.moe.state_width), []
        for i in range(m.layers):
            layer = f"decoder.layers.{i}."
            normed = rms_norm(x, w[layer + "input_layernorm.weight"], m.norm_eps)
            x = x + attention(normed, w, layer + "self_attention.", m, documents_bs)
            normed = rms_norm(x, w[layer + "pre_mlp_layernorm.weight"], m.norm_eps)
            if i < m.dense_layers:
                x = x + swiglu(normed, w[layer + "mlp.linear_fc1.weight"], w[layer + "mlp.linear_fc2.weight"])
                continue
            normed_td = normed.flatten(0, 1)
            routing = self.route(normed_td, i - m.dense_layers, state_tr)
            state_tr = routing.state_tr
            routings.append(routing)
            x = x + self.experts(normed_td, routing.weight_tp).view_as(x)
            if self.config.moe.shared_expert_width:
                shared = layer + "mlp.shared_expert."
                x = x + swiglu(normed, w[shared + "linear_fc1.weight"], w[shared + "linear_fc2.weight"])
        x = rms_norm(x, w["decoder.final_layernorm.weight"], m.norm_eps)
        return x @ w["embedding.word_embeddings.weight" if m.tied_head else "output_layer.weight"].T, routings

    def loss(self, tokens_bs: Tensor, labels_bs: Tensor, documents: Tensor | None = None) -> Output:
        """The losses of one microbatch; means are over its tokens.

        `documents` [b, s + 1] is used as the configuration says: by attention, by the loss, which then leaves out
        labels of another document, or by both.
        """
        data = self.config.data
        logits, routings = self(tokens_bs, documents[:, :-1] if documents is not None and data.document_mask else None)
        if documents is not None and data.eod_mask_loss:
            counts = documents[:, :-1] == documents[:, 1:]
            lm_loss = F.cross_entropy(logits[counts], labels_bs[counts])
        else:
            lm_loss = F.cross_entropy(logits.flatten(0, 1), labels_bs.flatten())
        terms = {name: lm_loss.new_zeros(()) for name in ("uelb", "pool", "layer", "z_loss")}
        for layer, routing in enumerate(routings):
            for e in self.topology.windows[layer]:
                p = routing.score_tp[:, e].mean() / len(routings)
                terms["uelb"] = terms["uelb"] + self.F_p[e] * p / self.pi_p[e]
                terms["pool"] = terms["pool"] + self.topology.pool * self.F_p[e] * p
                terms["layer"] = terms["layer"] + self.topology.window * self.f_lp[layer, e] * p
            terms["z_loss"] = terms["z_loss"] + routing.logits_tw.logsumexp(-1).pow(2).mean() / len(routings)
        total = lm_loss
        for name, term in terms.items():
            total = total + getattr(self.config.balance, name) * term
        counts = [routing.chosen_tp.sum(0) for routing in routings]
        return Output(lm_loss, total, terms, torch.stack(counts) if counts else torch.zeros(0, self.topology.pool))

    def finish_batch(self, counts_lp: Tensor) -> None:
        """Statistics for the next step, and the loss-free bias, from the counts of a global batch."""
        if not len(counts_lp):
            return
        self.F_p = counts_lp.sum(0) / counts_lp.sum()
        self.f_lp = counts_lp / counts_lp.sum(1, keepdim=True)
        # sign(pi_e - F_e) with pi_e = c_e / (L * W), in whole numbers, so that an even share gives exactly 0.
        c_p, slots = torch.tensor(self.topology.exposure), self.topology.layers * self.topology.window
        self.bias_p = self.bias_p + self.config.balance.bias * torch.sign(
            c_p * counts_lp.sum() - slots * counts_lp.sum(0)
        )


def train(
    reference: Reference,
    batches: Sequence[Sequence[Sequence[Batch]]],
    optim: OptimizerConfig,
    lrs: Sequence[float] | None = None,
    record: list[dict] | None = None,
) -> list[float]:
    """Train on batches[step][data rank][microbatch]; returns each step's language-model loss (mean of microbatches).

    `lrs` gives each step's learning rate (else optim.lr throughout). `record`, a list, gets a dict per step with
    grad_norm (before clipping), terms (mean over microbatches), counts_lp.
    """
    parameters = list(reference.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    losses = []
    for step, ranks in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lrs[step] if lrs is not None else optim.lr
        for p in parameters:
            p.grad = torch.zeros_like(p)
        outputs = [reference.loss(*microbatch) for rank in ranks for microbatch in rank]
        torch.stack([output.total for output in outputs]).mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad or float("inf"))
        optimizer.step()
        counts_lp = torch.stack([output.counts_lp for output in outputs]).sum(0)
        reference.finish_batch(counts_lp)
        reference.step += 1
        losses.append(torch.stack([output.lm_loss for output in outputs]).mean().item())
        if record is not None:
            terms = {n: torch.stack([o.terms[n] for o in outputs]).mean().item() for n in outputs[0].terms}
            record.append({"grad_norm": float(grad_norm), "terms": terms, "counts_lp": counts_lp})
    return losses
