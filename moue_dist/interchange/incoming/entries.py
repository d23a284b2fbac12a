"""Every tensor of a checkpoint to be written, and how each is made from a foreign folder when its turn comes.

All names, shapes and types of the source are checked when the entries are made, before anything is written.
Legend: d hidden, f width of an expert, E experts of a layer, W window, P pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moue_dist.config import Config, ConfigError, ModelConfig
from moue_dist.interchange.incoming.families import Foreign
from moue_dist.interchange.incoming.folder import Folder
from moue_dist.interchange.incoming.forms import Formed
from moue_dist.interchange.names import (
    POOL,
    Part,
    checkpoint_key,
    expert_names,
    fused_names,
    join,
    join_expert,
    parts,
)


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint, or one row of it: `make` gives `rows` rows from `first` on."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    make: Callable[[], Tensor]
    first: int = 0
    rows: int | None = None  # None: all


def source_type(folder: Folder) -> torch.dtype:
    """The type of the folder's numbers: of its embedding."""
    names = [name for name in folder.tensors if name.endswith("embed_tokens.weight")]
    if not names:
        raise ConfigError(f"{folder.path} lacks the tensor model.embed_tokens.weight")
    part = folder.get(names[0], 0)
    return part.dtype


def entries(folder: Folder, foreign: Foreign, formed: Formed, dtype: torch.dtype) -> list[Entry]:
    """Raises ConfigError for a tensor that is missing, of another shape, or left over."""
    made = [*_dense(folder, foreign, formed, dtype), *_pool(folder, foreign, formed, dtype)]
    refuse_left_over(folder, foreign.kind, formed.config.model)
    return made


def refuse_left_over(folder: Folder, kind: str, model: ModelConfig) -> None:
    """Raises ConfigError for a tensor of the folder that nothing has asked for."""
    left = sorted(name for name in folder.tensors - folder.read if not _harmless(name, model.tied_head))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ConfigError(f"{folder.path} has the tensor {left[0]}{more}, which no {kind} has")


def _harmless(name: str, tied: bool) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _dense(folder: Folder, foreign: Foreign, formed: Formed, dtype: torch.dtype) -> Iterator[Entry]:
    for part in parts(formed.config, foreign.style):
        if part.ours.endswith(".mlp.router.weight"):
            yield _router(folder, foreign, formed, part, dtype)
            continue
        yield of_part(folder, formed.config, part, dtype)


def of_part(folder: Folder, config: Config, part: Part, dtype: torch.dtype) -> Entry:
    """A weight that is made of tensors of the folder as they are."""
    shapes = [_shape(name, config) for name in part.theirs]
    for name, shape in zip(part.theirs, shapes, strict=True):
        folder.check(name, shape)
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return Entry(checkpoint_key(part.ours), whole, partial(_make, folder, part, config.model, dtype))


def _make(folder: Folder, part: Part, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    return join(part, [folder.get(name).to(dtype) for name in part.theirs], model)


def _shape(name: str, config: Config) -> tuple[int, ...]:
    """A tensor's shape by its name, the experts' apart."""
    m, e = config.model, config.moe
    d, c = m.hidden_size, m.head_width
    q, k = m.heads * c, m.groups * c
    whole = m.qk_norm == "all"
    ffn = e.shared_expert_width if ".shared_expert." in name else m.ffn_hidden_size or 4 * d
    if name.split(".")[-2] == "gate":
        window, r = config.topology().window, e.state_width
        routers = {"weight": (window, d), "scale": (1,), "query": (r, d), "input": (r, d), "gate": (window, r)}
        return routers[name.split(".")[-1]]
    known: dict[str, tuple[int, ...]] = {
        "embed_tokens": (m.vocab_size, d),
        "lm_head": (m.vocab_size, d),
        "q_proj": (q, d),
        "k_proj": (k, d),
        "v_proj": (k, d),
        "o_proj": (d, q),
        "q_norm": (q if whole else c,),
        "k_norm": (k if whole else c,),
        "gate_proj": (ffn, d),
        "up_proj": (ffn, d),
        "down_proj": (d, ffn),
    }
    return known.get(name.split(".")[-2], (d,))  # the others are norms


def _router(folder: Folder, foreign: Foreign, formed: Formed, part: Part, dtype: torch.dtype) -> Entry:
    m = formed.config.model
    layer = int(part.ours.split(".")[2]) - m.dense_layers
    if foreign.experts:
        folder.check(part.theirs[0], (foreign.experts, m.hidden_size))

    def make() -> Tensor:
        own_ed = folder.get(part.theirs[0]) if foreign.experts else formed.new_router(layer)
        return formed.router(layer, own_ed.to(dtype))

    return Entry(checkpoint_key(part.ours), (len(formed.windows[layer]), m.hidden_size), make)


def _pool(folder: Folder, foreign: Foreign, formed: Formed, dtype: torch.dtype) -> Iterator[Entry]:
    m, f = formed.config.model, foreign.expert_width
    row = 3 * m.hidden_size * (f // formed.parts)
    shape = (formed.config.moe.pool, row)
    for layer in range(formed.config.moe_layers):
        for j in range(formed.own):
            take = _expert(folder, foreign, formed, m.dense_layers + layer, j)
            yield Entry(POOL, shape, partial(_row, take, dtype), layer * formed.own + j, 1)


def _row(take: Callable[[], tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    return join_expert(*(x.to(dtype) for x in take()))[None]


def _expert(
    folder: Folder, foreign: Foreign, formed: Formed, layer: int, j: int
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Gate [f, d], up [f, d] and down [d, f] of expert j of a layer, when called."""
    d, f = formed.config.model.hidden_size, foreign.expert_width
    if not foreign.experts:
        before = f"model.layers.{layer}.mlp."
        names = (f"{before}gate_proj.weight", f"{before}up_proj.weight", f"{before}down_proj.weight")
        part = slice(0, f) if formed.parts == 1 else slice(f // formed.parts * j, f // formed.parts * (j + 1))
    elif folder.has(fused_names(layer, foreign.style)[0]):
        fused, fused_down = fused_names(layer, foreign.style)
        folder.check(fused, (foreign.experts, 2 * f, d))
        folder.check(fused_down, (foreign.experts, d, f))
        return lambda: (*folder.get(fused, j).chunk(2), folder.get(fused_down, j))  # type: ignore[return-value]
    else:
        names, part = expert_names(layer, j, foreign.style), slice(0, f)
    for name, shape in zip(names, ((f, d), (f, d), (d, f)), strict=True):
        folder.check(name, shape)
    gate, up, down = names
    return lambda: (folder.get(gate)[part], folder.get(up)[part], folder.get(down)[:, part])
