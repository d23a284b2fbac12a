"""The MoE layer: route, then the chosen experts, over a pool that belongs to no layer.

Legend: s sequence (this rank's part under sequence parallelism), b micro-batch, d hidden, r state, T = s * b tokens,
k experts a token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moue_dist.config import Config
from moue_dist.model.context import MoEContext
from moue_dist.model.router import Router


class MoELayer(MegatronModule):
    """Sits in the mlp slot of megatron-core's TransformerLayer. Owns its router; borrows its experts."""

    def __init__(
        self, config: Any, submodules: Any = None, *, run: Config, device: torch.device, shared_mlp: Any = None
    ) -> None:
        super().__init__(config)
        self.run, self._device, self._shared_mlp = run, device, shared_mlp
        self.shared_expert: MLP | None = None

    def set_layer_number(self, number: int) -> None:
        """megatron-core's call with the global 1-based layer number, right after construction."""
        self.layer_number = number
        self.index = number - 1 - self.run.model.dense_layers  # among the MoE layers, 0-based
        window = self.run.topology().windows[self.index]
        self.router = Router(self.run.moe, self.config.hidden_size, window, self.config.params_dtype, self._device)
        for p in self.router.parameters():
            p.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        if self.run.moe.shared_expert_width:
            wide = copy.copy(self.config)
            wide.ffn_hidden_size = self.run.moe.shared_expert_width
            self.shared_expert = build_module(self._shared_mlp, config=wide)

    def bind(self, context: MoEContext) -> None:
        """Lend the rank's shared parts; unregistered, so that the pool stays out of this module's parameters."""
        window = context.topology.windows[self.index]
        object.__setattr__(self, "_experts", context.exchange.layer(window, self.index - context.first_layer))
        object.__setattr__(self, "_context", context)

    def forward(
        self, hidden_sbd: Tensor, state_sbr: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[tuple[Tensor, None], Tensor | None]:
        """Normed hidden states and trajectory state in; ((output, no bias), new state) out, shapes unchanged."""
        context: MoEContext = self._context
        x_td = hidden_sbd.reshape(-1, hidden_sbd.shape[-1])
        state_tr = None if state_sbr is None else state_sbr.reshape(-1, state_sbr.shape[-1])

        experts = self._experts
        begun = experts.begin(x_td)
        chosen, auxiliary = experts.chosen_before(), context.auxiliary(self.index, x_td.shape[0])
        mask = context.mask.of(self.index)
        routing = self.router(x_td, state_tr, context.shared_router, context.bias, chosen, auxiliary, mask)
        context.observe(self.index, self.router.window, routing.tally)
        y_td = experts(x_td, routing.ids_tk, routing.weights_tk, begun)

        y_sbd = y_td.view(hidden_sbd.shape)
        if self.shared_expert is not None:
            y_sbd = y_sbd + self.shared_expert(hidden_sbd)[0]
        state = None if routing.state_tr is None or state_sbr is None else routing.state_tr.view(state_sbr.shape)
        return (y_sbd, None), state
