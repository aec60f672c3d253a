"""One score of several reward models, which do not err on the same responses (Coste et al. 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.core.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class Combination(ABC):
    """From the scores of n members to one."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """One score per response, (B,), reward units.

        Args:
            scores: of each member, (n, B), reward units.
        """


@dataclass(frozen=True, kw_only=True)
class MeanReward(Combination):
    """(1/n) Σ_i r_i."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Mean over the members."""
        return scores.mean(0)


@dataclass(frozen=True, kw_only=True)
class WorstReward(Combination):
    """min_i r_i: what the most critical member says (worst-case optimization, WCO)."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Smallest over the members."""
        return scores.amin(0)


@dataclass(frozen=True, kw_only=True)
class UncertaintyWeighted(Combination):
    """mean − λ·variance over the members, biased variance (uncertainty-weighted optimization, UWO)."""

    coef: float = 0.1
    """λ > 0, per reward unit."""

    def __post_init__(self) -> None:
        check_positive(coef=self.coef)

    def __call__(self, scores: Tensor) -> Tensor:
        """Mean less λ times the variance."""
        return scores.mean(0) - self.coef * scores.var(0, correction=0)
