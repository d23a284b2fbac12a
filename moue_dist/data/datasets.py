"""Bytes of text through megatron-core's GPTDataset, in an order that no layout and no run length changes.

s sequence length. Sample i of the run is sample i mod n of epoch i div n, with n the samples of one pass; epoch 0 keeps
GPTDataset's shuffle, later ones are permuted by (train.seed, epoch). So a run that is resumed, laid out differently or
made longer reads the same samples at the same steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moue_dist.config import Config, ConfigError
from moue_dist.data.corpus import EOD, find_corpus
from moue_dist.data.sample_index import ensure_helpers


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
    ensure_helpers()
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
