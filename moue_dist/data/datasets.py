"""Tokens through megatron-core's GPTDataset and BlendedDataset, in an order that no layout and no run length changes.

s sequence length. Sample i of one pair of files is sample i mod n of epoch i div n, with n the samples of one pass;
epoch 0 keeps GPTDataset's shuffle, later ones are permuted by (train.seed, epoch). In a blend, megatron-core's
BlendedDataset says from the weights alone whose turn it is, and each part counts its own samples. So a run that is
resumed, laid out differently or made longer reads the same samples at the same steps.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moue_dist.config import Config, ConfigError
from moue_dist.data.corpus import find_corpus
from moue_dist.data.documents import document_numbers
from moue_dist.data.indexed import read_note
from moue_dist.data.sample_index import ensure_helpers
from moue_dist.data.tokenized import Part, Tokenized, find_tokenized


class _Vocabulary:
    """What GPTDataset asks of a tokenizer. Without `pad` it masks no token: the end mark counts like any other."""

    def __init__(self, tokenized: Tokenized, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = -1 if tokenized.eod is None else tokenized.eod
        self.unique_identifiers = {"class": tokenized.unit, "eod": self.eod}  # the size changes no token


class Samples(torch.utils.data.Dataset):
    """The first `count` samples of an endless pass over `dataset`.

    item: dict of tokens [s], labels [s], int64, and with `documents` the number of each token's document [s + 1].
    """

    def __init__(
        self, dataset: GPTDataset, count: int, seed: int, *, documents: bool = False, eod: int | None = None
    ) -> None:
        self.dataset = dataset
        self.count = count
        self.seed = seed
        self.index_split = dataset.index_split  # BlendedDataset asks for these two
        self.unique_identifiers = dataset.unique_identifiers
        self._documents, self._eod = documents, eod
        self._permutation: tuple[int, numpy.ndarray] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        epoch, at = divmod(int(index), len(self.dataset))
        if epoch:
            if self._permutation is None or self._permutation[0] != epoch:
                generator = numpy.random.default_rng([self.seed, epoch])
                self._permutation = (epoch, generator.permutation(len(self.dataset)))
            at = int(self._permutation[1][at])
        item: dict[str, torch.Tensor] = self.dataset[at]
        if self._documents:
            text = torch.cat([item["tokens"], item["labels"][-1:]])
            item["documents"] = document_numbers(self.dataset, at, text, self._eod)
        return item


class AnySamples(Protocol):
    """Samples of one pair of files, or megatron-core's blend of several."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


def build_datasets(
    config: Config, folder: str | Path, samples_train: int, samples_valid: int
) -> tuple[AnySamples, AnySamples | None]:
    """Training and validation samples of data.blend, or of the corpus that `prepare_corpus(config.data, folder)` wrote.

    A collective where torch.distributed is up: every rank calls it, rank 0 builds the indices in `folder`, which all
    ranks must see. A validation part shorter than `samples_valid` is read again from its start; there is none (None)
    where it has no share. Raises ConfigError where the vocabulary or the text is too small, or files are broken.
    """
    tokenized = find_tokenized(config, Path(folder).resolve())
    ensure_helpers()
    trains, valids = [], []
    for part in tokenized.parts:
        options = _options(config, tokenized, part)
        _check_length(config, tokenized.unit, part, options.split_matrix)
        # One pass each (None): GPTDataset's own repetition shuffles otherwise when a run is made longer.
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, options).build()
        trains.append(train)
        valids.append(valid)

    def samples(datasets: list[GPTDataset], count: int) -> AnySamples | None:
        if None in datasets:
            return None
        documents = config.data.document_mask or config.data.eod_mask_loss
        each = [Samples(d, count, config.train.seed, documents=documents, eod=tokenized.eod) for d in datasets]
        return each[0] if len(each) == 1 else _blended(each, tokenized, count, options)

    train_samples = samples(trains, samples_train)
    assert train_samples is not None
    return train_samples, samples(valids, samples_valid)


