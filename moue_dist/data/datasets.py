"""Bytes of text through megatron-core's GPTDataset, in an order that no layout and no run length changes.

b rows of a microbatch, s sequence length, G global batch. Sample i of the run is sample i mod n of epoch i div n, with
n the samples of one pass; epoch 0 keeps GPTDataset's shuffle, later ones are permuted by (train.seed, epoch). So a run
that is resumed, laid out differently or made longer reads the same samples at the same steps.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moue_dist.config import Config, ConfigError, TrainConfig
from moue_dist.data.corpus import EOD, find_corpus, prepare_corpus

__all__ = ["Batches", "Samples", "build_datasets", "data_folder", "prepare_corpus"]

_HELPERS = "megatron.core.datasets.helpers_cpp"


def data_folder(config: Config, run_dir: str | Path) -> Path:
    """Where the corpus and its indices live: data.cache, or `data` inside the run folder."""
    return Path(config.data.cache).expanduser().resolve() if config.data.cache else Path(run_dir).resolve() / "data"


class _Bytes:
    """What GPTDataset asks of a tokenizer. Without `pad` it masks no token: byte 0 counts like any other."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = EOD
        self.unique_identifiers = {"class": "bytes", "eod": EOD}  # the vocabulary's size changes no token


class Samples(torch.utils.data.Dataset):
    """The first `count` samples of an endless pass over `dataset`; item: dict of tokens [s], labels [s] int64."""

    def __init__(self, dataset: GPTDataset, count: int, seed: int) -> None:
        self.dataset = dataset
        self.count = count
        self.seed = seed
        self._permutation: tuple[int, numpy.ndarray] | None = None

    @property
    def epochs(self) -> float:
        """How often the run reads the text."""
        return self.count / len(self.dataset)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        epoch, at = divmod(index, len(self.dataset))
        if epoch:
            if self._permutation is None or self._permutation[0] != epoch:
                generator = numpy.random.default_rng([self.seed, epoch])
                self._permutation = (epoch, generator.permutation(len(self.dataset)))
            at = int(self._permutation[1][at])
        return self.dataset[at]


def build_datasets(
    config: Config, folder: str | Path, samples_train: int, samples_valid: int
) -> tuple[Samples, Samples | None]:
    """Training and validation samples of the corpus that `prepare_corpus(config.data, folder)` wrote.

    A collective where torch.distributed is up: every rank calls it, rank 0 builds the indices in `folder`, which all
    ranks must see. A validation part shorter than `samples_valid` is read again from its start; there is none (None)
    with data.valid_percent=0. Raises ConfigError where the vocabulary or the text is too small.
    """
    if config.model.vocab_size < 256:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} cannot hold the 256 bytes; set at least 256")
    prefix = _agreed_prefix(config, Path(folder).resolve())
    _ensure_helpers()
    valid = config.data.valid_percent
    gpt_config = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.model.sequence_length,
        blend=([prefix], None),
        split=f"{100 - valid:.9f},{valid:.9f},0",
        path_to_cache=str(Path(prefix).parent / "index"),
        tokenizer=_Bytes(config.model.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    _check_length(config, prefix, gpt_config.split_matrix)
    # One pass each (None): GPTDataset's own repetition shuffles otherwise when a run is made longer.
    train_set, valid_set, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [None, None, None], lambda: True, gpt_config
    ).build()
    seed = config.train.seed
    train = Samples(train_set, samples_train, seed)
    return train, None if valid_set is None else Samples(valid_set, samples_valid, seed)


def _agreed_prefix(config: Config, folder: Path) -> str:
    """Rank 0's corpus, seen by all ranks: nodes with other sources must not train on other text."""
    corpus = find_corpus(config.data, folder)
    prefixes = [str(folder / corpus.prefix) if corpus else None]
    if dist.is_initialized():
        dist.broadcast_object_list(prefixes, src=0)
    prefix = prefixes[0]
    if prefix is None:
        raise ConfigError(f"there is no corpus of data.source={config.data.source} in {folder}: prepare it first")
    seen = [IndexedDataset.exists(prefix)]
    if dist.is_initialized():
        seen = [True] * dist.get_world_size()
        dist.all_gather_object(seen, IndexedDataset.exists(prefix))
    if not all(seen):
        raise ConfigError(
            f"rank {seen.index(False)} cannot see {prefix}.bin: set data.cache (or output) to a folder "
            "on a file system that all nodes share"
        )
    return prefix


