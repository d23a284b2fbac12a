"""Where documents begin inside a sample, and what attention and loss make of it.

b rows, s sequence length. A sample is cut from a row of documents; megatron-core's index knows the parts it is put
together of, so no end mark is needed. Where the end mark is known, what follows one is another document, too.
"""

from __future__ import annotations

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor


def document_numbers(dataset: GPTDataset, sample: int, text: Tensor, eod: int | None) -> Tensor:
    """For each of the sample's s + 1 tokens `text` the number of its document, counted from 0 within the sample.

    Parts of 3 and 2 tokens -> [0, 0, 0, 1, 1].
    """
    at = int(dataset.shuffle_index[sample])
    (first, skipped), (last, _) = dataset.sample_index[at].tolist(), dataset.sample_index[at + 1].tolist()
    # The last part goes on to the sample's end.
    lengths = dataset.dataset.sequence_lengths[dataset.document_index[first:last]].tolist()
    begins, here = torch.zeros(len(text), dtype=torch.int64), -skipped
    for length in lengths:
        here += length
        begins[here] = 1
    if eod is not None:
        begins[1:] |= text[:-1] == eod
    return begins.cumsum(0)


def attention_mask(documents_bs: Tensor) -> Tensor:
    """[b, 1, s, s] bool, True where a token (row) must not look: at later ones, and at other documents."""
    s = documents_bs.shape[1]
    later = torch.ones(s, s, dtype=torch.bool, device=documents_bs.device).triu(1)
    return (later | (documents_bs[:, :, None] != documents_bs[:, None, :]))[:, None]
