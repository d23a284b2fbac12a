"""A model of ours gets more layers over the same pool, at its end; they begin as identity, or as good as.

A new layer is a copy of an old one with the same window (else of the last one), but its attention gives 0, and the norm
before its experts has a gain of 1/1000: what experts give is quadratic in it, so that it adds about a millionth of what
an expert gives. 0 would be exact, and stay: there the gradient is 0 as well.

Legend: L MoE layers before, P pool, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moue_dist.config import Config, ConfigError, MoEConfig
from moue_dist.interchange.incoming.convert import TOKENIZER, write
from moue_dist.interchange.incoming.entries import Entry
from moue_dist.interchange.names import POOL, checkpoint_key, other_key, parts
from moue_dist.interchange.outgoing.saved import Saved, find_config
from moue_dist.model.balance import BalanceState
from moue_dist.refusals.validate import validate

Change = Callable[[Tensor], Tensor]
SHARED = "shared_router.weight"  # what all layers' routers share, one row
GAIN = 1e-3  # of a new layer's norm before the experts


def deepen(source: Path, out: Path, layers: int, *, overwrite: bool = False) -> Config:
    """Write `out` from a run or converted model of ours; gives the configuration. Raises ConfigError."""
    saved = Saved.open(source)
    old = saved.config
    _check(saved, old)
    moe = replace(_same_windows(old), **_mask_of(saved))
    model = replace(old.model, layers=old.model.layers + layers)
    parallel = replace(old.parallel, stage_layers=())
    train = replace(old.train, start_from=".")
    new = replace(old, name=f"{out.resolve().name}-trained", model=model, moe=moe, parallel=parallel, train=train)
    validate(new, None, cuda=False)
    windows = new.topology().windows
    assert windows[: len(old.topology().windows)] == old.topology().windows
    beside = [find_config(saved.path).parent / name for name in TOKENIZER]
    shapes = _Shapes(saved.path)
    dtype = shapes[POOL].properties.dtype  # that of a converted model, or a run's fp32
    hidden_lw = torch.zeros(len(windows), len(windows[0]))
    if moe.mask_steps:
        hidden_lw[: old.moe_layers] = torch.load(saved.path / "common.pt", weights_only=True)["mask"]["hidden_lw"]
    balance = _balance(saved, new)
    made = list(_entries(saved, new, shapes, dtype))
    write(out, new, made, dtype, {"hidden_lw": hidden_lw}, beside, balance=balance, overwrite=overwrite)
    return new


def _check(saved: Saved, config: Config) -> None:
    if not config.moe_layers:
        raise ConfigError(f"{saved.path}: the model has no MoE layer to copy")
    steps, done = config.moe.mask_steps, saved.position.step
    if 0 < done < steps:
        raise ConfigError(
            f"{saved.path}: its mask is not gone yet (step {done} of moe.mask_steps={steps}); train it that far first"
        )


def _same_windows(config: Config) -> MoEConfig:
    """The topology that shows the old layers what they saw, whatever the number of layers after them."""
    e = config.moe
    if e.topology in ("full", "rotational"):
        return e
    window = config.topology().window
    return replace(e, topology="rotational", window=window, stride=window, group=e.group)


def _mask_of(saved: Saved) -> dict[str, Any]:
    """A mask that has done its work is left out."""
    return {"mask_start": 0, "mask_steps": 0} if saved.position.step >= saved.config.moe.mask_steps else {}


def _balance(saved: Saved, new: Config) -> dict[str, Tensor]:
    state = BalanceState.initial(new.topology()).state_dict()
    if saved.expert_bias is not None:
        state["bias"] = saved.expert_bias
    return state


def _entries(saved: Saved, new: Config, shapes: _Shapes, dtype: torch.dtype) -> Iterator[Entry]:
    """Old layers' weights as they are, new ones' as copies; fp32 where the optimizer has them so."""
    old, windows = saved.config, new.topology().windows

    def dense(name: str, how: Change | None) -> Tensor:
        tensor = saved.read(name, masters=True).to(dtype)
        return tensor if how is None else how(tensor)

    for part in parts(new):
        source, how = _source(part.ours, old, windows)
        yield Entry(checkpoint_key(part.ours), tuple(shapes[source].size), partial(dense, source, how))
    pool, row = shapes[POOL].size
    for e in range(pool):
        yield Entry(POOL, (pool, row), partial(_row, saved, e, dtype), e, 1)
    if new.moe.router in ("universal", "recurrent"):
        yield Entry(SHARED, tuple(shapes[SHARED].size), partial(dense, SHARED, None))


def _small(gain_d: Tensor) -> Tensor:
    return gain_d * GAIN


def _row(saved: Saved, row: int, dtype: torch.dtype) -> Tensor:
    return saved.read(POOL, (row, row + 1)).to(dtype)


def _source(name: str, old: Config, windows: tuple[tuple[int, ...], ...]) -> tuple[str, Change | None]:
    """The old weight that a weight begins with, and what is done to it."""
    head, _, rest = name.partition("decoder.layers.")
    number, _, leaf = rest.partition(".")
    if not number.isdigit() or int(number) < old.model.layers:
        return name, None
    dense, window = old.model.dense_layers, windows[int(number) - old.model.dense_layers]
    like = [i for i in range(old.moe_layers) if windows[i] == window] or [old.moe_layers - 1]
    how: Change | None = None
    if leaf == "self_attention.linear_proj.weight":
        how = torch.zeros_like
    elif leaf == "pre_mlp_layernorm.weight":
        how = _small
    return f"{head}decoder.layers.{dense + like[-1]}.{leaf}", how


class _Shapes:
    """Shapes and types of a checkpoint's tensors, by our names."""

    def __init__(self, path: Path) -> None:
        self._about = FileSystemReader(path).read_metadata().state_dict_metadata

    def __getitem__(self, name: str) -> TensorStorageMetadata:
        key = checkpoint_key(name)
        found = self._about[key if key in self._about else other_key(key)]
        assert isinstance(found, TensorStorageMetadata)
        return found
