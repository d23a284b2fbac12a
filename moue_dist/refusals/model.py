"""Models that cannot be: heads, widths and what tensor parallelism splits."""

from __future__ import annotations

from moue_dist.config import Config, refuse


def check_model(config: Config) -> None:
    m, tp = config.model, config.parallel.tensor_parallel
    groups = m.groups
    refuse(
        m.head_dim == 0 and (m.hidden_size % m.heads != 0 or m.hidden_size // m.heads % 2 != 0),
        f"model.hidden_size={m.hidden_size} over model.heads={m.heads} must give an even whole head width (RoPE turns "
        f"pairs); change one, or set model.head_dim",
    )
    refuse(m.head_dim % 2 != 0, f"model.head_dim={m.head_dim} must be even (RoPE turns pairs)")
    refuse(m.rope_base != int(m.rope_base), f"model.rope_base={m.rope_base} must be a whole number")
    refuse(m.heads % groups != 0, f"model.kv_heads={m.kv_heads} does not divide model.heads={m.heads}; use a divisor")
    refuse(
        m.dense_layers >= m.layers,
        f"model.dense_layers={m.dense_layers} leaves no MoE layer of model.layers={m.layers}; lower it",
    )
    ffn = m.ffn_hidden_size or 4 * m.hidden_size
    for name, value in (
        ("model.heads", m.heads),
        ("model.kv_heads" if m.kv_heads else "model.heads", groups),
        ("model.sequence_length", m.sequence_length),
        ("model.vocab_size", m.vocab_size),
        ("model.ffn_hidden_size", ffn if m.dense_layers else 0),
        ("moe.shared_expert_width", config.moe.shared_expert_width),
    ):
        refuse(
            value % tp != 0,
            f"{name}={value} is not divisible by parallel.tensor_parallel={tp}, over which it is split; change one",
        )
