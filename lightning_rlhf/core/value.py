"""Losses of the value network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.core.surrogate import PerAction


@dataclass(frozen=True, kw_only=True)
class ValueLoss(ABC):
    """Base class of per-action losses of V, already weighted against the policy's."""

    @abstractmethod
    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> PerAction:
        """Compute the loss of each action.

        Args:
            values: V_θ(s), (B, T), reward units; the gradient flows through it.
            old_values: V at rollout time, (B, T).
            returns: R̂, (B, T).
        """


@dataclass(frozen=True, kw_only=True)
class ClippedValueLoss(ValueLoss):
    """Clipped loss c_v · ½ max((V − R̂)², (clip(V, V_old ± ε) − R̂)²) (Ziegler et al. 2019, code)."""

    epsilon: float = 0.2
    """ε > 0, reward units: how far V may move in one update before its gradient stops."""
    coef: float = 0.1
    """c_v > 0, weight against the policy loss."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon, coef=self.coef)

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> PerAction:
        """Return the larger of the plain and the clipped squared error."""
        near = torch.clamp(values, old_values - self.epsilon, old_values + self.epsilon)
        plain, bounded = (values - returns).square(), (near - returns).square()
        loss = 0.5 * self.coef * torch.maximum(plain, bounded)
        return PerAction(loss, {"value/clipfrac_avg": (bounded > plain).to(loss.dtype)})
