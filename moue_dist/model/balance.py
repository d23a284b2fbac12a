"""Balance of the pool: statistics of the previous global batch, loss weights, loss-free bias, load figures.

Legend: L MoE layers, P pool experts, W window, l layer, e expert. Pure functions of tensors, no process groups:
whoever calls reduces the counts over ranks first. Formulas and their sources: docs/math.md, section 4.

The statistics are constants of a step, so each balance term is linear in the mean scores. A layer therefore needs
one row of weights, and its auxiliary loss is `sum_e weight_lp[l, e] * mean_t score[t, e]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moue_dist.config import BalanceConfig
from moue_dist.config.topology import Topology


def visible_lp(topology: Topology, device: torch.device | str | None = None) -> Tensor:
    """Bool [L, P]: does layer l see expert e. Windows (0, 1) and (1, 2) of pool 3 -> [[1, 1, 0], [0, 1, 1]]."""
    mask_lp = torch.zeros(topology.layers, topology.pool, dtype=torch.bool, device=device)
    for row_p, window in zip(mask_lp, topology.windows, strict=True):
        row_p[list(window)] = True
    return mask_lp


def target_share(topology: Topology, device: torch.device | str | None = None) -> Tensor:
    """pi_e, fp64 [P]: the share of all assignments that a balanced pool gives to expert e; sums to 1."""
    return torch.tensor(topology.target_share, dtype=torch.float64, device=device)


@dataclass
class BalanceState:
    """What the last global batch did, and the loss-free bias. All tensors fp32; they are updated in place.

    F_e [P]: share of all assignments. f_le [L, P]: share within each layer. bias [P]: added to scores when choosing.
    """

    topology: Topology
    F_e: Tensor
    f_le: Tensor
    bias: Tensor
    # What never changes, made once: each of these takes the host a copy to the device, and a wait for it.
    visible_lp: Tensor = field(init=False)
    target_p: Tensor = field(init=False)  # fp64, as is the next
    exposure_p: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.F_e.device
        self.visible_lp = visible_lp(self.topology, device)
        self.target_p = target_share(self.topology, device)
        self.exposure_p = torch.tensor(self.topology.exposure, dtype=torch.float64, device=device)

    @classmethod
    def initial(cls, topology: Topology, device: torch.device | str | None = None) -> BalanceState:
        """The state before the first batch: F_e = pi_e, f_le = 1/W inside the window, bias 0."""
        return cls(
            topology,
            target_share(topology, device).float(),
            visible_lp(topology, device).float() / max(topology.window, 1),
            torch.zeros(topology.pool, device=device),
        )

    @torch.no_grad()
    def update(self, counts_lp: Tensor, bias_rate: float = 0.0) -> None:
        """Take over the finished batch's counts, reduced over all ranks, stages and microbatches.

        counts_lp [L, P]: assignments (token, choice) before any drop; any integer or float type. A layer without
        assignments, or a batch without any, says nothing, so its shares stay. With `bias_rate` the bias moves by
        bias_rate * sign(pi_e - F_e). Raises ValueError on a wrong shape.
        """
        if counts_lp.shape != self.f_le.shape:
            raise ValueError(f"counts have shape {tuple(counts_lp.shape)}, expected {tuple(self.f_le.shape)}")
        counts_lp = counts_lp.to(self.f_le.device, torch.float64)
        layer_l1 = counts_lp.sum(1, keepdim=True)
        self.f_le.copy_(torch.where(layer_l1 > 0, counts_lp / layer_l1.clamp(min=1), self.f_le))
        count_p, total = counts_lp.sum(0), counts_lp.sum()
        self.F_e.copy_(torch.where(total > 0, count_p / total.clamp(min=1), self.F_e))
        if bias_rate:
            # pi_e = c_e / (L * W): cross-multiplied, integers stay exact and a balanced expert has sign 0.
            slots = self.topology.layers * self.topology.window
            self.bias.add_(torch.sign(self.exposure_p * total - count_p * slots).float(), alpha=bias_rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of F_e, f_le and bias."""
        return {name: getattr(self, name).clone() for name in ("F_e", "f_le", "bias")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved tensors in place. Raises ValueError when they belong to another topology's shape."""
        for name in ("F_e", "f_le", "bias"):
            mine: Tensor = getattr(self, name)
            if name not in state or state[name].shape != mine.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"balance state {name}: expected shape {tuple(mine.shape)}, found {found}")
        for name in ("F_e", "f_le", "bias"):
            getattr(self, name).copy_(state[name])


def _term_weights(topology: Topology, state: BalanceState) -> dict[str, Tensor]:
    """Each term's weights on the mean scores, fp32 [L, P], zero outside the windows, 1/L included."""
    mask_lp, pi_p = state.visible_lp, state.target_p.to(state.F_e.dtype)
    # An expert that no layer sees has pi = 0 and no scores: the mask drops it, the clamp keeps it finite.
    over_target_p = torch.where(pi_p > 0, state.F_e / pi_p.clamp(min=1e-30), 0.0)
    rows_lp = {
        "uelb": over_target_p.expand_as(mask_lp),
        "pool": (topology.pool * state.F_e).expand_as(mask_lp),
        "layer": topology.window * state.f_le,
    }
    return {name: row_lp * mask_lp / max(topology.layers, 1) for name, row_lp in rows_lp.items()}


def balance_weights(config: BalanceConfig, topology: Topology, state: BalanceState) -> Tensor:
    """Weights fp32 [L, P]; layer l's auxiliary loss is sum_e weight[l, e] * mean_t score[t, e].

    Coefficients of uelb, pool and layer are included, so the layers' losses add up to the loss of the model.
    Router z-loss and loss-free bias are not linear in the scores and stand elsewhere.
    """
    weights = _term_weights(topology, state)
    return config.uelb * weights["uelb"] + config.pool * weights["pool"] + config.layer * weights["layer"]


def balance_terms(topology: Topology, state: BalanceState, mean_score_lp: Tensor) -> dict[str, Tensor]:
    """The terms `uelb`, `pool`, `layer` as scalars without their coefficients; each is 1 when all is even.

    mean_score_lp [L, P]: mean over tokens of the normalised scores, zero outside the windows.
    """
    return {name: (weight_lp * mean_score_lp).sum() for name, weight_lp in _term_weights(topology, state).items()}


def load_summary(counts_lp: Tensor, topology: Topology) -> dict[str, float | int]:
    """How evenly the pool and each layer were used; counts_lp [L, P] as in `BalanceState.update`.

    pool_max_over_mean: max_e F_e / pi_e. layer_max_over_mean: max over layers of W * max_e f_le. dead: experts
    without a token. entropy: of F_e, divided by log P (1 for even use). All zero, except `dead`, without tokens.
    """
    counts_lp = counts_lp.detach().to("cpu", torch.float64)
    count_p, total = counts_lp.sum(0), float(counts_lp.sum())
    dead = int((count_p == 0).sum())
    if total == 0:
        return {"pool_max_over_mean": 0.0, "layer_max_over_mean": 0.0, "dead": dead, "entropy": 0.0}
    share_p, pi_p = count_p / total, target_share(topology)
    layer_share_lp = counts_lp / counts_lp.sum(1, keepdim=True).clamp(min=1)
    entropy = float(torch.special.entr(share_p).sum()) / math.log(topology.pool) if topology.pool > 1 else 1.0
    return {
        "pool_max_over_mean": float((share_p / pi_p)[pi_p > 0].max()),
        "layer_max_over_mean": topology.window * float(layer_share_lp.max()),
        "dead": dead,
        "entropy": entropy,
    }