def describe(config: Config, folder: str | Path, train: AnySamples) -> list[str]:
    """What the run reads, how often, and what of it is left out; a line for each pair of files."""
    each: list[Samples] = [train] if isinstance(train, Samples) else train.datasets  # type: ignore[attr-defined]
    weights = [1.0] if isinstance(train, Samples) else train.weights  # type: ignore[attr-defined]
    lines = []
    for one, weight in zip(each, weights, strict=True):
        prefix = str(one.dataset.dataset_path)
        parts = [f"{int(one.dataset.dataset.sequence_lengths.sum(dtype=numpy.int64)):,} tokens"]
        if config.data.blend:
            note = read_note(prefix)
            name, left = prefix, [f"{n:,} {reason}" for reason, n in note.left_out.items()] if note else []
            parts += [f"weight {weight:.4g}"] if len(each) > 1 else []
        else:
            corpus = find_corpus(config.data, folder)
            name, left = config.data.source, []
            if corpus is not None:
                parts.insert(0, f"{corpus.documents:,} documents")
                left += [f"{corpus.skipped:,} files that are not UTF-8"] if corpus.skipped else []
                left += [f"{corpus.beyond:,} bytes beyond data.max_megabytes"] if corpus.beyond else []
        parts.append(f"its training part is read {weight * len(train) / len(one.dataset):.3g} times")
        lines.append(f"data: {name}: {', '.join(parts)}; left out: {', '.join(left) or 'nothing'}")
    return lines


def _options(config: Config, tokenized: Tokenized, part: Part) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.model.sequence_length,
        blend=([part.prefix], None),
        split=",".join(f"{share:.9f}" for share in config.data.shares),
        path_to_cache=part.indices,
        tokenizer=_Vocabulary(tokenized, config.model.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _blended(each: list[Samples], tokenized: Tokenized, count: int, options: GPTDatasetConfig) -> AnySamples:
    """megatron-core's blend of endless passes: among n samples, each part has its weight times n, rounded."""
    options = copy.copy(options)
    # Its index is built by rank 0 and read by the others; alone, it must not ask which rank this is.
    options.path_to_cache = str(Path(tokenized.parts[0].indices).parent / "blend") if dist.is_initialized() else None
    weights = [part.weight for part in tokenized.parts]
    arguments: tuple[Any, ...] = (each, weights, count, options)
    blended: AnySamples = BlendedMegatronDatasetBuilder.build_generic_dataset(
        BlendedDataset, lambda: True, True, *arguments
    )
    return blended


def _check_length(config: Config, unit: str, part: Part, split: list[tuple[float, float] | None]) -> None:
    """Refuses a training part below its share of a global batch and a validation part below one sequence."""
    dataset = IndexedDataset(part.prefix)  # unmaps its arrays when it goes: a name keeps it, and a copy leaves it
    lengths = dataset.sequence_lengths.copy()
    d, s = config.data, config.model.sequence_length
    batch = math.ceil(part.weight * config.train.global_batch_size)
    share = "one global batch" if part.weight == 1 else "its share of a global batch"
    for (name, what, samples), bounds in zip(
        (("training", share, batch), ("validation", "one sequence", 1)), split[:2], strict=True
    ):
        if bounds is None:
            continue
        begin, end = (round(edge * len(lengths)) for edge in bounds)  # as the builder cuts
        has, need = int(lengths[begin:end].sum(dtype=numpy.int64)), samples * s + 1
        if has < need:
            more = "" if d.blend else f", raise data.max_megabytes (now {d.max_megabytes:g})"
            parts = f"data.split (now {d.split})" if d.split else f"data.valid_percent (now {d.valid_percent:g})"
            raise ConfigError(
                f"the {name} part of {part.name} has {has} {unit}, {need - has} fewer than {what} needs "
                f"({samples} x model.sequence_length={s}, plus 1): give more text{more}, or change {parts}; parts are "
                "cut between documents"
            )
