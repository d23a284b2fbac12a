"""`moue export`: a checkpoint of ours as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from moue_dist.config import Config, ConfigError
from moue_dist.interchange.outgoing import moue_form, plain_form, shards, vocabulary
from moue_dist.interchange.outgoing.card import model_card
from moue_dist.interchange.outgoing.saved import Saved

Form = Literal["moue", "plain"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_GB = 5.0
_HUB = Path(__file__).with_name("hub")
_PACKAGE = "moue_dist.interchange.outgoing.hub."  # what the modeling files import each other from, here


@dataclass(frozen=True)
class Exported:
    """What was written. `size_factor`: how much larger than the pool the experts became."""

    folder: Path
    bytes: int
    dtype: str
    size_factor: float


def export(
    source: Path,
    out: Path,
    form: Form = "moue",
    dtype: str | None = None,
    *,
    shard_gb: float = SHARD_GB,
    show_progress: bool = True,
) -> Exported:
    """Write the checkpoint `source`, or the newest of the run `source`, into the new folder `out`.

    `dtype` is fp32 or bf16, None the run's own. Raises ConfigError for what cannot be read, held or written.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already: name a new folder, or move that one away")
    saved = Saved.open(source)
    dtype = dtype or ("fp32" if saved.config.train.precision == "fp32" else "bf16")
    make = moue_form.moue_form if form == "moue" else plain_form.plain_form
    about, entries = make(saved, masters=dtype == "fp32")
    words = vocabulary.of_run(saved.config)
    _check_vocabulary(saved.config, words)
    factor = plain_form.size_factor(saved.config) if form == "plain" else 1.0
    size = shards.size_of(entries, TYPES[dtype])
    with _aside(out) as folder:
        # disable=None: a bar on a terminal, silence in a log file
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="exporting", disable=None if show_progress else True)
        with bar:
            shards.write_shards(folder, entries, TYPES[dtype], most_bytes=int(shard_gb * 1e9), wrote=bar.update)
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": words.end, "pad_token_id": words.end}
        _write_json(folder / "config.json", {**about, **_common(saved.config, dtype), **ends})
        _write_json(folder / "generation_config.json", ends)
        vocabulary.save(words, folder, saved.config.model.sequence_length)
        (folder / "README.md").write_text(model_card(saved, form, dtype, size))
        if form == "moue":
            write_code(folder)
    return Exported(out, size, dtype, factor)


def write_code(folder: Path) -> None:
    """The modeling files, which import each other from the folder that they are in."""
    for name in moue_form.CODE:
        (folder / name).write_text((_HUB / name).read_text().replace(f"from {_PACKAGE}", "from ."))


def _common(config: Config, dtype: str) -> dict[str, Any]:
    """The entries of config.json that all forms share."""
    m, e, name = config.model, config.moe, {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.groups,
        "max_position_embeddings": m.sequence_length,
        "rms_norm_eps": m.norm_eps,
        "intermediate_size": m.ffn_hidden_size or 4 * m.hidden_size,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.expert_width,
        "tie_word_embeddings": m.tied_head,
        "initializer_range": m.init_std,
        "dtype": name,
        "torch_dtype": name,  # its name before transformers 5
    }


def _check_vocabulary(config: Config, words: vocabulary.Vocabulary) -> None:
    if words.size > config.model.vocab_size:
        raise ConfigError(
            f"the run's tokenizer has {words.size} tokens, more than model.vocab_size={config.model.vocab_size}: it is "
            "not the one that the model was trained with"
        )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all is written, and goes when something fails."""
    part = out.with_name(f".writing_{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; name another folder") from None
    try:
        yield part
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
