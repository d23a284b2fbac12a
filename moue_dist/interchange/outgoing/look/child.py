"""The process in which transformers runs: loads a folder, answers one request, a line of JSON at a time.

Started by `ask.py`, never imported: what a trainer does to torch on a CPU host leaves transformers' models silently
wrong. `python -m moue_dist.interchange.outgoing.look.child REQUEST`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

BATCH_TOKENS = 4096  # of sequences that are computed at once


class _Lines:
    """What transformers calls a streamer: says each new token at once."""

    def __init__(self) -> None:
        self._prompt = True

    def put(self, ids: Tensor) -> None:
        if not self._prompt:
            _say(ids.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        pass


def generate(model: Any, request: dict[str, Any], device: torch.device) -> None:
    ids = torch.tensor([request["ids"]], device=device)
    torch.manual_seed(request["seed"])
    how: dict[str, Any] = {"do_sample": False}
    if request["temperature"] > 0:
        how = {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"], "top_k": 0}
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request["max_tokens"],
        eos_token_id=request["end"],
        pad_token_id=request["end"] or 0,
        streamer=_Lines(),
        **how,
    )


def score(model: Any, request: dict[str, Any], device: torch.device) -> None:
    """For each sequence the sum of the log probabilities of its tokens from `firsts` on, in nats."""
    stored = numpy.load(request["sequences"])
    sequences = numpy.split(stored["tokens"], numpy.cumsum(stored["lengths"])[:-1])
    for batch in _batches(sequences, stored["firsts"].tolist()):
        longest = max(len(ids) for ids, _ in batch)
        # Padded behind their ends, which no earlier token sees.
        rows = torch.tensor(numpy.stack([numpy.pad(ids, (0, longest - len(ids))) for ids, _ in batch])).to(device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        chances = -F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double()
        _say([float(row[first - 1 : len(ids) - 1].sum()) for row, (ids, first) in zip(chances, batch, strict=True)])


def _batches(sequences: list[Any], firsts: list[int]) -> Iterator[list[tuple[Any, int]]]:
    batch: list[tuple[Any, int]] = []
    for ids, first in zip(sequences, firsts, strict=True):
        if batch and max(len(ids), *(len(other) for other, _ in batch)) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append((ids.astype(numpy.int64), first))
    if batch:
        yield batch


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


@torch.no_grad()
def main(request: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(request["folder"], trust_remote_code=True, dtype="auto")
    model = model.eval().to(device)
    {"generate": generate, "score": score}[request["do"]](model, request, device)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
