"""Tiny random models of transformers and their logits, made in a process of its own: `python -m tests.foreign FOLDER`.

A process in which `cpu_host.install` has run gets transformers' models wrong, silently. For each model FOLDER/NAME
holds what `save_pretrained` writes, and FOLDER/NAME.pt its logits on `tokens()`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "rms_norm_eps": 1e-4,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # by name: transformers' module, class, what differs
    "olmoe": ("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.9}),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 12,
         "norm_topk_prob": True, **ROPE},
    ),
    "qwen3_moe, dense first": (
        "qwen3_moe", "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "mlp_only_layers": [0],
         "num_key_value_heads": 4},
    ),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}),
    "llama": ("llama", "Llama", ROPE),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
}  # fmt: skip


def tokens() -> Tensor:
    """[2, 17]: inputs and labels are its two shifts."""
    return torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


def make(folder: Path) -> None:
    """Fill `folder`, in a fresh process; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "tests.foreign", str(folder)], check=True, timeout=200)


def _make(folder: Path) -> None:
    from importlib import import_module

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for seed, (name, (module, kind, changes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        parts = import_module(f"transformers.models.{module}.modeling_{module}")
        config = getattr(import_module(f"transformers.models.{module}"), f"{kind}Config")(**{**SIZES, **changes})
        config._attn_implementation = "eager"
        model = getattr(parts, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:  # norms start at 1, which hides errors
                    p.add_(0.2 * torch.randn(p.shape))
            logits = model(tokens()[:, :-1], use_cache=False).logits
        model.save_pretrained(folder / name)
        torch.save(logits, folder / f"{name}.pt")


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
