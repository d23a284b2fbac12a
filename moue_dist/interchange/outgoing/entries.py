"""The tensors of an exported folder, each with the way to its numbers: nothing is read before it is written.

A tensor comes in pieces of its rows, so that a pool larger than memory passes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from moue_dist.interchange.names import POOL, Part, expert_names, parts, split, split_expert
from moue_dist.interchange.outgoing.saved import Saved

PIECE = 1 << 26  # numbers of the pool that are read at once, at least a row


@dataclass(frozen=True)
class Entry:
    """A tensor by its name in the folder. `pieces()` gives its rows in order; `exact`: fp32 whatever is asked for."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]
    exact: bool = False

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


class Weights:
    """The weights of a checkpoint under Hugging Face's names. `masters` as in `Saved.read`."""

    def __init__(self, saved: Saved, *, masters: bool) -> None:
        self.saved, self.masters = saved, masters
        self.model, self.moe = saved.config.model, saved.config.moe

    def made(
        self,
        name: str,
        shape: tuple[int, ...],
        ours: str,
        our_shape: tuple[int, ...],
        make: Callable[[Tensor], Tensor],
        *,
        exact: bool = False,
    ) -> Entry:
        """A tensor made of ours. Raises ConfigError where the checkpoint lacks that, or has it in another shape."""
        self.saved.expect(ours, our_shape)
        return Entry(name, shape, lambda: iter([make(self.saved.read(ours, masters=self.masters))]), exact)

    def dense(self) -> list[Entry]:
        """Everything but the pool and what all layers' routers share."""
        return [entry for part in parts(self.saved.config) for entry in self._of(part)]

    def _of(self, part: Part) -> Iterator[Entry]:
        shape, m = self._shape(part.ours), self.model
        rows = {
            "copy": [shape[0]],
            "stack": [shape[0] // 2] * 2,
            "qkv": [n * m.head_width for n in (m.heads, m.groups, m.groups)],
        }
        for i, (name, n) in enumerate(zip(part.theirs, rows[part.how], strict=True)):

            def cut(tensor: Tensor, i: int = i) -> Tensor:
                return split(part, tensor, m)[i]

            yield self.made(name, (n, *shape[1:]), part.ours, shape, cut)

    def _shape(self, ours: str) -> tuple[int, ...]:
        """What the configuration asks of a weight of ours."""
        m, e, d = self.model, self.moe, self.model.hidden_size
        q, kv, r, window = m.heads * m.head_width, m.groups * m.head_width, e.state_width, self.saved.window
        each = m.qk_norm == "head"
        ffn = e.shared_expert_width if ".shared_expert." in ours else m.ffn_hidden_size or 4 * d
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.weight": (m.vocab_size, d),
            "output_layer.weight": (m.vocab_size, d),
            "q_layernorm.weight": (m.head_width if each else q,),
            "k_layernorm.weight": (m.head_width if each else kv,),
            "layernorm.weight": (d,),
            "linear_qkv.weight": (q + 2 * kv, d),
            "linear_proj.weight": (d, q),
            "linear_fc1.weight": (2 * ffn, d),
            "linear_fc2.weight": (d, ffn),
            "router.weight": (window, d),
            "router.scale": (1,),
            "router.query": (r, d),
            "router.input": (r, d),
            "router.gate": (window, r),
        }
        return next(shape for tail, shape in shapes.items() if ours.endswith(tail))

    def pool(self, theirs: str) -> list[Entry]:
        """All experts: gate_up_proj [P, 2f, d] and down_proj [P, d, f]."""
        p, f, d = self.moe.pool, self.moe.expert_width, self.model.hidden_size
        self.saved.expect(POOL, (p, 3 * f * d))
        rows = max(1, PIECE // (3 * f * d))

        def read(columns: slice) -> Iterator[Tensor]:
            for first in range(0, p, rows):
                yield self.saved.read(POOL, (first, min(first + rows, p)), masters=self.masters)[:, columns]

        return [
            Entry(theirs + "gate_up_proj", (p, 2 * f, d), lambda: read(slice(None, 2 * f * d))),
            Entry(theirs + "down_proj", (p, d, f), lambda: read(slice(2 * f * d, None))),
        ]

    def expert(self, layer: int, column: int, e: int, scale: float) -> list[Entry]:
        """Expert `e` as number `column` of a layer's own, its output times `scale`."""
        f, d = self.moe.expert_width, self.model.hidden_size

        def read(i: int) -> Iterator[Tensor]:
            (row,) = self.saved.read(POOL, (e, e + 1), masters=self.masters)
            matrix = split_expert(row, f, d)[i]
            yield matrix * scale if i == 2 and scale != 1.0 else matrix

        shapes = ((f, d), (f, d), (d, f))
        names = expert_names(layer, column)
        return [Entry(name, shapes[i], lambda i=i: read(i)) for i, name in enumerate(names)]  # type: ignore[misc]
