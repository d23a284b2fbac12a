"""What a model is asked to predict: a run's own validation, tokenized files, or a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from moue_dist.checkpoint.description import find
from moue_dist.config import ConfigError
from moue_dist.config.load import load_config
from moue_dist.interchange.outgoing.look.ask import Folder, Scored
from moue_dist.interchange.outgoing.saved import find_config


def validation_of(run: Path) -> list[Scored]:
    """The sequences that the run validates on, in its order: `train.eval_batches` global batches."""
    where = find_config(find(run))
    config = load_config(where)
    t = config.train
    for name in ("document_mask", "eod_mask_loss"):
        if getattr(config.data, name):  # a folder's forward knows neither
            raise ConfigError(f"{run} was validated with data.{name}, which a folder has not; name a text with --data")
    if not t.eval_batches or not config.data.valid_percent:
        raise ConfigError(f"{run} has no validation (train.eval_batches, data.valid_percent); name a text with --data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core speaks of what only GPUs need
        from moue_dist.data.corpus import data_folder, prepare_corpus
        from moue_dist.data.datasets import build_datasets

        folder = data_folder(config, where.parent)
        if not config.data.blend:
            prepare_corpus(config.data, folder)
        count = t.eval_batches * t.global_batch_size
        _, valid = build_datasets(config, folder, t.steps * t.global_batch_size, count)
    if valid is None:
        raise ConfigError(f"{run} has no validation text; name a text with --data")
    items = [valid[i] for i in range(count)]
    return [Scored([*item["tokens"].tolist(), int(item["labels"][-1])]) for item in items]


def sequences_of(folder: Folder, data: Path, most: int | None) -> list[Scored]:
    """The text file `data`, or the tokens of `data`.bin and .idx, cut into sequences of the model's length.

    A sequence begins with the last token of the one before, so that every token but the first is scored once.
    """
    if Path(f"{data}.idx").is_file():
        tokens = _tokens_of(data)
    elif data.is_file():
        tokens = _text_of(folder, data)
    else:
        raise ConfigError(f"--data {data}: no text file, and no {data.name}.bin and .idx beside each other")
    starts = range(0, len(tokens) - 1, folder.longest)
    rows = [Scored(tokens[at : at + folder.longest + 1]) for at in starts[:most]]
    if not rows:
        raise ConfigError(f"--data {data} holds {len(tokens)} tokens, too few to predict one from another")
    return rows


def _text_of(folder: Folder, path: Path) -> Sequence[int]:
    """The tokens of a text behind an end mark, where the model has one: as a document begins."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return [*([] if folder.words.end is None else [folder.words.end]), *folder.words.encode(text)]


def _tokens_of(prefix: Path) -> Any:  # an array
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        kind = IndexedDataset(str(prefix)).index.dtype
        return numpy.memmap(f"{prefix}.bin", dtype=kind, mode="r")
    except Exception as error:  # megatron-core asserts, numpy raises what it likes
        raise ConfigError(f"{prefix}.bin and .idx are no tokenized files ({error})") from None
