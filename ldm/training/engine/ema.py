"""An exponential moving average of weights: what is sampled from and shipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ldm.training.engine.split import put


class EMA:
    """average <- decay * average + (1 - decay) * weight, after every step; Ho et al. 2020, section 4.

    The decay warms up as (1 + step) / (10 + step), so that the first, random weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after step number `step` (0-based)."""
        if self.weights:
            take_in = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            take_in(tuple(self.weights.values()), tuple(self._trained.values()), step)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.weights

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averages in; the names must be the same."""
        if state.keys() != self.weights.keys():
            raise ValueError("the saved average belongs to another network")
        for name, weight in state.items():
            put(self.weights[name], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights with the averages; call it again to change back."""
        for name, parameter in self._trained.items():
            held = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(held)
