"""A run's samples as microbatches of one data rank, read ahead by a thread.

b rows of a microbatch, s sequence length, G global batch.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from moue_dist.config import Config, ConfigError
from moue_dist.data.datasets import AnySamples
from moue_dist.data.documents import attention_mask


class Batches:
    """Microbatches by global step. Row i of microbatch m on data rank d is sample step*G + (m*dp + d)*b + i.

    Any dp_size gives the same G samples per step, in other microbatches. The next batch is read by a thread while the
    current one is trained on; on CUDA it waits in pinned memory and is copied without blocking.
    """

    def __init__(
        self, train: AnySamples, valid: AnySamples | None, config: Config, device: torch.device | str = "cpu"
    ) -> None:
        self.global_batch, self.micro_batch = config.train.global_batch_size, config.train.micro_batch_size
        self.mask_documents, self.mask_loss = config.data.document_mask, config.data.eod_mask_loss
        self._vocabulary = config.model.vocab_size
        self.seconds_waited = 0.0  # for the reader, in all
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._samples = {"train": train, "valid": valid}
        self._ahead: dict[str, tuple[tuple[int, int, int], Future[torch.Tensor]]] = {}
        self._positions: torch.Tensor | None = None
        # A new thread's current device is GPU 0: without this every rank would open a context there.
        on_cuda = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, "batches", initializer=on_cuda)

    def microbatches(self, step: int, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        """The microbatches of the step after `step` finished ones: dicts of tokens, labels, position_ids, [b, s] int64.

        With data.document_mask an attention_mask, [b, 1, s, s] bool, True where attention must not look; with
        data.eod_mask_loss a loss_mask, [b, s] bool, False where the label belongs to another document.
        Raises ConfigError where dp_size * micro_batch_size does not divide the global batch.
        """
        return self._take("train", step, dp_rank, dp_size)

    def validation(self, batch_index: int, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        """The microbatches of validation's global batch `batch_index`, counted from 0 in every validation."""
        if self._samples["valid"] is None:
            raise ConfigError(
                "data.valid_percent=0 (or data.split) leaves no text to validate on: raise it, or set "
                "train.eval_batches=0"
            )
        return self._take("valid", batch_index, dp_rank, dp_size)

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _take(self, part: str, index: int, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        if self.global_batch % (self.micro_batch * dp_size):
            raise ConfigError(
                f"train.global_batch_size={self.global_batch} is not divisible by train.micro_batch_size="
                f"{self.micro_batch} x {dp_size} data-parallel ranks"
            )
        key = (index, dp_rank, dp_size)
        known, future = self._ahead.pop(part, (None, None))
        if future is None or known != key:
            future = self._reader.submit(self._read, part, *key)
        began = time.perf_counter()
        rows = future.result()
        self.seconds_waited += time.perf_counter() - began
        samples = self._samples[part]
        if samples is not None and (index + 2) * self.global_batch <= len(samples):
            following = (index + 1, dp_rank, dp_size)
            self._ahead[part] = (following, self._reader.submit(self._read, part, *following))
        rows = rows.to(self.device, non_blocking=True)
        b, s = self.micro_batch, rows.shape[-1]
        if self._positions is None:
            self._positions = torch.arange(s, device=self.device).repeat(b, 1)
        return [self._microbatch(rows[:, at : at + b], self._positions) for at in range(0, rows.shape[1], b)]

    def _microbatch(self, rows: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {"tokens": rows[0], "labels": rows[1], "position_ids": positions}
        if self.mask_documents:
            batch["attention_mask"] = attention_mask(rows[2])
        if self.mask_loss:
            batch["loss_mask"] = rows[2] == rows[3]
        return batch

    def _read(self, part: str, index: int, dp_rank: int, dp_size: int) -> torch.Tensor:
        """Tokens and labels, and where asked for the documents of both, [2 or 4, microbatches*b, s], on the host."""
        samples, b = self._samples[part], self.micro_batch
        assert samples is not None
        firsts = range(index * self.global_batch + dp_rank * b, (index + 1) * self.global_batch, dp_size * b)
        items = [samples[first + i] for first in firsts for i in range(b)]
        kinds = [[item["tokens"] for item in items], [item["labels"] for item in items]]
        if self.mask_documents or self.mask_loss:
            kinds += [[item["documents"][:-1] for item in items], [item["documents"][1:] for item in items]]
        rows = torch.stack([torch.stack(kind) for kind in kinds])
        self._check_vocabulary(rows[:2], part, index)
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def _check_vocabulary(self, tokens: torch.Tensor, part: str, index: int) -> None:
        """An id beyond the embedding would end a GPU with an assertion that names nothing."""
        least, most = (int(number) for number in tokens.aminmax())
        if least < 0 or most >= self._vocabulary:
            raise ConfigError(
                f"the {part} text of global batch {index} holds token {least if least < 0 else most}, beyond "
                f"model.vocab_size={self._vocabulary}: the tokenized files are damaged; `moue data inspect PREFIX "
                "--verify` looks at them"
            )
