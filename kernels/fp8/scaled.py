"""What numbers in FP8 (e4m3) are made of: q * scale, one fp32 scale a row.

Legend: r row, f expert width, n expert, o out, i in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 2.0**-100  # a row's largest number counts as at least this, so that a row of zeros has a scale


class Scaled(NamedTuple):
    """`q` [..., k] in e4m3 and the fp32 `scale` [...] of each of its rows."""

    q: Tensor
    scale: Tensor

    def wide(self) -> Tensor:
        """The numbers in fp32."""
        return self.q.float() * self.scale[..., None]


class SwigluGradients(NamedTuple):
    """`dz` [R, 2f] in z's type and `dz8` the same in FP8, `h` [R, f] (weighted), `dweight` [R] fp32 where weighted."""

    dz_r2f: Tensor
    dz8: Scaled
    h_rf: Tensor
    dweight_r: Tensor | None


class Layouts(NamedTuple):
    """A weight [n, o, i] for both its products: `out` [n, o, i] scaled by o, `into` [n, i, o] scaled by i."""

    out: Scaled
    into: Scaled

    @classmethod
    def empty(cls, n: int, o: int, i: int, device: torch.device) -> Layouts:
        """Memory for a weight, unwritten."""

        def one(*shape: int) -> Scaled:
            return Scaled(torch.empty(shape, dtype=E4M3, device=device), torch.empty(shape[:-1], device=device))

        return cls(one(n, o, i), one(n, i, o))
