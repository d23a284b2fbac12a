"""Random inputs of the kernels that are timed, and how near two ways of a kernel must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moue_dist.bench.kernels.sizes import Sizes
from moue_dist.kernels.backend import Impl


@dataclass(frozen=True)
class Bench:
    """Where and in what type kernels run; `impl` is the one that counts as ours."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    impl: Impl
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(self.seed))

    @property
    def tolerance(self) -> float:
        """Relative, of results that were summed in fp32 and rounded once."""
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    @property
    def rounded_on_the_way(self) -> float:
        """The same where one side rounds sums or factors in between."""
        return 1e-5 if self.dtype == torch.float32 else 3e-2

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.wide(*shape).mul_(scale).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """fp32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def counts(self, experts: int) -> Tensor:
        """Rows of each of `experts` under random routing, int64; together `sizes.rows`."""
        expert_r = torch.randint(experts, (self.sizes.rows,), generator=self.generator, device=self.device)
        return torch.bincount(expert_r, minlength=experts)

    def choices(self, tokens: int) -> Tensor:
        """Ids [tokens, k] of different experts of the window."""
        score_tw = torch.rand(tokens, self.sizes.window, generator=self.generator, device=self.device)
        return score_tw.topk(self.sizes.top_k, -1).indices
