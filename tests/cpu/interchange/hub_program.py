"""A program of its own that asks transformers what exported folders say: `python hub_program.py QUESTIONS ANSWERS`.

QUESTIONS is a file of torch.save: {name: (folder, tokens [b, s])}. The answers, by name: logits, those behind padding,
those with the first expert times 1.01, a loss, and what `generate` gives with and without cache.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

NEW = 9  # tokens


@torch.no_grad()
def answer(folder: str, tokens_bs: Tensor) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    out = model(tokens_bs, labels=tokens_bs)
    said: dict[str, Any] = {"logits": out.logits, "loss": float(out.loss), "dtype": str(model.dtype)}
    for cache in (True, False):
        ids = model.generate(
            input_ids=tokens_bs[:, :5],
            attention_mask=torch.ones_like(tokens_bs[:, :5]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=cache,
        )
        said["cached" if cache else "not cached"] = ids
    padded = torch.cat([torch.zeros_like(tokens_bs[:, :3]), tokens_bs], 1)  # to the left, and hidden
    seen = torch.ones_like(padded)
    seen[:, :3] = 0
    places = (seen.cumsum(1) - 1).clamp(min=0)
    said["padded"] = model(padded, attention_mask=seen, position_ids=places).logits[:, 3:]
    down = next(p for name, p in model.named_parameters() if "experts." in name and "down_proj" in name)
    (down[0] if down.dim() == 3 else down).mul_(1.01)
    said["off"] = model(tokens_bs).logits
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = torch.load(sys.argv[1], weights_only=False)
    torch.save({name: answer(*question) for name, question in questions.items()}, sys.argv[2])
