"""A Hugging Face folder becomes a folder like a run's: checkpoint, configuration, tokenizer. Nothing half stays.

Everything is checked before the first tensor is written, into a folder of another name, which is renamed at the end.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from moue_dist.config import Config, ConfigError
from moue_dist.interchange.incoming import families, ours
from moue_dist.interchange.incoming.entries import Entry, entries, source_type
from moue_dist.interchange.incoming.folder import Folder
from moue_dist.interchange.incoming.forms import Form, form
from moue_dist.interchange.incoming.write import write_checkpoint
from moue_dist.model.balance import BalanceState
from moue_dist.refusals.validate import validate

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def convert(source: Path, out: Path, asked: Form, *, overwrite: bool = False) -> Config:
    """Write `out` from the Hugging Face folder `source`; gives the configuration. Raises ConfigError."""
    folder = Folder(source)
    dtype = source_type(folder)
    if folder.key("model_type") == ours.KIND:
        if asked != Form():
            raise ConfigError(f"{source} is a model that `moue export` wrote and keeps its pool; leave the options out")
        back = ours.read(folder, out.resolve().name, dtype)
        _check(back.config)
        beside = [source / name for name in TOKENIZER]
        mask = {"hidden_lw": torch.zeros(back.config.moe_layers, back.config.topology().window)}
        write(out, back.config, back.entries, dtype, mask, beside, balance=back.balance, overwrite=overwrite)
        return back.config
    foreign = families.read(folder)
    formed = form(foreign, asked, out.resolve().name, dtype)
    _check(formed.config)
    made = entries(folder, foreign, formed, dtype)
    mask = {"hidden_lw": formed.hidden_lw()}
    write(out, formed.config, made, dtype, mask, [source / name for name in TOKENIZER], overwrite=overwrite)
    return formed.config


def write(
    out: Path,
    config: Config,
    made: Sequence[Entry],
    dtype: torch.dtype,
    mask: dict[str, Tensor],
    beside: Sequence[Path],
    *,
    balance: dict[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """The folder `out`; `beside` are files to copy there, where they exist."""
    sizes = sum(math.prod(e.shape) * (1 if e.rows is None else e.rows / e.shape[0]) for e in made) * dtype.itemsize
    state = {"balance": balance or BalanceState.initial(config.topology()).state_dict(), "mask": mask}
    with _aside(out, round(sizes), overwrite) as part:
        with tqdm(total=round(sizes), unit="B", unit_scale=True, desc="weights", leave=False, disable=None) as bar:
            write_checkpoint(part / "checkpoints", config, made, dtype, state, lambda n: _advance(bar, n))
        for file in beside:
            if file.is_file():
                shutil.copy(file, part / file.name)
        (part / "config.yaml").write_text(_yaml(config, out))


@contextmanager
def _aside(out: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and is gone after an error."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name another folder, or pass --overwrite")
    out = out.resolve()
    part, old = out.with_name(f".writing_{out.name}"), out.with_name(f".old_{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise ConfigError(f"{out.parent} has {free / 1e9:.1f} GB free, the weights take {size / 1e9:.1f}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check(config: Config) -> None:
    """What the trainer would refuse of the model itself, before it is written."""
    try:
        validate(config, None, cuda=False)
    except ConfigError as error:
        raise ConfigError(f"this model cannot be trained here: {error}") from None


def _advance(bar: Any, size: int) -> None:
    bar.update(size)


def _yaml(config: Config, out: Path) -> str:
    """The configuration as people read it: the model, and of the rest what is not a default."""
    default = Config()
    values: dict[str, Any] = {"name": config.name}
    for section in fields(config):
        mine, plain = getattr(config, section.name), getattr(default, section.name)
        if not isinstance(mine, str):
            whole = section.name in ("model", "moe")
            changed = {k: v for k, v in asdict(mine).items() if whole or v != getattr(plain, k)}
            values |= {section.name: changed} if changed else {}
    values["train"] = values.get("train", {}) | {"start_from": str(out.resolve())}
    head = (
        f"# A converted model. `moue train {out}/config.yaml` starts from its weights: give it data.source, steps and\n"
    )
    head += "# a learning rate of your own. model.sequence_length may be any up to what the source was trained on.\n"
    return head + yaml.safe_dump(values, sort_keys=False)
