"""Initial weights by global name and seed, so that every layout starts from the same model.

A parameter's full tensor is drawn from a generator seeded by its name; tensor-parallel ranks take their part of it.
Names are megatron-core's with the layer's global 0-based number. Norms keep their ones.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moue_dist.config import Config
from moue_dist.model.router import SharedRouter


def global_names(chunk: nn.Module, layers: Sequence[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter) of a chunk with these layers: decoder.layers.0 of stage 1 -> decoder.layers.2."""
    for name, parameter in chunk.named_parameters():
        yield re.sub(r"(?<=^decoder\.layers\.)\d+", lambda m: str(layers[int(m.group())]), name), parameter


def take_shard(name: str, full: Tensor, parameter: nn.Parameter, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's part of a full weight; gate and up halves of a SwiGLU are split each."""
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    axis = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size, axis)[rank] for half in full.chunk(2, axis)], axis)
    return full.chunk(size, axis)[rank]


def full_shape(parameter: nn.Parameter, size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if size > 1 and getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
    return tuple(shape)


@torch.no_grad()
def initialise_dense(config: Config, chunk: nn.Module, layers: Sequence[int], tp_rank: int, tp_size: int) -> None:
    """Draw the weights of a chunk; norms and one-dimensional parameters stay as built."""
    for name, p in global_names(chunk, layers):
        std = _std(name, config)
        if std is None:
            continue
        tied = config.model.tied_head and name == "output_layer.weight"  # the last stage's copy of the embedding
        source = "embedding.word_embeddings.weight" if tied else name
        values = draw(source, full_shape(p, tp_size), std, config.train.seed, p.device)
        p.copy_(take_shard(name, values, p, tp_rank, tp_size))


@torch.no_grad()
def initialise_shared_router(config: Config, shared: SharedRouter) -> None:
    """Keys have unit scale, so that first logits are like a plain router's; the transition U starts at zero."""
    r = config.moe.state_width
    for name, p in shared.named_parameters():
        if name == "transition":
            p.zero_()
        else:
            std = 1.0 if name == "keys" else 1.0 / math.sqrt(r)
            p.copy_(draw(f"shared_router.{name}", tuple(p.shape), std, config.train.seed, p.device))


def expert_stds(config: Config) -> tuple[float, float]:
    """Standard deviations of w_in and w_out; outputs shrink with depth as megatron-core's do."""
    std = config.model.init_std
    return std, std / math.sqrt(2.0 * config.model.layers)


def draw(name: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device) -> Tensor:
    """Normal values that depend on name, seed and kind of device alone."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * std


def _std(name: str, config: Config) -> float | None:
    if "norm" in name or name.endswith(("router.scale", ".bias")):
        return None
    if name.endswith("router.input"):
        return 1.0 / math.sqrt(config.model.hidden_size)
    if name.endswith("router.gate"):
        return 1.0 / math.sqrt(config.moe.state_width)
    output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return expert_stds(config)[1] if output else config.model.init_std
