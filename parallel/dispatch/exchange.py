"""How a layer's tokens reach their experts, wherever these live: the one interface that the model knows.

A *layer's experts* take tokens with the router's choice and give back the weighted sum of the chosen experts' outputs.
Where every stage holds the experts that its layers see (`replicate`): `stage.StageExchange`, which sends rows one by
one, and `gathered.GatheredExchange`, which sends a token once to each rank. Where an expert may live on another stage
(`home`, `hybrid`): `lockstep.exchange.LockstepExchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from moue_dist.parallel.dispatch.sent import SentBytes
from moue_dist.parallel.recording.timeline import Timeline


class LayerExperts(Protocol):
    """What one MoE layer of this rank sees of the pool."""

    def chosen_before(self) -> Tensor | None:
        """Expert ids [T, k] that the router must choose again: those of a layer's first run under recompute."""
        ...

    def begin(self, x_td: Tensor) -> Any:
        """Before the router has chosen: let tokens travel that will be asked for in any case. For `__call__`."""
        ...

    def __call__(self, x_td: Tensor, ids_tk: Tensor, weight_tk: Tensor, begun: Any) -> Tensor:
        """y[t] = sum_k weight[t, k] * expert ids[t, k] (x[t]), [T, d]; ids are global. All ranks concerned call it."""
        ...


class ExpertExchange(Protocol):
    """One rank's way to the experts of its layers."""

    @property
    def sent(self) -> SentBytes | None:
        """What this rank has sent since its start; None where it is not counted."""
        ...

    def begin_step(self, timeline: Timeline) -> None:
        """Forget a step that broke off; transfers of the coming one are recorded in `timeline`."""
        ...

    def make_room(self, group: Any) -> bool:
        """After a schedule: whether some rank of `group` left rows out for want of room, and now has more (collective).

        Then the schedule must be run again before anything is done with what it gave.
        """
        ...

    def layer(self, visible: Sequence[int], index: int) -> LayerExperts:
        """The experts of the stage's MoE layer `index` (0-based, in the order of the model), which sees `visible`."""
        ...