def _check_length(config: Config, prefix: str, split: list[tuple[float, float] | None]) -> None:
    """Refuses a training part below one global batch and a validation part below one sequence."""
    dataset = IndexedDataset(prefix)  # unmaps its arrays when it goes: a name keeps it, and a copy leaves it
    lengths = dataset.sequence_lengths.copy()
    s = config.model.sequence_length
    needs = (("training", "one global batch", config.train.global_batch_size), ("validation", "one sequence", 1))
    for (part, what, samples), bounds in zip(needs, split[:2], strict=True):
        if bounds is None:
            continue
        begin, end = (round(edge * len(lengths)) for edge in bounds)  # as the builder cuts
        has, need = int(lengths[begin:end].sum()), samples * s + 1
        if has < need:
            raise ConfigError(
                f"the {part} part of data.source={config.data.source} has {has} bytes, {need - has} fewer than {what} "
                f"needs ({samples} x model.sequence_length={s}, plus 1): give more text, raise data.max_megabytes "
                f"(now {config.data.max_megabytes:g}), or change data.valid_percent (now {config.data.valid_percent:g})"
            )


class Batches:
    """Microbatches by global step. Row i of microbatch m on data rank d is sample step*G + (m*dp + d)*b + i.

    Any dp_size gives the same G samples per step, in other microbatches. The next batch is read by a thread while the
    current one is trained on; on CUDA it waits in pinned memory and is copied without blocking.
    """

    def __init__(
        self, train: Samples, valid: Samples | None, options: TrainConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.global_batch, self.micro_batch = options.global_batch_size, options.micro_batch_size
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

        Raises ConfigError where dp_size * micro_batch_size does not divide the global batch.
        """
        return self._take("train", step, dp_rank, dp_size)

    def validation(self, batch_index: int, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        """The microbatches of validation's global batch `batch_index`, counted from 0 in every validation."""
        if self._samples["valid"] is None:
            raise ConfigError(
                "data.valid_percent=0 leaves no text to validate on: raise it, or set train.eval_batches=0"
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
        rows = future.result()
        samples = self._samples[part]
        if samples is not None and (index + 2) * self.global_batch <= len(samples):
            following = (index + 1, dp_rank, dp_size)
            self._ahead[part] = (following, self._reader.submit(self._read, part, *following))
        rows = rows.to(self.device, non_blocking=True)
        b, s = self.micro_batch, rows.shape[-1]
        if self._positions is None:
            self._positions = torch.arange(s, device=self.device).repeat(b, 1)
        return [
            {"tokens": rows[0, at : at + b], "labels": rows[1, at : at + b], "position_ids": self._positions}
            for at in range(0, rows.shape[1], b)
        ]

    def _read(self, part: str, index: int, dp_rank: int, dp_size: int) -> torch.Tensor:
        """Tokens and labels [2, microbatches*b, s] of one data rank, on the host."""
        samples, b = self._samples[part], self.micro_batch
        assert samples is not None
        firsts = range(index * self.global_batch + dp_rank * b, (index + 1) * self.global_batch, dp_size * b)
        items = [samples[first + i] for first in firsts for i in range(b)]
        rows = torch.stack([torch.stack([item[name] for item in items]) for name in ("tokens", "labels")])
        return rows.pin_memory() if self.device.type == "cuda" else rows


def _ensure_helpers() -> None:
    """megatron-core compiles one function that GPTDataset needs; where the wheel came without it, numpy does."""
    if _HELPERS in sys.modules or importlib.util.find_spec(_HELPERS) is not None:
        return
    module = types.ModuleType(_HELPERS)
    builders: dict[str, Callable[..., numpy.ndarray]] = {f"build_sample_idx_int{n}": _sample_index for n in (32, 64)}
    vars(module).update(builders)
    sys.modules[_HELPERS] = module


def _sample_index(
    sizes: numpy.ndarray,
    documents: numpy.ndarray,
    sequence_length: int,
    epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    extra: int = 1,
) -> numpy.ndarray:
    """Where each sample begins: [samples + 1, 2] of (position in `documents`, offset in that document).

    The same as build_sample_idx in megatron-core's datasets/helpers.cpp for drop_last=True.
    Example: documents of 3 and 4 tokens, sequences of 2 -> [[0, 0], [0, 2], [1, 1], [1, 3]].
    """
    if not drop_last:
        raise NotImplementedError("a last partial sequence needs megatron-core's compiled helpers")
    samples = (epochs * tokens_per_epoch - extra) // sequence_length
    lengths = sizes[documents].astype(numpy.int64)
    ends = numpy.cumsum(lengths)
    at = numpy.arange(samples + 1, dtype=numpy.int64) * sequence_length
    document = numpy.searchsorted(ends, at, side="right")
    kind = numpy.int32 if max(len(documents), int(sizes.max())) <= numpy.iinfo(numpy.int32).max else numpy.int64
    return numpy.stack([document, at - (ends[document] - lengths[document])], axis=1).astype(kind)
