"""Combination of reward models that err on different responses (Coste et al. 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.core.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class Combination(ABC):
    """Base class of maps from the scores of n members to one."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """Combine the members' scores to one per response, (B,), in reward units.

        Args:
            scores: of each member, (n, B), reward units.
        """


@dataclass(frozen=True, kw_only=True)
class MeanReward(Combination):
    """Mean reward (1/n) Σ_i r_i."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Average over the members."""
        return scores.mean(0)


@dataclass(frozen=True, kw_only=True)
class WorstReward(Combination):
    """Smallest reward min_i r_i, that of the most critical member (worst-case optimization, WCO)."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Take the minimum over the members."""
        return scores.amin(0)


@dataclass(frozen=True, kw_only=True)
class UncertaintyWeighted(Combination):
    """Reward mean − λ·variance, with the biased variance (uncertainty-weighted optimization, UWO)."""

    coef: float = 0.1
    """λ > 0, per reward unit."""

    def __post_init__(self) -> None:
        check_positive(coef=self.coef)

    def __call__(self, scores: Tensor) -> Tensor:
        """Subtract λ times the variance from the mean."""
        return scores.mean(0) - self.coef * scores.var(0, correction=0)
